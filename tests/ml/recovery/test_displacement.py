"""What alignment did, read from a checkpoint: every way a folder can be wrong, and shards."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ml.conftest import TARGETS
from tests.ml.recovery.conftest import tune
from workers.ml.checkpoints import load_base
from workers.ml.errors import IntegrityError, NumericError
from workers.ml.recovery.displacement import Displacement, tensor_name
from workers.ml.settings import LoraSettings
from workers.ml.types import Silent

NAME = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(inputs, tmp_path):
    return shutil.copytree(inputs.pretrained, tmp_path / "pretrained")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_every_adapted_layer_has_the_difference_of_the_two_checkpoints(tuned, inputs, tiny_base_folder):
    before = load_file(inputs.pretrained / "model.safetensors")
    after = load_file(tiny_base_folder / "model.safetensors")
    walked = dict(Displacement(tuned, inputs.pretrained).walk(Silent(), "reading"))
    assert list(walked) == tuned.vector.pairs()
    for pair, V in walked.items():
        name = tensor_name(pair)
        assert not name.startswith("base_model") and "base_layer" not in name
        assert V.dtype == torch.float32
        assert torch.equal(V, after[name] - before[name])


def test_shards_are_found_by_their_index_and_other_copies_do_not_count(tuned, folder):
    whole = Displacement(tuned, folder)
    expected = [whole.of(pair) for pair in tuned.vector.pairs()]
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = Displacement(tuned, folder)
    assert all(torch.equal(sharded.of(p), V) for p, V in zip(tuned.vector.pairs(), expected, strict=True))


def test_a_folder_that_cannot_be_compared_is_refused_by_the_name_of_the_layer(tuned, folder, tmp_path):
    def spoiled(change):
        path = shutil.copytree(folder, tmp_path / f"copy-{len(list(tmp_path.iterdir()))}")
        change(path)
        return path

    cases = [
        ("is not there", lambda path: rewrite(path, lambda t: t.pop(NAME))),
        (
            "is there 2 times",
            lambda path: save_file({NAME: load_file(path / "model.safetensors")[NAME]}, path / "more.safetensors"),
        ),
        ("shape \\(8, 8\\)", lambda path: rewrite(path, lambda t: t.update({NAME: torch.zeros(8, 8)}))),
        ("no plain number", lambda path: rewrite(path, lambda t: t.update({NAME: t[NAME].to(torch.int8)}))),
    ]
    for reason, change in cases:
        with pytest.raises(IntegrityError, match=reason) as caught:
            Displacement(tuned, spoiled(change))
        assert NAME in str(caught.value)
        assert caught.value.param == "pretrained"
    others = [
        ("pickle", lambda path: (path / "pytorch_model.bin").write_bytes(b"")),
        ("no safetensors", lambda path: (path / "model.safetensors").unlink()),
        ("not a readable", lambda path: (path / "model.safetensors").write_bytes(b"no")),
        ("cannot be read", lambda path: (path / "model.safetensors.index.json").write_text("[]")),
        (
            "no file beside it",
            lambda path: (path / "model.safetensors.index.json").write_text(
                '{"weight_map": {"x": "../x.safetensors"}}'
            ),
        ),
    ]
    for reason, change in others:
        with pytest.raises(IntegrityError, match=reason):
            Displacement(tuned, spoiled(change))


def test_a_checkpoint_of_the_aligned_model_itself_is_refused(tuned, tiny_base_folder):
    with pytest.raises(NumericError, match="no difference"):
        list(Displacement(tuned, tiny_base_folder).walk(Silent(), "reading"))


def test_weights_that_are_not_finite_are_refused(tuned, folder):
    rewrite(folder, lambda tensors: tensors[NAME].fill_(float("inf")))
    with pytest.raises(NumericError, match="q_proj\\.weight is not finite"):
        list(Displacement(tuned, folder).walk(Silent(), "reading"))


def test_rounding_at_load_is_not_taken_for_alignment(tiny_base_folder, inputs):
    """In bf16 a layer that alignment never touched differs by nothing, though its files are fp32."""
    lora = LoraSettings(rank=4, alpha=8, target_modules=TARGETS)
    tuned = tune(load_base(tiny_base_folder, dtype=torch.bfloat16), lora)
    same = Displacement(tuned, tiny_base_folder)
    assert not any(bool(same.of(pair).any()) for pair in tuned.vector.pairs())
    assert Displacement(tuned, inputs.pretrained).of(tuned.vector.pairs()[0]).dtype == torch.float32
