"""Adapters on disk as the gate sees them, and the folder that a release would consist of.

Knows: which files beside the adapter belong to a servable candidate, and how to read its factors back.
Refuses to know: verdicts, manifests and storage.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from workers.ml.adapter_format import WEIGHTS_FILE, validate_adapter
from workers.ml.atomic import write_folder
from workers.ml.errors import IntegrityError
from workers.ml.tuned_model import TunedModel

# Everything a tokenizer of the supported kinds is made of; the template may stand in a file of its own.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def factors_from_disk(tuned: TunedModel, folder: Path, base: torch.nn.Module) -> Tensor:
    """The flat LoRA vector of a saved adapter, after the strict check of every tensor."""
    validate_adapter(folder, base)
    saved = load_file(folder / WEIGHTS_FILE)
    adapter = tuned.model.active_adapter
    parts = {name: saved[name.replace(f".{adapter}.weight", ".weight")] for name in tuned.vector.names}
    return tuned.vector.join(parts)


def assemble(adapter: Path, base: Path, target: Path) -> None:
    """Adapter, tokenizer and chat template in one folder; all or nothing."""
    files = {path.name: path.read_bytes() for path in sorted(adapter.iterdir())}
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            files[name] = (base / name).read_bytes()
    if "tokenizer.json" not in files and "tokenizer.model" not in files:
        raise IntegrityError("The base model has no tokenizer file that a release could carry.", "base")
    write_folder(target, files)
