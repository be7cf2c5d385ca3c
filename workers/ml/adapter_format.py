"""What an adapter folder may hold: the strict check before any of its bytes reach a model.

Knows: the stock PEFT layout of a plain LoRA adapter, byte by byte (safetensors itself accepts doubled keys, NaN
and surprising names).
Refuses to know: how adapters are trained, repaired or judged. Torch is needed only to look for NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load as load_safetensors

from workers.ml.errors import IntegrityError, NumericError, UnsupportedAdapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})
KEY_PREFIX = "base_model.model."

# Fields of a PEFT configuration that may differ from their default: they leave the adapter what it is,
# `scaling * B @ A` on named linear layers. Everything else (DoRA, PiSSA, per-layer ranks, trained embeddings,
# whatever a later PEFT invents) changes that map or the base model, and is refused by its name.
FREE_FIELDS = frozenset(
    {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "base_model_name_or_path", "revision"}
    | {"inference_mode", "task_type", "peft_version", "auto_mapping", "init_lora_weights"}
)
PLAIN_INITIALISATIONS = (True, False, "gaussian")


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """`targets` maps each adapted linear layer of the base model to (in_features, out_features)."""

    rank: int
    alpha: float
    scaling: float
    targets: Mapping[str, tuple[int, int]]


def refuse_pickles(folder: Path) -> None:
    """Unpickling runs code, also from a file that merely lies beside the one we want."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise IntegrityError(f"{path.name} is a pickle file; weights are taken from safetensors only.", "path")


def linear_targets(model: torch.nn.Module, target_modules: Collection[str]) -> dict[str, tuple[int, int]]:
    """Every linear layer whose leaf name is targeted, with its sizes. Each target must match at least one."""
    found, matched = {}, set()
    for place, module in model.named_modules():
        # While an adapter is attached, the layer it adapts stands one level below its own name.
        name = place.removesuffix(".base_layer")
        leaf = name.rpartition(".")[2]
        if leaf in target_modules and isinstance(module, torch.nn.Linear):
            found[name] = (module.in_features, module.out_features)
            matched.add(leaf)
    if missing := sorted(set(target_modules) - matched):
        raise UnsupportedAdapter(f"The base model has no linear layer named {', '.join(missing)}.", "target_modules")
    return found


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse every configuration that is not plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapter(f"Only LoRA adapters are supported, not {config.get('peft_type')!r}.", "peft_type")
    plain = LoraConfig().to_dict()
    for field, value in config.items():
        if field in FREE_FIELDS or field == "peft_type" or value == plain.get(field) or not value:
            continue
        raise UnsupportedAdapter(f"The adapter uses {field}={value!r}, which is not plain LoRA.", field)
    if config.get("init_lora_weights", True) not in PLAIN_INITIALISATIONS:
        raise UnsupportedAdapter(
            f"The adapter was initialised by {config['init_lora_weights']!r}, which changes the base model.",
            "init_lora_weights",
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise UnsupportedAdapter(f"The adapter's rank is {rank!r}; it must be a whole number of at least 1.", "r")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        raise UnsupportedAdapter(f"The adapter's lora_alpha is {alpha!r}; it must be a number above 0.", "lora_alpha")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets or any("." in str(name) for name in targets):
        raise UnsupportedAdapter("target_modules must list leaf names of modules.", "target_modules")
    if ends := sorted({"lm_head", "embed_tokens"} & set(targets)):
        # With tied embeddings an edit at one end changes both, and servers refuse such adapters.
        raise UnsupportedAdapter(
            f"The adapter sits on {', '.join(ends)}, which no recovery may touch.", "target_modules"
        )


def validate_adapter(folder: Path, base: torch.nn.Module) -> AdapterFacts:
    """Exactly the expected keys, shapes and dtype for this base model, every number finite; else an error."""
    refuse_pickles(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise IntegrityError(f"The adapter folder has no {name}.", "path")
    check_config(config := _read_config(folder / CONFIG_FILE))
    rank, alpha = config["r"], float(config["lora_alpha"])
    targets = linear_targets(base, set(config["target_modules"]))
    _check_weights((folder / WEIGHTS_FILE).read_bytes(), _expected_shapes(targets, rank))
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return AdapterFacts(rank, alpha, scaling, targets)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{path.name} is not JSON: {error}", "path") from error
    if not isinstance(config, dict):
        raise IntegrityError(f"{path.name} is not a JSON object.", "path")
    return config


def _expected_shapes(targets: Mapping[str, tuple[int, int]], rank: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (inputs, outputs) in targets.items():
        shapes[f"{KEY_PREFIX}{name}.lora_A.weight"] = (rank, inputs)
        shapes[f"{KEY_PREFIX}{name}.lora_B.weight"] = (outputs, rank)
    return shapes


def _check_weights(data: bytes, expected: Mapping[str, tuple[int, ...]]) -> None:
    header = _read_header(data)
    if header.pop("__metadata__", {}) not in ({}, {"format": "pt"}):
        raise IntegrityError("The adapter's weights carry unexpected metadata.", WEIGHTS_FILE)
    if set(header) != set(expected):
        odd = sorted(set(header) ^ set(expected))[:3]
        raise IntegrityError(f"The adapter's tensors are not those of this base model: {odd}.", WEIGHTS_FILE)
    for name, shape in expected.items():
        if header[name]["dtype"] != "F32" or tuple(header[name]["shape"]) != shape:
            raise IntegrityError(f"{name} is not an fp32 tensor of the shape {shape}.", WEIGHTS_FILE)
    for name, tensor in load_safetensors(data).items():
        if not torch.isfinite(tensor).all():
            raise NumericError(f"{name} holds numbers that are not finite.", WEIGHTS_FILE)


def _read_header(data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size].decode("utf-8"), object_pairs_hook=unique)
    except ValueError as error:
        raise IntegrityError(f"The adapter's weights are not safetensors: {error}", WEIGHTS_FILE) from error
    if not isinstance(header, dict):
        raise IntegrityError("The adapter's weights are not safetensors.", WEIGHTS_FILE)
    return header
