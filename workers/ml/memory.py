"""When memory runs out.

Knows: which errors mean that, and how to give back what a device keeps in reserve.
Refuses to know: what to do then.
"""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    # PyTorch raises its own class on a GPU and a bare RuntimeError on a CPU.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def release_reserve() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
