"""What alignment did to the adapted layers: the base model's weights minus its weights before alignment.

Knows: where a tensor of a safetensors checkpoint lies, sharded or not, and that one layer at a time is in memory.
Refuses to know: what a method makes of a difference, pickles, and any other way to store weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.ml.adapter_format import KEY_PREFIX, refuse_pickles
from workers.ml.errors import IntegrityError, NumericError
from workers.ml.tuned_model import TunedModel
from workers.ml.tuning.lora_vector import LoraPair
from workers.ml.types import Progress

PARAM = "pretrained"


class Displacement:
    """V = aligned - pretrained for each adapted layer, read from disk when it is asked for.

    `folder` names its tensors as the base model's own checkpoint does. Raises IntegrityError when it holds a pickle,
    or does not hold the weight of every adapted layer exactly once and in the same shape.
    """

    def __init__(self, tuned: TunedModel, folder: Path) -> None:
        refuse_pickles(folder)
        self._tuned = tuned
        self._places = _places(folder)
        for pair in tuned.vector.pairs():
            self._check(pair)

    def of(self, pair: LoraPair) -> Tensor:
        """(d_out, d_in) fp32 on the model's device. NumericError where it is not finite."""
        aligned, name = self._aligned(pair), tensor_name(pair)
        with safe_open(self._places[name][0], framework="pt") as weights:
            stored = weights.get_tensor(name)
        # Rounded as the aligned weights were when they were loaded: else weights that alignment never touched would
        # differ by their rounding.
        pretrained = stored.to(device=aligned.device, dtype=aligned.dtype)
        difference: Tensor = aligned.float() - pretrained.float()
        if not bool(torch.isfinite(difference).all()):
            raise NumericError(f"{name} is not finite before alignment or after it.", PARAM)
        return difference

    def walk(self, progress: Progress, part: str) -> Iterator[tuple[LoraPair, Tensor]]:
        """Every adapted layer with its difference, a tick after each.

        NumericError at the end when every difference was zero: the folder holds the aligned model itself, and a method
        that goes by differences would do nothing at every strength.
        """
        pairs, different = self._tuned.vector.pairs(), False
        for index, pair in enumerate(pairs, start=1):
            difference = self.of(pair)
            different = different or bool(difference.any())
            yield pair, difference
            progress.step(index, len(pairs), part=part)
        if not different:
            raise NumericError(
                "The weights before alignment are the base model's own in every adapted layer: there is no difference "
                "to go by. Register the checkpoint from before alignment.",
                PARAM,
            )

    def _aligned(self, pair: LoraPair) -> Tensor:
        layer = self._tuned.model.get_submodule(pair.module_name).get_base_layer()  # type: ignore[operator]
        weight: Tensor = layer.weight.detach()
        return weight

    def _check(self, pair: LoraPair) -> None:
        name = tensor_name(pair)
        places = self._places.get(name, [])
        if len(places) != 1:
            found = "not there" if not places else f"there {len(places)} times"
            raise IntegrityError(f"{name} is {found} among the weights before alignment.", PARAM)
        expected = tuple(self._aligned(pair).shape)
        with _opened(places[0]) as weights:
            piece = weights.get_slice(name)
            shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
        if shape != expected:
            raise IntegrityError(f"{name} has the shape {shape} before alignment and {expected} after it.", PARAM)
        if dtype not in ("BF16", "F16", "F32", "F64"):
            raise IntegrityError(f"{name} is stored as {dtype} before alignment, which is no plain number.", PARAM)


def tensor_name(pair: LoraPair) -> str:
    """The name of an adapted layer's own weight in its base model's checkpoint: no PEFT prefix, no `.base_layer`."""
    return pair.module_name.removeprefix(KEY_PREFIX).removesuffix(".base_layer") + ".weight"


def _places(folder: Path) -> dict[str, list[Path]]:
    """The files each tensor lies in. With an index only the files it names count: others may hold other copies."""
    index = folder / "model.safetensors.index.json"
    files = _indexed(index) if index.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise IntegrityError("The folder of weights before alignment has no safetensors weights.", PARAM)
    places: dict[str, list[Path]] = {}
    for file in files:
        with _opened(file) as weights:
            for name in weights.keys():  # noqa: SIM118  # not a dict
                places.setdefault(name, []).append(file)
    return places


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise IntegrityError(f"{index.name} cannot be read: {error}", PARAM) from error
    if odd := [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]:
        raise IntegrityError(f"{index.name} names {odd[0]!r}, which is no file beside it.", PARAM)
    return [index.parent / name for name in names]


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{file.name} is not a readable safetensors file: {error}", PARAM) from error
