"""Only pinned bytes are loaded, only plain LoRA is accepted, nothing is half-written."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from workers.ml import atomic
from workers.ml.checkpoints import (
    LoadedBase,
    attach_adapter,
    detach_adapter,
    load_adapter,
    load_base,
    save_adapter,
    validate_adapter,
)
from workers.ml.digests import digest_folder
from workers.ml.errors import BaseModelChanged, IntegrityError, InvalidSetting, NumericError, UnsupportedAdapter
from workers.ml.settings import LoraSettings
from workers.ml.tuning.lora_vector import LoraVector

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROBE = torch.tensor([[256, 259, 71, 72, 257, 260, 88, 78, 257]])


@pytest.fixture
def base_copy(tiny_base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))


@pytest.fixture
def saved_adapter(tiny_base: LoadedBase, tiny_lora: LoraSettings, tmp_path: Path) -> Path:
    """An adapter whose every factor is random, on disk; the base is free again."""
    model = attach_adapter(tiny_base, tiny_lora, seed=3)
    vector = LoraVector(model)
    vector.set(torch.randn(vector.numel, generator=torch.Generator().manual_seed(5)) * 0.1)
    save_adapter(model, tmp_path / "adapter")
    detach_adapter(model)
    return tmp_path / "adapter"


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_base_whose_bytes_changed_is_refused(base_copy: Path) -> None:
    digest = digest_folder(base_copy).digest
    assert load_base(base_copy, expected_digest=digest).digest == digest
    weights = base_copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BaseModelChanged, match="not those that were registered"):
        load_base(base_copy, expected_digest=digest)


def test_a_base_with_a_renamed_file_is_refused(base_copy: Path) -> None:
    digest = digest_folder(base_copy).digest
    (base_copy / "generation_config.json").rename(base_copy / "other.json")
    with pytest.raises(BaseModelChanged):
        load_base(base_copy, expected_digest=digest)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.PT", "deep/rng_state.pth"])
def test_a_pickle_beside_the_weights_is_refused(base_copy: Path, name: str) -> None:
    (base_copy / name).parent.mkdir(exist_ok=True)
    (base_copy / name).write_bytes(b"\x80\x04.")
    with pytest.raises(IntegrityError, match="pickle"):
        load_base(base_copy)


def test_code_an_adapter_and_quantisation_in_the_base_folder_are_refused(base_copy: Path) -> None:
    (base_copy / "modeling_evil.py").write_text("raise SystemExit")
    with pytest.raises(IntegrityError, match="Python code"):
        load_base(base_copy)
    (base_copy / "modeling_evil.py").rename(base_copy / CONFIG)
    with pytest.raises(IntegrityError, match="holds an adapter"):
        load_base(base_copy)
    (base_copy / CONFIG).unlink()
    path = base_copy / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(IntegrityError, match="auto_map"):
        load_base(base_copy)
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(InvalidSetting, match="Quantised"):
        load_base(base_copy)


def test_a_loaded_base_is_frozen_and_evaluates(tiny_base: LoadedBase) -> None:
    assert not tiny_base.model.training
    assert not any(parameter.requires_grad for parameter in tiny_base.model.parameters())
    assert {parameter.dtype for parameter in tiny_base.model.parameters()} == {torch.float32}


def test_factors_are_fp32_over_a_bf16_base(tiny_base_folder: Path, tiny_lora: LoraSettings) -> None:
    base = load_base(tiny_base_folder, dtype=torch.bfloat16)
    model = attach_adapter(base, tiny_lora, seed=0)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}


def test_a_fresh_adapter_changes_nothing_and_its_seed_decides_it(
    tiny_base: LoadedBase, tiny_lora: LoraSettings
) -> None:
    expected = tiny_base.model(PROBE).logits
    state = torch.random.get_rng_state()
    vectors = []
    for seed in (1, 1, 2):
        model = attach_adapter(tiny_base, tiny_lora, seed=seed)
        assert torch.equal(model(PROBE).logits, expected)
        vectors.append(LoraVector(model).get())
        detach_adapter(model)
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are left alone"


def test_a_second_adapter_on_one_base_is_refused(tiny_base: LoadedBase, tiny_lora: LoraSettings) -> None:
    attach_adapter(tiny_base, tiny_lora, seed=0)
    with pytest.raises(InvalidSetting, match="already carries an adapter"):
        attach_adapter(tiny_base, tiny_lora, seed=0)


@pytest.mark.parametrize(
    ("target", "error"), [("lm_head", InvalidSetting), ("embed_tokens", InvalidSetting), ("nope", UnsupportedAdapter)]
)
def test_targets_that_cannot_be_adapted_are_refused(tiny_base: LoadedBase, target: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=target):
        attach_adapter(tiny_base, LoraSettings(rank=2, alpha=4, target_modules=("q_proj", target)), seed=0)


@pytest.mark.parametrize("shape", ["llama", "gqa", "tied", "qkv_bias"])
def test_a_saved_adapter_gives_the_same_logits_in_stock_peft(
    base_folders: Callable[[str], Path], shape: str, tiny_lora: LoraSettings, tmp_path: Path
) -> None:
    folder = base_folders(shape)
    model = attach_adapter(load_base(folder), tiny_lora, seed=1)
    vector = LoraVector(model)
    vector.add_(torch.randn(vector.numel, generator=torch.Generator().manual_seed(0)), scale=0.1)
    expected = model(PROBE).logits
    save_adapter(model, tmp_path / "adapter", base_name="tiny")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    assert torch.equal(stock(PROBE).logits, expected)
    ours = load_adapter(load_base(folder), tmp_path / "adapter")
    assert torch.equal(ours(PROBE).logits, expected)
    assert torch.equal(LoraVector(ours).get(), vector.get())


def test_saving_gives_the_same_bytes_wherever_and_whenever(
    tiny_base_folder: Path, base_copy: Path, tiny_lora: LoraSettings, tmp_path: Path
) -> None:
    digests = set()
    for index, folder in enumerate((tiny_base_folder, base_copy, base_copy)):
        model = attach_adapter(load_base(folder), tiny_lora, seed=1)
        save_adapter(model, tmp_path / str(index))
        digests.add(digest_folder(tmp_path / str(index)).digest)
    assert len(digests) == 1
    assert str(tmp_path) not in (tmp_path / "0" / CONFIG).read_text()


def test_the_file_layout_is_that_of_stock_peft(saved_adapter: Path) -> None:
    assert sorted(path.name for path in saved_adapter.iterdir()) == [CONFIG, WEIGHTS]
    assert {tensor.dtype for tensor in load_file(saved_adapter / WEIGHTS).values()} == {torch.float32}


def test_a_failure_while_saving_leaves_the_old_adapter_and_nothing_else(
    tiny_base: LoadedBase, tiny_lora: LoraSettings, saved_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest_folder(saved_adapter).digest
    model = attach_adapter(tiny_base, tiny_lora, seed=9)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, saved_adapter)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, saved_adapter.parent / "fresh")
    assert digest_folder(saved_adapter).digest == before
    assert [path.name for path in saved_adapter.parent.iterdir()] == [saved_adapter.name]


def test_a_failed_rename_puts_the_old_folder_back(saved_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest_folder(saved_adapter).digest
    real = os.rename

    def rename_but_not_into_place(self: Path, target: Path) -> Path:
        if target == saved_adapter and ".old." not in self.parent.name:
            raise OSError(5, "Input/output error")
        real(self, target)
        return target

    monkeypatch.setattr(Path, "rename", rename_but_not_into_place)
    with pytest.raises(OSError, match="Input/output"):
        atomic.write_folder(saved_adapter, {"a": b"new"})
    assert digest_folder(saved_adapter).digest == before
    assert [path.name for path in saved_adapter.parent.iterdir()] == [saved_adapter.name]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"an_invention_of_next_year": {"x": 1}}, "an_invention_of_next_year"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"target_modules": "all-linear"}, "target_modules"),
        ({"r": 0}, "rank"),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused(
    saved_adapter: Path, tiny_base: LoadedBase, changes: dict[str, Any], field: str
) -> None:
    rewrite_config(saved_adapter, **changes)
    with pytest.raises(UnsupportedAdapter, match=field):
        load_adapter(tiny_base, saved_adapter)


def test_dora_is_refused_by_the_vector_too(tiny_base: LoadedBase) -> None:
    model = get_peft_model(tiny_base.model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(UnsupportedAdapter):
        LoraVector(model)


def test_rank_stabilised_lora_keeps_its_scaling(saved_adapter: Path, tiny_base: LoadedBase) -> None:
    assert validate_adapter(saved_adapter, tiny_base.model).scaling == 2.0  # 8 / 4
    rewrite_config(saved_adapter, use_rslora=True)
    facts = validate_adapter(saved_adapter, tiny_base.model)
    model = load_adapter(tiny_base, saved_adapter)
    assert facts.scaling == 4.0  # 8 / sqrt(4)
    assert {pair.scaling for pair in LoraVector(model).pairs()} == {4.0}


def test_tensors_that_do_not_belong_are_refused(saved_adapter: Path, tiny_base: LoadedBase) -> None:
    path = saved_adapter / WEIGHTS
    good = load_file(path)
    name = min(good)

    def refused(tensors: dict[str, torch.Tensor], error: type[Exception], words: str) -> None:
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(error, match=words):
            validate_adapter(saved_adapter, tiny_base.model)

    refused(good | {"../../etc/passwd": torch.zeros(1)}, IntegrityError, "not those of this base model")
    refused({k: v for k, v in good.items() if k != name}, IntegrityError, "not those of this base model")
    refused(good | {name: good[name].T.contiguous()}, IntegrityError, "not an fp32 tensor of the shape")
    refused(good | {name: good[name].double()}, IntegrityError, "not an fp32 tensor")
    refused(good | {name: torch.full_like(good[name], float("nan"))}, NumericError, "not finite")
    save_file(good, path, metadata={"format": "pt", "note": "x" * 1000})
    with pytest.raises(IntegrityError, match="metadata"):
        validate_adapter(saved_adapter, tiny_base.model)


def test_a_key_given_twice_in_the_header_is_refused(saved_adapter: Path, tiny_base: LoadedBase) -> None:
    path = saved_adapter / WEIGHTS
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + size].decode()
    doubled = header.replace("{", '{"__metadata__":{"format":"pt"},', 1).encode()
    path.write_bytes(struct.pack("<Q", len(doubled)) + doubled + data[8 + size :])
    with pytest.raises(IntegrityError, match="a key occurs twice"):
        validate_adapter(saved_adapter, tiny_base.model)


def test_a_pickle_beside_the_adapter_is_refused(saved_adapter: Path, tiny_base: LoadedBase) -> None:
    (saved_adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(IntegrityError, match="pickle"):
        load_adapter(tiny_base, saved_adapter)
