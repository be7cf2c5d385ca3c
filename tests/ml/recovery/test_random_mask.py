"""Random masks count as the methods they control: factors as antidote, entries as antidote-delta, components as -rank."""

import pytest
import torch
from pydantic import ValidationError

from workers.ml.recovery.methods import antidote, antidote_delta, antidote_rank, random_mask
from workers.ml.recovery.specs import AntidoteDeltaSpec, AntidoteRankSpec, AntidoteSpec, RandomMaskSpec
from workers.ml.types import Silent

ENDS = (0.05, 0.3)


def path_of(tuned, inputs, **knobs):
    return random_mask.prepare(tuned, RandomMaskSpec(**knobs), inputs, Silent())


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("granularity", ["row", "tensor", "global"])
def test_as_many_factor_weights_as_antidote(tuned, inputs, granularity, compat):
    knobs = {"granularity": granularity, "compat": compat}
    scored = antidote.prepare(tuned, AntidoteSpec(**knobs), inputs, Silent())
    for strength in ENDS:
        found = path_of(tuned, inputs, **knobs).facts_at(strength)["pruned"]
        assert found == scored.facts_at(strength)["pruned"]


@pytest.mark.parametrize("form", ["adapter", "patch"])
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("granularity", ["row", "tensor", "global"])
def test_as_many_entries_of_the_update_as_antidote_delta(tuned, inputs, granularity, compat, form):
    knobs = {"granularity": granularity, "compat": compat, "form": form}
    scored = antidote_delta.prepare(tuned, AntidoteDeltaSpec(**knobs), inputs, Silent())
    random = path_of(tuned, inputs, of="delta", **knobs)
    for strength in ENDS:
        theirs, ours = scored.facts_at(strength), random.facts_at(strength)
        assert ours["pruned"] == theirs["pruned"] > 0
        assert ours["mask_sha256"] != theirs["mask_sha256"]
        assert random.at(strength).is_adapter == (form == "adapter")
        if granularity != "global":
            assert ours["counts"] == theirs["counts"]


@pytest.mark.parametrize("granularity", ["tensor", "global"])
def test_as_many_components_as_antidote_rank(tuned, inputs, granularity):
    scored = antidote_rank.prepare(tuned, AntidoteRankSpec(granularity=granularity), inputs, Silent())
    random = path_of(tuned, inputs, of="rank", granularity=granularity)
    for strength in (0.3, 0.6):
        theirs, ours = scored.facts_at(strength), random.facts_at(strength)
        assert ours["dropped"] == theirs["dropped"] > 0
        assert ours["modules"] != theirs["modules"]
    assert random.facts["components"] == scored.facts["components"]


@pytest.mark.parametrize("of", ["factors", "delta", "rank"])
def test_a_draw_depends_on_the_seed_alone(tuned, inputs, of):
    first, again, other = (path_of(tuned, inputs, of=of, seed=seed).at(0.3).digest for seed in (1, 1, 2))
    assert first == again != other


def test_masks_of_the_update_nest_and_are_drawn_for_each_module_anew(tuned, inputs):
    path = path_of(tuned, inputs, of="delta", form="patch", granularity="global")
    small, large = ({n: p.dense() != 0 for n, p in path.at(s).beside.items()} for s in ENDS)
    assert all(bool((small[name] <= large[name]).all()) for name in small)
    alike = [name for name in large if name.endswith(("gate_proj", "up_proj"))]  # of one shape
    assert not torch.equal(large[alike[0]], large[alike[1]])
    shares = [float(mask.float().mean()) for mask in large.values()]
    assert min(shares) > 0.2 < max(shares) < 0.4


@pytest.mark.parametrize(
    "knobs",
    [
        {"of": "rank", "granularity": "row"},
        {"of": "rank", "compat": True},
        {"of": "rank", "form": "patch"},
        {"of": "factors", "form": "patch"},
    ],
)
def test_knobs_that_the_controlled_method_does_not_have_are_refused(knobs):
    with pytest.raises(ValidationError):
        RandomMaskSpec(**knobs)
