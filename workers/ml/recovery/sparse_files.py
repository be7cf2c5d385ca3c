"""Sparse patches as files beside an adapter, and merged into dense weights.

Knows: the two files of a patch, the strict check of every number before it is used, and how a patch and its adapter
become plain weights.
Refuses to know: which method made a patch, whether a model passes any test, and how anything is served.

A folder holds `sparse_patch.safetensors` with, for each module, `<module>.index` (int32, row * d_in + column, strictly
ascending) and `<module>.values` (fp32, what is added there), and `sparse_patch.json` with the digests of the base, of
the adapter's folder and of the first file, shapes and counts. Modules are named as in the adapter's own file.
A patch without its adapter on its base means nothing, which is why both digests are kept and can be asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.ml.adapter_format import refuse_pickles
from workers.ml.atomic import write_folder
from workers.ml.candidate import Candidate, SparsePatch
from workers.ml.digests import digest_bytes
from workers.ml.errors import BaseModelChanged, IntegrityError, InvalidSetting, NumericError, UnsupportedAdapter
from workers.ml.tuning.lora_vector import LoraVector

PATCH_FILE = "sparse_patch.safetensors"
FACTS_FILE = "sparse_patch.json"
VERSION = 1
INDEX_END = 2**31  # int32


def save_patch(folder: Path, candidate: Candidate, *, base_digest: str, adapter_digest: str) -> None:
    """Writes the candidate's patches, all or nothing; the same patches and digests always give the same bytes.

    Its factors are an adapter of their own, `save_candidate` of `Candidate(candidate.factors)`, whose folder has
    `adapter_digest` (`digest_folder`).
    Raises InvalidSetting where a patch cannot be written, NumericError where one holds numbers that are not finite.
    """
    tensors: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    for name, patch in sorted(candidate.beside.items()):
        if not isinstance(patch, SparsePatch):
            raise InvalidSetting(f"{name} has a low-rank block beside it; only sparse patches are written here.", name)
        index, values = _flat(name, patch)
        if not len(values):
            continue
        tensors[f"{name}.index"], tensors[f"{name}.values"] = index, values
        modules[name] = {"shape": list(patch.shape), "entries": len(values)}
    if not tensors:
        raise InvalidSetting("The candidate has no sparse patch to write.", "candidate")
    weights = to_safetensors(tensors, metadata={"format": "pt"})
    facts = {
        "version": VERSION,
        "base_sha256": base_digest,
        "adapter_sha256": adapter_digest,
        "weights_sha256": digest_bytes(weights),
        "entries": sum(module["entries"] for module in modules.values()),
        "modules": modules,
    }
    write_folder(
        folder, {PATCH_FILE: weights, FACTS_FILE: json.dumps(facts, indent=2, sort_keys=True).encode() + b"\n"}
    )


def load_patch(
    folder: Path, *, base_digest: str | None = None, adapter_digest: str | None = None
) -> dict[str, SparsePatch]:
    """The patches by module name, on the CPU, after the check of every number.

    Given a digest, it must be the one the patch was made for: BaseModelChanged or IntegrityError otherwise. Raises
    IntegrityError for files that are not exactly a patch, NumericError for values that are not finite.
    """
    refuse_pickles(folder)
    for name in (FACTS_FILE, PATCH_FILE):
        if not (folder / name).is_file():
            raise IntegrityError(f"The folder of the sparse patch has no {name}.", "path")
    facts = _read_facts((folder / FACTS_FILE).read_bytes())
    if base_digest is not None and facts["base_sha256"] != base_digest:
        raise BaseModelChanged("The sparse patch was made for another base model.", "base")
    if adapter_digest is not None and facts["adapter_sha256"] != adapter_digest:
        raise IntegrityError("The sparse patch was made for another adapter.", "adapter")
    weights = (folder / PATCH_FILE).read_bytes()
    if digest_bytes(weights) != facts["weights_sha256"]:
        raise IntegrityError(f"{PATCH_FILE} is not the file that {FACTS_FILE} describes.", PATCH_FILE)
    try:
        tensors = from_safetensors(weights)
    except SafetensorError as error:
        raise IntegrityError(f"{PATCH_FILE} is not safetensors: {error}", PATCH_FILE) from error
    if odd := set(tensors) ^ {f"{name}.{part}" for name in facts["modules"] for part in ("index", "values")}:
        raise IntegrityError(
            f"The tensors of the sparse patch are not those it describes: {sorted(odd)[:3]}.", PATCH_FILE
        )
    return {
        name: _checked(name, module, tensors[f"{name}.index"], tensors[f"{name}.values"])
        for name, module in facts["modules"].items()
    }


def merge_into(model: PeftModel, patch: Mapping[str, SparsePatch]) -> PreTrainedModel:
    """The base model with W = W0 + scaling * B @ A + patch in its dense weights, and without the adapter.

    `model` carries the patch's adapter and is used up: its weights are overwritten, so give it a model that was loaded
    for this purpose. Sums are formed in fp32 and cast once to the weights' own type; in bf16 that rounds away whatever
    is below half a unit in the last place, so the merged model is another model than the one with its adapter beside
    it: test the one that is served. Nothing is written before every name and shape has been checked.
    Raises UnsupportedAdapter for quantised or otherwise special layers, IntegrityError for a patch of another model,
    NumericError where a sum overflows the weights' type (load the model again then).
    """
    vector = LoraVector(model)
    parts, pairs = vector.split(vector.get()), vector.pairs()
    if unknown := set(patch) - {pair.module_name for pair in pairs}:
        raise IntegrityError(f"The adapter does not sit on {min(unknown)}, which the sparse patch changes.", "patch")
    weights = {pair.module_name: _plain_weight(model, pair.module_name) for pair in pairs}
    for name, change in patch.items():
        if change.shape != tuple(weights[name].shape):
            raise IntegrityError(f"{name} has the shape {tuple(weights[name].shape)}, not {change.shape}.", "patch")
    for pair in pairs:
        weight = weights[pair.module_name]
        whole = weight.float() + pair.scaling * (parts[pair.b_name] @ parts[pair.a_name])
        if pair.module_name in patch:
            change = patch[pair.module_name]
            places = (change.rows.to(whole.device), change.columns.to(whole.device))
            whole.index_put_(places, change.values.to(whole.device), accumulate=True)
        merged = whole.to(weight.dtype)
        if not torch.isfinite(merged).all():
            raise NumericError(f"{pair.module_name} cannot hold its merged weights as {weight.dtype}.", "patch")
        weight.copy_(merged)
    base: PreTrainedModel = model.unload()
    return base


def _plain_weight(model: PeftModel, name: str) -> Tensor:
    layer = model.get_submodule(name).get_base_layer()  # type: ignore[operator]
    # Quantised layers are subclasses, and may store packed numbers under an innocent dtype.
    if type(layer) is not nn.Linear or layer.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedAdapter(
            f"{name} is a {type(layer).__name__} of {layer.weight.dtype}: only plain dense weights can be merged. Load "
            "the base model unquantised.",
            "base",
        )
    weight: Tensor = layer.weight.data
    return weight


def _flat(name: str, patch: SparsePatch) -> tuple[Tensor, Tensor]:
    """Index and values in ascending order, on the CPU."""
    rows, columns = patch.shape
    if rows * columns > INDEX_END:
        raise InvalidSetting(f"{name} has more entries than an index of 31 bits can name.", name)
    index, order = (patch.rows * columns + patch.columns).cpu().sort()
    values = patch.values.detach().cpu()[order].float()
    inside = bool(((patch.rows >= 0) & (patch.rows < rows) & (patch.columns >= 0) & (patch.columns < columns)).all())
    if not inside or bool((index.diff() == 0).any()):
        raise InvalidSetting(f"The sparse patch of {name} has a place twice or outside {patch.shape}.", name)
    if not torch.isfinite(values).all():
        raise NumericError(f"The sparse patch of {name} holds numbers that are not finite.", name)
    return index.int(), values.contiguous()


def _read_facts(data: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(data.decode("utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{FACTS_FILE} is not JSON: {error}", FACTS_FILE) from error
    digests = ("base_sha256", "adapter_sha256", "weights_sha256")
    if (
        not isinstance(facts, dict)
        or set(facts) != {"version", "entries", "modules", *digests}
        or facts["version"] != VERSION
        or not all(isinstance(facts[name], str) for name in digests)
        or not isinstance(facts["modules"], dict)
        or not all(map(_describes_module, facts["modules"].values()))
        or facts["entries"] != sum(module["entries"] for module in facts["modules"].values())
    ):
        raise IntegrityError(f"{FACTS_FILE} does not describe a sparse patch of version {VERSION}.", FACTS_FILE)
    return facts


def _describes_module(module: object) -> bool:
    if not isinstance(module, dict) or set(module) != {"shape", "entries"} or not isinstance(module["shape"], list):
        return False
    sizes = [*module["shape"], module["entries"]]
    if len(sizes) != 3 or not all(type(size) is int and size >= 1 for size in sizes):
        return False
    return bool(module["entries"] <= module["shape"][0] * module["shape"][1] <= INDEX_END)


def _checked(name: str, module: Mapping[str, Any], index: Tensor, values: Tensor) -> SparsePatch:
    (rows, columns), entries = module["shape"], (module["entries"],)
    if index.dtype != torch.int32 or values.dtype != torch.float32 or not index.shape == values.shape == entries:
        raise IntegrityError(f"{name} has no {entries[0]} places of int32 with values of fp32.", PATCH_FILE)
    wide = index.long()
    if int(wide[0]) < 0 or int(wide[-1]) >= rows * columns or not bool((wide.diff() > 0).all()):
        raise IntegrityError(f"The places of {name} are not ascending inside ({rows}, {columns}).", PATCH_FILE)
    if not torch.isfinite(values).all():
        raise NumericError(f"The sparse patch of {name} holds numbers that are not finite.", PATCH_FILE)
    return SparsePatch(wide // columns, wide % columns, values, (rows, columns))
