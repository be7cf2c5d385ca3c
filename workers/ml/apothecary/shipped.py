"""Where the shipped model and provider sets lie, and what is recorded of them.

Knows: the asset paths and base.json. Standard library only.
Refuses to know: how the assets were made (build) and what they are used for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "assets"
MODEL_FOLDER = FOLDER / "model"
PRETRAINED_FOLDER = FOLDER / "pretrained"  # the weights before alignment; no tokenizer, since nobody serves them
SETS_FOLDER = FOLDER / "sets"
BASE_FILE = FOLDER / "base.json"

CONTEXT = 2048  # tokens

# What a learning_rate_multiplier of 1 means on this model, and where adapters sit; docs/LOG.md has the grid.
DEFAULT_LEARNING_RATE = 1e-3
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base() -> dict[str, Any]:
    """What base.json says of the bundled base model."""
    described = json.loads(BASE_FILE.read_text(encoding="utf-8"))
    if not isinstance(described, dict):
        raise TypeError("base.json is not an object")
    return described
