"""Sparse patches on disk: the same numbers back, nothing else accepted, and the same model when merged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ml.conftest import TARGETS, write_base
from tests.ml.recovery.conftest import tune
from workers.ml.candidate import DENSE_FROM, Candidate, LowRank, SparsePatch, applied
from workers.ml.candidate_folder import candidate_from_disk, save_candidate
from workers.ml.checkpoints import load_adapter, load_base
from workers.ml.digests import digest_file, digest_folder
from workers.ml.errors import BaseModelChanged, IntegrityError, InvalidSetting, NumericError, UnsupportedAdapter
from workers.ml.evals.generate import generate
from workers.ml.recovery.run import recover
from workers.ml.recovery.sparse_files import FACTS_FILE, PATCH_FILE, load_patch, merge_into, save_patch
from workers.ml.recovery.specs import RollbackSpec
from workers.ml.settings import LoraSettings
from workers.ml.tuned_model import aligned
from workers.ml.types import Silent

BASE, ADAPTER = "b" * 64, "a" * 64
PROMPTS = [[5 + i, 6 + 3 * i % 80, 40, 7 + 11 * i % 100][: 2 + i % 3] for i in range(20)]


def some_of(shape: tuple[int, int], seed: int = 0) -> SparsePatch:
    dice = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=dice)
    return SparsePatch.of(dense * (torch.rand(shape, generator=dice) < 0.1))


@pytest.fixture
def candidate() -> Candidate:
    return Candidate(torch.zeros(4), {"model.a": some_of((16, 24)), "model.b": some_of((24, 8), seed=1)})


@pytest.fixture
def folder(candidate, tmp_path):
    save_patch(tmp_path / "patch", candidate, base_digest=BASE, adapter_digest=ADAPTER)
    return tmp_path / "patch"


def test_the_same_patch_comes_back(candidate, folder):
    back = load_patch(folder, base_digest=BASE, adapter_digest=ADAPTER)
    assert set(back) == set(candidate.beside)
    for name, patch in back.items():
        assert torch.equal(patch.dense(), candidate.beside[name].dense())
        assert patch.shape == candidate.beside[name].shape
    assert Candidate(candidate.factors, back).digest == candidate.digest
    facts = json.loads((folder / FACTS_FILE).read_text())
    assert facts["entries"] == sum(len(patch.values) for patch in back.values()) > 0


def test_the_same_patch_gives_the_same_bytes_in_whatever_order_it_comes(candidate, folder, tmp_path):
    turned = {
        name: SparsePatch(patch.rows.flip(0), patch.columns.flip(0), patch.values.flip(0), patch.shape)
        for name, patch in reversed(candidate.beside.items())
    }
    nothing = SparsePatch.of(torch.zeros(2, 3))
    turned["a module of which nothing is changed"] = nothing
    save_patch(tmp_path / "again", Candidate(candidate.factors, turned), base_digest=BASE, adapter_digest=ADAPTER)
    assert digest_folder(tmp_path / "again").digest == digest_folder(folder).digest


def test_a_patch_of_another_base_or_adapter_is_refused(folder):
    with pytest.raises(BaseModelChanged):
        load_patch(folder, base_digest=ADAPTER)
    with pytest.raises(IntegrityError, match="another adapter"):
        load_patch(folder, adapter_digest=BASE)
    assert load_patch(folder)


@pytest.mark.parametrize("name", [PATCH_FILE, FACTS_FILE])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(IntegrityError, match=name):
        load_patch(folder)


def test_one_changed_byte_of_the_weights_is_noticed(folder):
    data = bytearray((folder / PATCH_FILE).read_bytes())
    data[-1] ^= 1
    (folder / PATCH_FILE).write_bytes(data)
    with pytest.raises(IntegrityError, match="is not the file"):
        load_patch(folder)


def test_a_pickle_beside_the_patch_is_refused(folder):
    (folder / "more.pt").write_bytes(b"")
    with pytest.raises(IntegrityError, match="pickle"):
        load_patch(folder)


def forge(folder, change) -> None:
    """Changed tensors under a digest that fits them."""
    tensors = load_file(folder / PATCH_FILE)
    change(tensors, sorted(tensors)[0].removesuffix(".index"))
    save_file(tensors, folder / PATCH_FILE)
    rewrite(folder, lambda facts: facts.update(weights_sha256=digest_file(folder / PATCH_FILE).sha256))


def rewrite(folder, change) -> None:
    facts = json.loads((folder / FACTS_FILE).read_text())
    change(facts)
    (folder / FACTS_FILE).write_text(json.dumps(facts))


def put(part: str, place: int, value: float):
    def change(tensors, name):
        tensors[f"{name}.{part}"][place] = value

    return change


def twice(tensors, name):
    tensors[f"{name}.index"][1] = tensors[f"{name}.index"][0]


def as_wide(tensors, name):
    tensors[f"{name}.index"] = tensors[f"{name}.index"].long()


def as_half(tensors, name):
    tensors[f"{name}.values"] = tensors[f"{name}.values"].bfloat16()


def shorter(tensors, name):
    tensors[f"{name}.values"] = tensors[f"{name}.values"][:-1].clone()


def renamed(tensors, name):
    tensors["elsewhere.values"] = tensors.pop(f"{name}.values")


@pytest.mark.parametrize(
    "change",
    [put("index", -1, 2**30), put("index", 0, -1), put("index", 0, 2**30), twice, as_wide, as_half, shorter, renamed],
    ids=["outside", "negative", "unsorted", "twice", "int64", "bf16", "shorter", "renamed"],
)
def test_tensors_that_are_no_patch_are_refused(folder, change):
    forge(folder, change)
    with pytest.raises(IntegrityError, match=r"sparse patch|ascending|int32"):
        load_patch(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(folder, value):
    forge(folder, put("values", 0, value))
    with pytest.raises(NumericError, match="not finite"):
        load_patch(folder)


def test_a_file_that_is_no_safetensors_is_refused(folder):
    (folder / PATCH_FILE).write_bytes(b"nothing")
    rewrite(folder, lambda facts: facts.update(weights_sha256=digest_file(folder / PATCH_FILE).sha256))
    with pytest.raises(IntegrityError, match="is not safetensors"):
        load_patch(folder)


def first_module(**changes):
    def change(facts):
        facts["modules"][min(facts["modules"])].update(changes)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.update(version=2),
        lambda facts: facts.update(entries=facts["entries"] + 1),
        lambda facts: facts.update(base_sha256=None),
        lambda facts: facts.update(modules=[]),
        lambda facts: facts.update(more=1),
        lambda facts: facts.pop("adapter_sha256"),
        first_module(shape=[32]),
        first_module(shape="32x32"),
        first_module(shape=[32, 2.0]),
        first_module(shape=[2**20, 2**20]),
        first_module(entries=0),
        first_module(more=1),
    ],
)
def test_facts_that_are_not_exactly_a_patch_s_are_refused(folder, change):
    rewrite(folder, change)
    with pytest.raises(IntegrityError, match="does not describe"):
        load_patch(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_facts_that_are_no_json_object_are_refused(folder, text):
    (folder / FACTS_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(IntegrityError, match=FACTS_FILE):
        load_patch(folder)


def patch_at(rows, columns, values=(1.0, 2.0), shape=(2, 3)) -> SparsePatch:
    return SparsePatch(torch.tensor(rows), torch.tensor(columns), torch.tensor(values), shape)


@pytest.mark.parametrize(
    ("term", "fault", "message"),
    [
        (patch_at([0, 0], [1, 1]), InvalidSetting, "place twice or outside"),
        (patch_at([0, 2], [0, 0]), InvalidSetting, "place twice or outside"),
        (patch_at([0, 0], [0, 3]), InvalidSetting, "place twice or outside"),
        (patch_at([0, 1], [0, 0], (1.0, float("nan"))), NumericError, "not finite"),
        (patch_at([0, 1], [0, 0], shape=(2**16, 2**16)), InvalidSetting, "31 bits"),
        (LowRank(torch.ones(2, 1), torch.ones(1, 3)), InvalidSetting, "low-rank"),
        (SparsePatch.of(torch.zeros(2, 3)), InvalidSetting, "no sparse patch"),
    ],
)
def test_what_cannot_be_written_leaves_no_folder(tmp_path, term, fault, message):
    with pytest.raises(fault, match=message):
        save_patch(tmp_path / "patch", Candidate(torch.zeros(1), {"m": term}), base_digest=BASE, adapter_digest=ADAPTER)
    assert not (tmp_path / "patch").exists()


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_a_layer_computes_the_patch_the_same_way_whatever_its_density(tuned, share):
    name = next(pair.module_name for pair in tuned.vector.pairs() if pair.module_name.endswith("o_proj"))
    layer = tuned.model.get_submodule(name)
    dense = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    dense[torch.rand(32, 32, generator=torch.Generator().manual_seed(2)) >= share] = 0.0
    patch = SparsePatch.of(dense)
    assert (patch.density < DENSE_FROM) == (share < DENSE_FROM)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain, expected = layer(x), layer(x) + x @ dense.T
        with tuned.side.swapped({name: patch}):
            assert torch.allclose(layer(x), expected, atol=1e-5)
            with aligned(tuned):
                assert torch.equal(layer(x), layer.base_layer(x))
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("shape", ["gqa", "tied", "qkv_bias"])
def test_the_merged_model_says_what_the_candidate_says(shape, inputs, tmp_path):
    base = write_base(tmp_path / "base", shape)
    tuned = tune(load_base(base), LoraSettings(rank=4, alpha=8, target_modules=TARGETS))
    spec = RollbackSpec(form="patch", steps=3, restore_ratio=0.1, depth_ratio=1.0)
    candidate = recover(tuned, spec, inputs, Silent()).candidate
    with applied(tuned, candidate), torch.no_grad():
        ours = generate(tuned.model, tuned.tokenizer, PROMPTS, max_new_tokens=8)
        logits = tuned.model(input_ids=torch.tensor([PROMPTS[2]])).logits
    assert generate(tuned.model, tuned.tokenizer, PROMPTS, max_new_tokens=8) != ours
    save_candidate(tuned, Candidate(candidate.factors), tmp_path / "adapter")
    digests = {
        "base_digest": digest_folder(base).digest,
        "adapter_digest": digest_folder(tmp_path / "adapter").digest,
    }
    save_patch(tmp_path / "patch", candidate, **digests)
    # Beside the adapter, from disk
    patch = load_patch(tmp_path / "patch", **digests)
    back = candidate_from_disk(tuned, tmp_path / "adapter", tuned.model.get_base_model())
    assert Candidate(back.factors, patch).digest == candidate.digest
    # Merged
    loaded = load_base(base)
    merged = merge_into(load_adapter(loaded, tmp_path / "adapter"), patch)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert generate(merged, loaded.tokenizer, PROMPTS, max_new_tokens=8) == ours
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=torch.tensor([PROMPTS[2]])).logits, logits, atol=1e-4)
    # Restored weights hold the base's own numbers, up to the rounding of one sum.
    plain = dict(load_base(base).model.named_modules())
    for name, change in patch.items():
        own = name.removeprefix("base_model.model.")
        now, was = merged.get_submodule(own).weight, plain[own].weight
        assert torch.allclose(now[change.rows, change.columns], was[change.rows, change.columns], atol=1e-6)


def test_sums_are_formed_in_fp32_and_cast_once(tiny_base_folder, tiny_lora):
    tuned = tune(load_base(tiny_base_folder, dtype=torch.bfloat16), tiny_lora, size=1e-3)
    pair = tuned.vector.pairs()[0]
    layer = tuned.model.get_submodule(pair.module_name).get_base_layer()
    parts = tuned.vector.split(tuned.vector.get())
    whole = layer.weight.float() + pair.scaling * parts[pair.b_name] @ parts[pair.a_name]
    whole[3, 5] += 0.25
    change = SparsePatch(torch.tensor([3]), torch.tensor([5]), torch.tensor([0.25]), tuple(whole.shape))
    merge_into(tuned.model, {pair.module_name: change})
    assert torch.equal(layer.weight, whole.bfloat16())


def test_a_patch_of_another_model_is_refused_before_anything_is_written(tuned):
    before = [parameter.clone() for parameter in tuned.model.parameters()]
    name = tuned.vector.pairs()[0].module_name
    for patch in ({"elsewhere": some_of((32, 32))}, {name: patch_at([0, 1], [0, 0])}):
        with pytest.raises(IntegrityError, match=r"does not sit on elsewhere|has the shape"):
            merge_into(tuned.model, patch)
    assert all(map(torch.equal, before, tuned.model.parameters()))


class PackedLinear(torch.nn.Linear):
    """As quantised layers are: a subclass, whatever its weight looks like."""


def test_quantised_weights_are_refused(tuned):
    layer = tuned.model.get_submodule(tuned.vector.pairs()[3].module_name).get_base_layer()
    layer.__class__ = PackedLinear
    with pytest.raises(UnsupportedAdapter, match="PackedLinear"):
        merge_into(tuned.model, {})
    layer.__class__ = torch.nn.Linear
    layer.weight.data = layer.weight.data.to(torch.int8)
    with pytest.raises(UnsupportedAdapter, match="int8"):
        merge_into(tuned.model, {})


def test_a_sum_that_overflows_the_weights_is_an_error(tiny_base_folder, tiny_lora):
    tuned = tune(load_base(tiny_base_folder, dtype=torch.float16), tiny_lora)
    name = tuned.vector.pairs()[0].module_name
    shape = tuple(tuned.model.get_submodule(name).get_base_layer().weight.shape)
    change = SparsePatch(torch.tensor([0]), torch.tensor([0]), torch.tensor([1e6]), shape)
    with pytest.raises(NumericError, match="cannot hold"):
        merge_into(tuned.model, {name: change})
