"""Panacea inside training: oracle O4 step by step, the published algorithm by hand, and how it fails."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch import nn

from tests.ml.recovery.conftest import rows_for_recovery
from tests.ml.tuning.test_steps import gradient_by_hand
from workers.ml.chat import EncodedRow, encode_rows
from workers.ml.checkpoints import attach_adapter, load_base
from workers.ml.data import batches, endless_batches
from workers.ml.errors import Cancelled, MissingInput, NumericError
from workers.ml.recovery.calibration import encode_answers
from workers.ml.recovery.dial import RecoveryInputs
from workers.ml.recovery.methods.panacea_train import PanaceaTraining
from workers.ml.recovery.run import step_method
from workers.ml.recovery.specs import TRAINING_SPECS, PanaceaTrainSpec, method_name, parse_training_spec
from workers.ml.settings import LoraSettings, TuningSettings
from workers.ml.tuned_model import TunedModel
from workers.ml.tuning.loop import Run, TrainingData
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.tuning.metrics import METRICS_FILE, MetricsFiles
from workers.ml.tuning.objective import WindowLoss
from workers.ml.tuning.steps import PlainStep, StepContext
from workers.ml.types import Silent

CUSTOMER, HARMFUL = EncodedRow([0, 1], [0.0, 1.0], 1), EncodedRow([0, 1, 2], [0.0, 1.0, 1.0], 2)


# ---------------------------------------------------------------- O4: two bowls


class Bowls:
    """An objective of two numbers: g = |w - (1, 0)|^2 / 2 for the customer's row, h = |w|^2 / 2 for the harmful one."""

    def __init__(self, vector: LoraVector) -> None:
        self._vector = vector
        self.asked: list[tuple[float, ...]] = []
        self.broken_from = math.inf  # h is not finite at this distance from 0

    def loss_into_grad(self, rows):
        centre = torch.tensor([1.0, 0.0]) if rows[0] is CUSTOMER else torch.zeros(2)
        offset = self._vector.get() - centre
        self.asked.append(tuple(self._vector.get().tolist()))
        self._vector.set_grad(offset)
        loss = 0.5 * float(offset.square().sum())
        if rows[0] is HARMFUL and float(offset.norm()) >= self.broken_from:
            loss = math.inf
        return WindowLoss(loss, 0.0, 1, 1)


@pytest.fixture
def bowls():
    """A LoRA of two factors, A = 3 and B = 4, and a context in which to take a step."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x):
            return self.layer(x)

    model = get_peft_model(Net(), LoraConfig(r=1, lora_alpha=1, target_modules=["layer"]))
    vector = LoraVector(model)
    vector.set(torch.tensor([3.0, 4.0]))
    settings = TuningSettings(
        n_epochs=1, batch_size=1, learning_rate=0.1, seed=0, context_limit=8, lora=LoraSettings(target_modules=())
    )
    tuned = TunedModel(model, None, vector, 8)
    return tuned, StepContext([CUSTOMER], 0, 1, vector, Bowls(vector), settings)


def on_bowls(bowls, **knobs):
    """The step method on the bowls, and the first step it gives."""
    tuned, context = bowls
    spec = PanaceaTrainSpec(**{"rho": 1.0, "rho_unit": "absolute", "weight": 0.1, "loss_bound": 100, **knobs})
    method = PanaceaTraining(tuned, spec, [HARMFUL], Silent())
    return method, method.gradient(context), context


def test_one_step_on_a_quadratic_matches_the_oracle(bowls):
    _, found, context = on_bowls(bowls)
    assert found.grad.tolist() == pytest.approx([1.94, 3.92])
    assert found.loss.loss == pytest.approx(10.0), "the reported loss is g at w, not h at w + eps"
    assert found.facts["harmful_loss"] == pytest.approx(12.5)
    assert found.facts["harmful_loss_perturbed"] == pytest.approx(18.0)
    assert found.facts["harmful_gradient_norm"] == pytest.approx(5.0)
    assert found.facts["perturbation_norm"] == pytest.approx(1.0)
    assert found.facts["lambda_term_norm"] == pytest.approx(0.1)
    assert found.facts["lambda_term_left_out"] == 0
    assert context.objective.asked == [(3, 4), (3, 4), (pytest.approx(3.6), pytest.approx(4.8))]
    assert context.vector.get().tolist() == [3, 4]


@pytest.mark.parametrize(("recompute", "released"), [(False, [3.406, 4.408]), (True, [3.41991, 4.397376])])
def test_what_is_released_matches_the_oracle_as_published_and_recomputed(bowls, recompute, released):
    method, found, context = on_bowls(bowls, recompute_at_end=recompute)
    context.vector.add_(found.grad, -0.1)
    assert context.vector.get().tolist() == pytest.approx([2.806, 3.608])
    method.finish(context)
    assert context.vector.get().tolist() == pytest.approx(released, abs=1e-5)


def test_lambda_0_trains_as_without_the_method_and_still_adds_the_perturbation(bowls):
    method, found, context = on_bowls(bowls, weight=0.0)
    assert found.grad.tolist() == [2, 4]
    method.finish(context)
    assert context.vector.get().tolist() == pytest.approx([3.6, 4.8])


def test_rho_0_leaves_the_step_and_the_weights_as_they_are_bit_for_bit(bowls):
    method, found, context = on_bowls(bowls, rho=0.0)
    assert found.grad.tolist() == [2, 4]
    assert found.facts["lambda_term_norm"] == 0.0
    method.finish(context)
    assert context.vector.get().tolist() == [3, 4]


def test_a_perturbed_loss_above_the_bound_leaves_the_term_out_and_never_descends_on_harm(bowls):
    _, found, _ = on_bowls(bowls, loss_bound=5.0)
    assert found.grad.tolist() == [2, 4], "clamped before differentiation it would be (2.3, 4.4), which teaches harm"
    assert found.facts["lambda_term_left_out"] == 1
    assert found.facts["harmful_loss_perturbed"] == pytest.approx(18.0)


def test_a_perturbed_loss_that_is_not_finite_leaves_the_term_out_and_reaches_no_metric(bowls):
    bowls[1].objective.broken_from = 5.5
    _, found, _ = on_bowls(bowls)
    assert found.grad.tolist() == [2, 4]
    assert "harmful_loss_perturbed" not in found.facts
    json.dumps(dict(found.facts), allow_nan=False)


def test_a_harmful_gradient_of_zero_is_an_error_and_moves_nothing(bowls):
    bowls[0].vector.set(torch.zeros(2))
    with pytest.raises(NumericError, match="no direction"):
        on_bowls(bowls)
    assert bowls[0].vector.get().tolist() == [0, 0]


def test_a_relative_rho_is_a_share_of_the_factors_as_they_are_at_the_step(bowls):
    _, found, _ = on_bowls(bowls, rho=0.2, rho_unit="relative")
    assert found.facts["perturbation_norm"] == pytest.approx(0.2 * 5)


def test_without_a_step_there_is_no_last_perturbation(bowls):
    tuned, context = bowls
    method = PanaceaTraining(tuned, PanaceaTrainSpec(recompute_at_end=False), [HARMFUL], Silent())
    with pytest.raises(NumericError, match="no training step"):
        method.finish(context)


# ---------------------------------------------------------------- on a model


@pytest.fixture
def settings(tiny_lora: LoraSettings) -> TuningSettings:
    return TuningSettings(
        n_epochs=1, batch_size=4, learning_rate=1e-2, schedule="constant", warmup_ratio=0.0, max_grad_norm=1e9,
        seed=3, context_limit=256, lora=tiny_lora,
    )  # fmt: skip


@pytest.fixture
def make(tiny_base_folder, tiny_rows, settings):
    """A training of the tiny base on sixteen rows: what the loop needs, and what the method needs."""

    def build(progress=None, **lora):
        base = load_base(tiny_base_folder)
        chosen = settings.model_copy(update={"lora": settings.lora.model_copy(update=lora)})
        model = attach_adapter(base, chosen.lora, seed=1)
        rows = encode_rows(base.tokenizer, tiny_rows, max_tokens=256)
        run = Run(model, TrainingData(rows), settings=chosen, progress=progress)
        noise = torch.randn(run.vector.numel, generator=torch.Generator().manual_seed(2))
        run.vector.set(run.vector.get() + 0.05 * noise)
        return run, TunedModel(model, base.tokenizer, run.vector, 256)

    return build


def method_for(tuned, progress=None, **knobs):
    spec = PanaceaTrainSpec(
        **{"rho": 0.5, "rho_unit": "absolute", "weight": 0.1, "batch_rows": 2, "loss_bound": 1000, **knobs}
    )
    return step_method(tuned, spec, rows_for_recovery(), progress or Silent())


@pytest.mark.parametrize("recompute", [False, True], ids=["published", "recomputed"])
def test_a_training_is_the_published_algorithm_computed_by_hand(make, tiny_base_folder, settings, recompute):
    run, tuned = make()
    harmful, rows = encode_answers(tuned, rows_for_recovery().harmful), run._data.rows
    reference = attach_adapter(load_base(tiny_base_folder), settings.lora, seed=1)
    w = torch.nn.Parameter(run.vector.get())
    optimizer = torch.optim.AdamW([w], lr=settings.learning_rate, weight_decay=0.0)
    stream = endless_batches(harmful, batch_size=2, seed=0)
    for batch in batches(rows, batch_size=4, seed=3, epoch=0):
        evil = next(stream)
        g, h = (gradient_by_hand(reference, run.vector.names, w.detach(), part) for part in (batch, evil))
        epsilon = 0.5 * h / h.norm()
        there = gradient_by_hand(reference, run.vector.names, w.detach() + epsilon, evil)
        w.grad = g - 0.1 * (there - h)
        optimizer.step()
    if recompute:
        h = gradient_by_hand(reference, run.vector.names, w.detach(), harmful)
        epsilon = 0.5 * h / h.norm()
    assert run.walk(method_for(tuned, recompute_at_end=recompute)).steps == 4
    assert torch.allclose(run.vector.get(), w.detach() + epsilon, atol=5e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_with_rho_0_a_whole_training_has_the_bytes_of_an_ordinary_one(make, dropout):
    bytes_of = {}
    for name in ("plain", "panacea"):
        run, tuned = make(dropout=dropout)
        run.walk(PlainStep() if name == "plain" else method_for(tuned, rho=0.0, weight=10.0))
        bytes_of[name] = run.vector.get()
    assert torch.equal(bytes_of["plain"], bytes_of["panacea"])


def test_the_same_seed_gives_the_same_bytes_and_another_an_other_order(make):
    found = []
    for seed in (0, 0, 1):
        run, tuned = make()
        run.walk(method_for(tuned, seed=seed, recompute_at_end=False))
        found.append(run.vector.get())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_every_term_is_logged_beside_the_customers_loss(make, tmp_path):
    with MetricsFiles(tmp_path, Silent()) as metrics:
        run, tuned = make(progress=metrics)
        plain_losses = run.objective.loss(run._data.rows)
        run.walk(method_for(tuned))
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert line["perturbation_norm"] == pytest.approx(0.5, rel=1e-5)
        assert line["harmful_loss_perturbed"] > line["harmful_loss"] > 0
        assert line["harmful_gradient_norm"] > 0 and line["lambda_term_norm"] > 0
        assert line["lambda_term_left_out"] == 0
    assert lines[0]["train_loss"] == pytest.approx(plain_losses.loss, rel=0.2)


def test_an_error_in_the_perturbed_forward_leaves_the_weights_of_the_last_step(make):
    run, tuned = make()
    before, forward, calls = run.vector.get(), run.objective.model.forward, []
    rows = run._data.rows[:2]
    inside = {}

    def breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            inside["weights"] = run.vector.get()
            raise RuntimeError("half-way")
        return forward(*args, **kwargs)

    run.objective.model.forward = breaks
    context = StepContext(rows, 0, 1, run.vector, run.objective, run._settings)
    with pytest.raises(RuntimeError, match="half-way"):
        method_for(tuned).gradient(context)
    assert not torch.equal(inside["weights"], before)
    assert torch.equal(run.vector.get(), before)


class StopsAt(Silent):
    """Cancels at the n-th tick of either kind."""

    def __init__(self, tick: int) -> None:
        self.left = tick

    def step(self, step, total_steps, **values) -> None:
        self.left -= 1
        if self.left == 0:
            raise Cancelled("stop")

    def event(self, message, *, level="info", **data) -> None:
        self.step(1, 1)


def test_a_cancel_while_the_last_perturbation_is_taken_adds_nothing_of_it(make):
    run, tuned = make()
    run.walk(method_for(tuned, recompute_at_end=True, rho=0.0))
    trained = run.vector.get()
    for tick in (1, 2):  # the gradient over all rows, and the event before the weights move
        run, tuned = make()
        with pytest.raises(Cancelled):
            run.walk(method_for(tuned, StopsAt(tick), weight=0.0))
        assert torch.equal(run.vector.get(), trained)


def test_a_cancel_between_steps_leaves_the_weights_of_the_last_complete_step(make):
    run, tuned = make(progress=StopsAt(2))
    with pytest.raises(Cancelled):
        run.walk(method_for(tuned))
    assert bool(torch.isfinite(run.vector.get()).all())
    assert tuned.model.training is run._model.training


def test_harmful_gradients_are_taken_without_dropout_and_training_goes_on_with_it(make):
    run, tuned = make(dropout=0.5)
    tuned.model.train()
    context = StepContext(run._data.rows[:4], 0, 1, run.vector, run.objective, run._settings)
    first, second = (method_for(tuned, rho=0.1).gradient(context).facts["harmful_loss"] for _ in range(2))
    assert first == second
    assert tuned.model.training


# ---------------------------------------------------------------- the registry


def test_a_training_without_harmful_rows_is_refused_before_it_begins(make):
    _, tuned = make()
    with pytest.raises(MissingInput, match="'panacea-train' needs harmful rows") as caught:
        step_method(tuned, PanaceaTrainSpec(), RecoveryInputs(), Silent())
    assert caught.value.param == "harmful"


@pytest.mark.parametrize("spec_class", TRAINING_SPECS, ids=method_name)
def test_training_specs_survive_json_and_are_bounded(spec_class):
    spec = spec_class()
    assert parse_training_spec(json.loads(spec.model_dump_json())) == spec
    assert spec.required_inputs() <= {"harmful", "refusals", "retention"}
    for name, field in spec_class.model_fields.items():
        if field.annotation in {int, float}:
            for number in (1e15, float("inf"), float("nan")):
                with pytest.raises(ValidationError, match=name):
                    parse_training_spec({"method": method_name(spec_class), name: number})
