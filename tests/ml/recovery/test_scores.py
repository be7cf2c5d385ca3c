"""Oracles O1 and O2: scores, masks and counts, against numbers computed by hand."""

import math

import pytest
import torch

from workers.ml.recovery.scores import ChannelNorms, prune_count, prune_order, squared_norms, top_mask, wanda_scores

W = torch.tensor([[1.0, -2, 3, -4], [4, 3, -2, 1]])
X1 = torch.tensor([[1.0, 0, 2, 0], [0, 1, 0, 0.5]])
X2 = torch.tensor([[3.0, 0, 0, 0], [0, 1, 2, 0.5], [0, 0, 0, 0]])


def norms(kind: str, *samples: torch.Tensor) -> torch.Tensor:
    channel = ChannelNorms(kind)
    for sample in samples:
        channel.add(sample[None], torch.ones(1, len(sample)))
    return channel.value()


def mask_of(scores: torch.Tensor, ratio: float, granularity: str) -> list[list[int]]:
    return prune_order({"w": scores}, granularity).masks(ratio)["w"].int().tolist()


def test_channel_norms_match_the_oracle():
    assert norms("rms", X1, X2).tolist() == pytest.approx([2.236068, 1, 2, 0.5], abs=1e-6)
    assert norms("mean", X1, X2).tolist() == pytest.approx([2, 1, 2, 0.5])


def test_rms_scores_and_masks_match_the_oracle():
    scores = wanda_scores(W, norms("rms", X1, X2))
    assert scores.flatten().tolist() == pytest.approx([2.236068, 2, 6, 2, 8.944272, 3, 4, 0.5], abs=1e-6)
    assert mask_of(scores, 0.25, "row") == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert mask_of(scores, 0.5, "row") == [[1, 0, 1, 0], [1, 0, 1, 0]]
    assert mask_of(scores, 0.5, "global") == [[0, 0, 1, 0], [1, 1, 1, 0]]
    assert mask_of(scores, 0.5, "tensor") == [[0, 0, 1, 0], [1, 1, 1, 0]]


def test_ties_spare_the_lower_index():
    scores = wanda_scores(W, norms("mean", X1, X2))
    assert mask_of(scores, 0.5, "row") == [[0, 0, 1, 1], [1, 0, 1, 0]]


def test_pruned_weights_match_the_oracle():
    mask = prune_order({"w": wanda_scores(W, norms("rms", X1, X2))}, "row").masks(0.25)["w"]
    assert W.masked_fill(mask, 0).tolist() == [[1, -2, 0, -4], [0, 3, -2, 1]]


@pytest.mark.parametrize("kind", ["rms", "mean"])
def test_a_padded_batch_gives_what_the_samples_give_one_by_one(kind):
    padded = torch.full((2, 4, 4), float("nan"))  # padding may hold anything
    counted = torch.zeros(2, 4)
    for i, sample in enumerate((X1, X2)):
        padded[i, : len(sample)] = sample
        counted[i, : len(sample)] = 1
    together = ChannelNorms(kind)
    together.add(padded, counted)
    assert together.value().tolist() == norms(kind, X1, X2).tolist()


@pytest.mark.parametrize("kind", ["rms", "mean"])
def test_a_zero_row_of_tokens_changes_nothing(kind):
    """A zero-padded token that counts is as good as none: X2 of the oracle ends in one."""
    assert norms(kind, X1, X2).tolist() == norms(kind, X1, X2[:2]).tolist()
    padded = torch.cat([X1, torch.zeros(3, 4)])
    assert norms(kind, padded, X2).tolist() == norms(kind, X1, X2).tolist()


@pytest.mark.parametrize("kind", ["rms", "mean"])
def test_the_running_update_equals_the_plain_mean_for_unequal_lengths(kind):
    samples = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (1, 5, 17, 3)]
    squares = torch.stack([sample.square().sum(0) for sample in samples])
    plain = squares.mean(0).sqrt() if kind == "rms" else squares.sqrt().mean(0)
    assert torch.allclose(norms(kind, *samples), plain, atol=1e-6, rtol=0)
    running, seen = torch.zeros(6), 0  # as the published code keeps it
    for one in squares if kind == "rms" else squares.sqrt():
        running, seen = running * seen / (seen + 1) + one / (seen + 1), seen + 1
    assert torch.allclose(norms(kind, *samples), running.sqrt() if kind == "rms" else running, atol=1e-6, rtol=0)


def test_half_precision_activations_are_squared_in_full_precision():
    x = torch.full((1, 3, 2), 300.0, dtype=torch.float16)  # its square is over fp16's range
    assert squared_norms(x, torch.ones(1, 3)).tolist() == [[270_000.0, 270_000.0]]


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (4096, [1, 41, 205, 410, 820, 1024]),
        (256, [1, 3, 13, 26, 52, 64]),
        (16, [1, 1, 1, 2, 4, 4]),
        (8, [1, 1, 1, 1, 2, 2]),
    ],
)
def test_compat_counts_match_the_published_code(n, expected):
    assert [prune_count(n, ratio, compat=True) for ratio in (1e-5, 0.01, 0.05, 0.1, 0.2, 0.25)] == expected


def test_compat_keeps_the_float_trap_and_floor_avoids_it():
    assert prune_count(10, 0.9, compat=True) == 10
    assert prune_count(10, 0.8, compat=True) == 9
    assert prune_count(20, 0.9, compat=True) == 19
    assert prune_count(10, 0.9) == 9
    assert prune_count(16, 0.05) == 0


def test_the_ends_of_the_dial_prune_nothing_and_everything():
    for n in (1, 7, 4096):
        for compat in (False, True):
            assert prune_count(n, 0.0, compat=compat) == 0
            assert prune_count(n, 1.0, compat=compat) == n
    with pytest.raises(ValueError, match="between 0 and 1"):
        prune_count(4, 1.5)


def test_a_global_order_ranks_across_tensors_and_masks_nest():
    scores = {"a": torch.tensor([[1.0, 5.0]]), "b": torch.tensor([[3.0], [4.0]])}
    order = prune_order(scores, "global")
    assert {name: mask.flatten().tolist() for name, mask in order.masks(0.5).items()} == {
        "a": [False, True],
        "b": [False, True],
    }
    wider = order.masks(0.75)
    assert all(bool((order.masks(0.5)[name] <= wider[name]).all()) for name in scores)
    assert sum(int(mask.sum()) for mask in wider.values()) == math.floor(0.75 * 4)


def test_norms_without_an_activation_are_an_error():
    with pytest.raises(ValueError, match="no activation"):
        ChannelNorms("rms").value()


@pytest.mark.parametrize("values", [4, 10_000], ids=["many ties", "few ties"])
def test_the_top_of_each_row_is_what_the_stable_sort_prunes(values):
    scores = torch.randint(0, values, (7, 23), generator=torch.Generator().manual_seed(values)).float()
    for ratio in (0.0, 0.05, 0.3, 0.5, 0.99, 1.0):
        for compat in (False, True):
            sorted_mask = prune_order({"w": scores}, "row", compat=compat).masks(ratio)["w"]
            assert torch.equal(top_mask(scores, prune_count(23, ratio, compat=compat)), sorted_mask)
