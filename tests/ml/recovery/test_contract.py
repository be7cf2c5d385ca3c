"""What every recovery method owes, whatever its mathematics (oracle O15): one suite over the whole registry."""

import dataclasses
import json
from hashlib import sha256

import pytest
import torch
from peft import PeftModel

from tests.ml.conftest import TARGETS
from tests.ml.recovery.conftest import rows_for_recovery, tune
from workers.ml.candidate import Candidate, applied
from workers.ml.candidate_folder import candidate_from_disk, save_candidate
from workers.ml.checkpoints import load_base
from workers.ml.errors import Cancelled, InvalidSetting, MissingInput, NumericError
from workers.ml.evals.generate import generate
from workers.ml.recovery.deltas import relative_change
from workers.ml.recovery.dial import RecoveryInputs
from workers.ml.recovery.run import load_method, prepare, recover
from workers.ml.recovery.specs import (
    SPECS,
    AnchoredPatchSpec,
    AntidoteDeltaSpec,
    ComposeSpec,
    RestaSpec,
    RollbackSpec,
    SafeDeltaSpec,
    SafetyPatchSpec,
    ScaleDownSpec,
    method_name,
    parse_spec,
)
from workers.ml.settings import LoraSettings
from workers.ml.types import Silent

PATCH = {"steps": 3, "refusal_rows": 4, "task_rows": 3, "retention_rows": 3}
FAST = {
    AnchoredPatchSpec: PATCH,
    SafetyPatchSpec: PATCH,
    ComposeSpec: {"parts": (ScaleDownSpec(strength=0.5), AnchoredPatchSpec(**PATCH))},
    RestaSpec: {"steps": 3, "rank": 2},
    # Nine short rows excite few directions; with little damping what makes up for a column is larger than the column.
    SafeDeltaSpec: {"damping": 1.0},
    RollbackSpec: {"steps": 3, "restore_ratio": 0.02},
}
SHAPES = ("gqa", "tied", "qkv_bias")
# The same method with its result in another form is another promise.
FORMS = [
    *SPECS,
    *(pytest.param((spec, "patch"), id=f"{method_name(spec)}-patch") for spec in (AntidoteDeltaSpec, RollbackSpec)),
]


def small(spec_class, **knobs):
    if isinstance(spec_class, tuple):
        spec_class, knobs["form"] = spec_class
    return spec_class(**{**FAST.get(spec_class, {}), **knobs})


def strength_of(spec_class) -> float:
    return small(spec_class).grid[1]


def tensors_outside(tuned) -> str:
    """Digest of everything but the adapter's factors."""
    known, digest = set(tuned.vector.names), sha256()
    for name, tensor in [*tuned.model.named_parameters(), *tuned.model.named_buffers()]:
        if name not in known:
            digest.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class StopsAt(Silent):
    """Cancels at the n-th tick and counts how many were heard."""

    def __init__(self, tick: int) -> None:
        self.left, self.heard = tick, 0

    def step(self, step, total_steps, **values) -> None:
        self.heard += 1
        self.left -= 1
        if self.left <= 0:
            raise Cancelled("stop")


every_method = pytest.mark.parametrize("spec_class", SPECS, ids=method_name)
every_form = pytest.mark.parametrize("spec_class", FORMS, ids=method_name)


@every_method
def test_the_implementation_resolves_and_the_spec_survives_json(spec_class):
    assert callable(load_method(spec_class))
    spec = spec_class()
    assert parse_spec(json.loads(spec.model_dump_json())) == spec
    assert list(spec.strengths) == sorted(spec.strengths)
    assert spec.strengths[0] > 0
    assert spec.required_inputs() <= {"harmful", "refusals", "retention", "task", "aligned", "pretrained"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("shape", SHAPES)
@every_form
def test_the_same_seed_gives_the_same_bytes_and_nothing_else_moves(
    spec_class, shape, rank, dtype, base_folders, pretrained_folders
):
    lora = LoraSettings(rank=rank, alpha=2 * rank, target_modules=TARGETS)
    tuned = tune(load_base(base_folders(shape), dtype=dtype), lora)
    inputs = dataclasses.replace(rows_for_recovery(), pretrained=pretrained_folders(shape))
    raw, outside = tuned.vector.get(), tensors_outside(tuned)
    mode, flags = tuned.model.training, [p.requires_grad for p in tuned.vector.parameters()]
    spec = small(spec_class, strength=strength_of(spec_class))
    first, second = (recover(tuned, spec, inputs, Silent()) for _ in range(2))
    assert first.report.digest_after == second.report.digest_after != first.report.digest_before
    assert first.candidate.is_finite()
    assert all(tensor.dtype == torch.float32 for tensor in first.candidate.tensors() if tensor.is_floating_point())
    assert first.candidate.is_adapter == (spec.output != "sparse-patch")
    assert bool(first.candidate.extra_rank) == (spec.output == "larger-adapter")
    assert torch.equal(tuned.vector.get(), raw)
    assert tensors_outside(tuned) == outside
    assert (tuned.model.training, [p.requires_grad for p in tuned.vector.parameters()]) == (mode, flags)


@every_form
def test_strength_zero_is_the_raw_adapter_bit_for_bit(spec_class, tuned, inputs):
    raw = tuned.vector.get()
    path = prepare(tuned, small(spec_class), inputs, Silent())
    assert path.at(0.0).digest == Candidate(raw).digest
    assert torch.equal(tuned.vector.get(), raw)
    report = recover(tuned, small(spec_class, strength=0), inputs, Silent()).report
    assert report.digest_before == report.digest_after
    assert report.relative_change == 0.0
    with pytest.raises(NumericError, match="negative"):
        path.at(-0.1)


@every_form
def test_a_stronger_dial_moves_the_weights_further(spec_class, tuned, inputs):
    raw = tuned.vector.get()
    spec = small(spec_class)
    path = prepare(tuned, spec, inputs, Silent())
    distances = [relative_change(tuned.vector, path.at(s), raw) for s in spec.strengths]
    assert distances == sorted(distances)
    assert distances[0] < distances[-1]


@every_form
def test_a_cancel_takes_effect_within_one_tick_and_leaves_the_raw_adapter(spec_class, tuned, inputs):
    raw, outside = tuned.vector.get(), tensors_outside(tuned)
    listener = StopsAt(10**9)
    recover(tuned, small(spec_class), inputs, listener)
    assert listener.heard >= 2
    for tick in range(1, listener.heard + 1):
        stopper = StopsAt(tick)
        with pytest.raises(Cancelled):
            recover(tuned, small(spec_class), inputs, stopper)
        assert stopper.heard == tick
        assert torch.equal(tuned.vector.get(), raw)
    assert tensors_outside(tuned) == outside


@every_form
def test_the_report_survives_json(spec_class, tuned, inputs):
    report = dataclasses.asdict(recover(tuned, small(spec_class), inputs, Silent()).report)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["method"] == small(spec_class).method
    assert report["seconds"] > 0
    assert report["relative_change"] > 0


@every_form
def test_a_declared_need_that_is_missing_is_named(spec_class, tuned, inputs):
    raw, spec = tuned.vector.get(), small(spec_class)
    for need in spec.required_inputs() - {"aligned"}:
        nothing = None if need == "pretrained" else ()
        with pytest.raises(MissingInput, match="before alignment" if need == "pretrained" else need) as caught:
            recover(tuned, spec, dataclasses.replace(inputs, **{need: nothing}), Silent())
        assert caught.value.param == need
        assert torch.equal(tuned.vector.get(), raw)
    if not spec.required_inputs():
        recover(tuned, spec, RecoveryInputs(), Silent())


@every_form
def test_an_adapter_that_changes_nothing_is_refused_or_left_alone(spec_class, tuned, inputs):
    """Every factor B is zero, as before training: no method may end in NaN or find something to repair."""
    values = tuned.vector.get()
    for pair in tuned.vector.pairs():
        tuned.vector.split(values)[pair.b_name].zero_()
    tuned.vector.set(values)
    refused = None
    try:
        assert recover(tuned, small(spec_class), inputs, Silent()).candidate.is_finite()
    except NumericError as error:
        refused = str(error)
    assert refused is None or "zero" in refused or "no " in refused
    assert torch.equal(tuned.vector.get(), values)


@every_form
def test_stock_peft_loads_the_result_and_says_the_same(spec_class, tuned, inputs, tmp_path, tiny_base_folder):
    candidate = recover(tuned, small(spec_class, strength=strength_of(spec_class)), inputs, Silent()).candidate
    if not candidate.is_adapter:
        with pytest.raises(InvalidSetting, match="sparse patch"):
            save_candidate(tuned, candidate, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
        return
    prompts = [[5 + i, 6 + 3 * i % 80, 40, 7 + 11 * i % 100][: 2 + i % 3] for i in range(20)]
    with applied(tuned, candidate):
        ours = generate(tuned.model, tuned.tokenizer, prompts, max_new_tokens=8)
    save_candidate(tuned, candidate, tmp_path / "adapter")
    back = candidate_from_disk(tuned, tmp_path / "adapter", tuned.model.get_base_model())
    with applied(tuned, back):
        assert generate(tuned.model, tuned.tokenizer, prompts, max_new_tokens=8) == ours
    stock = PeftModel.from_pretrained(load_base(tiny_base_folder).model, str(tmp_path / "adapter"))
    assert generate(stock, tuned.tokenizer, prompts, max_new_tokens=8) == ours
