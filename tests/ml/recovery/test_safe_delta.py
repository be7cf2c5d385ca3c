"""Safe Delta: two columns by hand, the optimal compensation against a plain solver, and both ends of the dial."""

import pytest
import torch

from workers.ml.errors import NumericError
from workers.ml.recovery.calibration import encode_answers
from workers.ml.recovery.methods import safe_delta
from workers.ml.recovery.methods.safe_delta import Curvature, solved
from workers.ml.recovery.specs import SafeDeltaSpec
from workers.ml.tuned_model import aligned
from workers.ml.types import Silent

# With the damping taken off its diagonal: what is solved with is [[2, 1], [1, 1]], whose inverse is [[1, -1], [-1, 2]].
DAMPING = 0.5
HESSIAN = torch.tensor([[1.5, 1], [1, 0.5]], dtype=torch.float64)
DELTA = torch.tensor([[2.0, 1], [4, -2]])


def by_hand(strength: float, **knobs) -> tuple[list[list[float]], safe_delta.Solved]:
    spec = SafeDeltaSpec(damping=DAMPING, **knobs)
    found = solved(torch.eye(2), DELTA, Curvature(HESSIAN, DAMPING), spec, strength=strength, scaling=1.0)
    return found.A.tolist(), found


def test_two_columns_by_hand():
    """Costs are 20 / 2 = 10 and 5 / 4 = 1.25, and the second column comes first."""
    weights, found = by_hand(0.8)  # a budget of 0.2 * 11.25 = 2.25
    assert (found.columns, found.kept_share) == (1, pytest.approx(0.2))
    assert weights == [pytest.approx([-0.5, 1]), pytest.approx([1, -2])]  # the other: -H_01 / H_00 times the kept
    assert by_hand(0.8, compensate=False)[0] == [pytest.approx([0, 1]), pytest.approx([0, -2])]
    assert by_hand(0.9)[0] == [[0, 0], [0, 0]]  # 1.125 is too little for 1.25
    assert by_hand(0.0)[0] == DELTA.tolist()


def test_the_published_budget_does_not_know_the_size_of_the_update():
    """s times 0.375, the mean of 1 / (2 [H^-1])."""
    assert by_hand(1 / (1 + 3.4), budget="published")[1].columns == 1  # 1.275
    assert by_hand(1 / (1 + 3.3), budget="published")[1].columns == 0  # 1.2375
    assert by_hand(1 / (1 + 31), budget="published")[1].columns == 2  # 11.625


def test_the_compensation_is_the_least_change_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    curvature = Curvature(2 * X.T @ X, 1e-9)
    A = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    kept = torch.tensor([1, 4, 5])
    found = curvature.compensated(A, kept)
    assert torch.equal(found[:, kept], A[:, kept])
    rest = torch.tensor([0, 2, 3])
    best = -torch.linalg.lstsq(X[:, rest], X[:, kept] @ A[:, kept].T).solution.T
    assert torch.allclose(found[:, rest], best, atol=1e-6)
    # The same from the inverse: what optimal brain surgeon writes.
    inverse = torch.linalg.inv(2 * X.T @ X)
    surgeon = A[:, kept] @ torch.linalg.inv(inverse[kept][:, kept]) @ inverse[kept]
    assert torch.allclose(found, surgeon, atol=1e-6)


def test_hessians_are_those_of_the_aligned_bases_inputs(tuned, inputs):
    rows = encode_answers(tuned, inputs.refusals)
    pair = tuned.vector.pairs()[5]
    seen = []
    handle = tuned.model.get_submodule(pair.module_name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0])
    )
    with aligned(tuned), torch.no_grad():
        for row in rows:
            tuned.model(input_ids=torch.tensor([row.input_ids]))
    handle.remove()
    X = torch.cat(seen).double()
    found = safe_delta._hessians(tuned, [pair], rows, Silent())[pair.module_name]
    assert found.dtype == torch.float64
    assert torch.allclose(found, 2 / len(rows) * X.T @ X, rtol=1e-3, atol=1e-4)


def test_strength_one_is_the_aligned_model_and_a_small_strength_the_raw_adapter(tuned, inputs):
    path = safe_delta.prepare(tuned, SafeDeltaSpec(budget="published", dial=(1e-6, 1.0)), inputs, Silent())
    nothing, everything = path.at(1.0), path.at(1e-6)
    parts = tuned.vector.split(nothing.factors)
    assert not any(bool(parts[pair.a_name].any()) for pair in tuned.vector.pairs())
    assert torch.equal(everything.factors, path.raw)
    assert path.facts_of(1.0)["kept_columns_share"] == 0.0
    assert path.facts_of(1e-6)["kept_energy_share"] == 1.0


def test_a_strength_outside_the_dial_is_solved_when_it_is_asked_for(tuned, inputs):
    path = safe_delta.prepare(tuned, SafeDeltaSpec(dial=(0.9,)), inputs, Silent())
    planned = safe_delta.prepare(tuned, SafeDeltaSpec(dial=(0.8,)), inputs, Silent())
    with tuned.vector.swapped(torch.zeros_like(path.raw)):  # wherever the adapter stands by then
        late = path.at(0.8)
    assert late.digest == planned.at(0.8).digest
    assert path.facts_of(0.8) == planned.facts_of(0.8)


def test_layers_beyond_the_memory_take_passes_of_their_own(tuned, inputs, monkeypatch):
    whole = safe_delta.prepare(tuned, SafeDeltaSpec(), inputs, Silent()).at(0.2)
    monkeypatch.setattr(safe_delta, "HESSIAN_BYTES", 3 * 8 * 32**2)
    assert safe_delta.prepare(tuned, SafeDeltaSpec(), inputs, Silent()).at(0.2).digest == whole.digest


def test_inputs_that_carry_nothing_fail_loudly():
    with pytest.raises(NumericError, match="no curvature"):
        Curvature(torch.zeros(3, 3, dtype=torch.float64), 0.01)


def test_a_layer_that_no_forward_reaches_fails_loudly(tuned, inputs, monkeypatch):
    monkeypatch.setattr(safe_delta, "pieces_of", lambda *_: [])
    with pytest.raises((NumericError, KeyError)):
        safe_delta.prepare(tuned, SafeDeltaSpec(), inputs, Silent())
