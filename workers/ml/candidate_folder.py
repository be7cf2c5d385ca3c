"""Candidates on disk as the gate sees them, and the folder that a release would consist of.

Knows: how a candidate becomes one stock adapter, how an adapter of any rank is read back, and which files beside it
belong to a servable candidate.
Refuses to know: verdicts, manifests and storage.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from workers.ml.adapter_format import KEY_PREFIX, WEIGHTS_FILE, validate_adapter
from workers.ml.atomic import write_folder
from workers.ml.candidate import Candidate, LowRank, joined
from workers.ml.checkpoints import save_adapter, write_adapter
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


def save_candidate(tuned: TunedModel, candidate: Candidate, folder: Path, *, base_name: str | None = None) -> None:
    """Writes the stock layout. With blocks the rank grows and `lora_alpha` equals it, so that the scaling is 1."""
    if not candidate.beside:
        with tuned.vector.swapped(candidate.factors):
            save_adapter(tuned.model, folder, base_name=base_name)
        return
    whole = joined(tuned.vector, candidate)
    tensors = {}
    for module, term in whole.items():
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = term.A, term.B
    rank = next(iter(whole.values())).rank
    settings = {"r": rank, "lora_alpha": rank, "use_rslora": False}
    write_adapter(folder, tensors, tuned.model.peft_config[tuned.model.active_adapter], base_name, settings)


def candidate_from_disk(tuned: TunedModel, folder: Path, base: torch.nn.Module) -> Candidate:
    """A saved adapter, after the strict check of every tensor. One of another rank than the job's stands beside it."""
    facts = validate_adapter(folder, base)
    saved, adapter = load_file(folder / WEIGHTS_FILE), tuned.model.active_adapter
    pairs = tuned.vector.pairs()
    if {f"{KEY_PREFIX}{name}" for name in facts.targets} != {pair.module_name for pair in pairs}:
        raise IntegrityError("The adapter does not sit on the layers that the job tuned.", "target_modules")
    parts = {name: saved[name.replace(f".{adapter}.weight", ".weight")] for name in tuned.vector.names}
    own = dict(zip(tuned.vector.names, tuned.vector.shapes, strict=True))
    same_rank = all(tuple(part.shape) == own[name] for name, part in parts.items())
    if same_rank and all(math.isclose(pair.scaling, facts.scaling) for pair in pairs):
        return Candidate(tuned.vector.join(parts))
    device = tuned.vector.device
    beside = {
        p.module_name: LowRank((parts[p.b_name] * facts.scaling).to(device), parts[p.a_name].to(device)) for p in pairs
    }
    return Candidate(torch.zeros(tuned.vector.numel, device=device), beside)


def assemble(adapter: Path, base: Path, target: Path) -> None:
    """Adapter, tokenizer and chat template in one folder; all or nothing."""
    files = {path.name: path.read_bytes() for path in sorted(adapter.iterdir())}
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            files[name] = (base / name).read_bytes()
    if "tokenizer.json" not in files and "tokenizer.model" not in files:
        raise IntegrityError("The base model has no tokenizer file that a release could carry.", "base")
    write_folder(target, files)
