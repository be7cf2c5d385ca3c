"""What every recovery method owes, whatever its mathematics (oracle O15): one suite over the whole registry."""

import dataclasses
import json
from hashlib import sha256

import pytest
import torch
from peft import PeftModel

from workers.ml.checkpoints import load_base, save_adapter
from workers.ml.errors import Cancelled, MissingInput, NumericError
from workers.ml.evals.generate import generate
from workers.ml.recovery.dial import RecoveryInputs
from workers.ml.recovery.run import load_method, prepare, recover
from workers.ml.recovery.specs import SPECS, AnchoredPatchSpec, method_name, parse_spec
from workers.ml.types import Silent

FAST = {AnchoredPatchSpec: {"steps": 3, "refusal_rows": 4, "task_rows": 3, "retention_rows": 3}}


def small(spec_class, **knobs):
    return spec_class(**{**FAST.get(spec_class, {}), **knobs})


def strength_of(spec_class) -> float:
    return spec_class.grid[1]


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


@every_method
def test_the_implementation_resolves_and_the_spec_survives_json(spec_class):
    assert callable(load_method(spec_class))
    spec = spec_class()
    assert parse_spec(json.loads(spec.model_dump_json())) == spec
    assert list(spec.strengths) == sorted(spec.strengths)
    assert spec.strengths[0] > 0


@every_method
def test_the_same_seed_gives_the_same_bytes_and_nothing_else_moves(spec_class, tuned, inputs):
    raw, outside = tuned.vector.get(), tensors_outside(tuned)
    mode, flags = tuned.model.training, [p.requires_grad for p in tuned.vector.parameters()]
    spec = small(spec_class, strength=strength_of(spec_class))
    first = recover(tuned, spec, inputs, Silent())
    moved = tuned.vector.get()
    tuned.vector.set(raw)
    second = recover(tuned, spec, inputs, Silent())
    assert torch.equal(tuned.vector.get(), moved)
    assert first.digest_after == second.digest_after != first.digest_before
    assert not torch.equal(moved, raw)
    assert moved.dtype == torch.float32
    assert bool(torch.isfinite(moved).all())
    assert tensors_outside(tuned) == outside
    assert (tuned.model.training, [p.requires_grad for p in tuned.vector.parameters()]) == (mode, flags)


@every_method
def test_strength_zero_is_the_raw_adapter_bit_for_bit(spec_class, tuned, inputs):
    raw = tuned.vector.get()
    path = prepare(tuned, small(spec_class), inputs, Silent())
    assert torch.equal(path.at(0.0), raw)
    assert torch.equal(tuned.vector.get(), raw)
    report = recover(tuned, small(spec_class, strength=0), inputs, Silent())
    assert report.digest_before == report.digest_after
    assert report.relative_change == 0.0
    with pytest.raises(NumericError, match="negative"):
        path.at(-0.1)


@every_method
def test_a_stronger_dial_moves_the_weights_further(spec_class, tuned, inputs):
    spec = small(spec_class)
    path = prepare(tuned, spec, inputs, Silent())
    distances = [float((path.at(s) - path.at(0.01 * spec.strengths[0])).norm()) for s in spec.strengths]
    assert distances == sorted(distances)
    assert distances[0] < distances[-1]


@every_method
def test_a_cancel_takes_effect_within_one_tick_and_leaves_the_raw_adapter(spec_class, tuned, inputs):
    raw, outside = tuned.vector.get(), tensors_outside(tuned)
    listener = StopsAt(10**9)
    recover(tuned, small(spec_class), inputs, listener)
    tuned.vector.set(raw)
    assert listener.heard >= 2
    for tick in range(1, listener.heard + 1):
        stopper = StopsAt(tick)
        with pytest.raises(Cancelled):
            recover(tuned, small(spec_class), inputs, stopper)
        assert stopper.heard == tick
        assert torch.equal(tuned.vector.get(), raw)
    assert tensors_outside(tuned) == outside


@every_method
def test_the_report_survives_json(spec_class, tuned, inputs):
    report = dataclasses.asdict(recover(tuned, small(spec_class), inputs, Silent()))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["method"] == method_name(spec_class)
    assert report["seconds"] > 0
    assert report["relative_change"] > 0


@every_method
def test_a_declared_need_that_is_missing_is_named(spec_class, tuned, inputs):
    raw = tuned.vector.get()
    for need in spec_class.needs - {"aligned"}:
        with pytest.raises(MissingInput, match=need) as caught:
            recover(tuned, small(spec_class), dataclasses.replace(inputs, **{need: ()}), Silent())
        assert caught.value.param == need
        assert torch.equal(tuned.vector.get(), raw)
    if not spec_class.needs:
        recover(tuned, small(spec_class), RecoveryInputs(), Silent())


@every_method
def test_stock_peft_loads_the_result_and_says_the_same(spec_class, tuned, inputs, tmp_path, tiny_base_folder):
    recover(tuned, small(spec_class, strength=strength_of(spec_class)), inputs, Silent())
    prompts = [[5, 6, 7], [8, 9], [40, 41, 42, 43], [99]]
    ours = generate(tuned.model, tuned.tokenizer, prompts, max_new_tokens=8)
    save_adapter(tuned.model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(load_base(tiny_base_folder).model, str(tmp_path / "adapter"))
    assert generate(stock, tuned.tokenizer, prompts, max_new_tokens=8) == ours


@pytest.mark.parametrize("shape", ["tied", "qkv_bias"])
def test_every_method_runs_on_other_shapes(shape, tuned_shape, inputs):
    tuned = tuned_shape(shape)
    raw, outside = tuned.vector.get(), tensors_outside(tuned)
    for spec_class in SPECS:
        recover(tuned, small(spec_class, strength=strength_of(spec_class)), inputs, Silent())
        assert not torch.equal(tuned.vector.get(), raw)
        tuned.vector.set(raw)
    assert tensors_outside(tuned) == outside
