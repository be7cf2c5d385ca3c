"""Oracle O13 and the edges of exact binomial bounds."""

import math

import pytest

from workers.ml.statistics import (
    binomial_cdf,
    corrected_rate,
    lower_bound,
    paired_loss_bound,
    prompts_needed,
    regularised_incomplete_beta,
    upper_bound,
)


@pytest.mark.parametrize(
    ("failures", "trials", "percent"),
    [(0, 100, 2.951), (0, 300, 0.994), (1, 300, 1.571), (3, 300, 2.564), (10, 1000, 1.690), (20, 1000, 2.893)],
)
def test_upper_bounds_match_the_published_table(failures, trials, percent):
    assert 100 * upper_bound(failures, trials) == pytest.approx(percent, abs=5e-4)


@pytest.mark.parametrize(
    ("limit", "needed"), [(0.01, (299, 473, 628, 1049)), (0.02, (149, 236, 313, 523)), (0.05, (59, 93, 124, 208))]
)
def test_prompts_needed_matches_the_published_table(limit, needed):
    assert tuple(prompts_needed(limit, failures) for failures in (0, 1, 2, 5)) == needed


def test_the_apothecary_sets_certify_what_their_page_says():
    assert 100 * upper_bound(0, 160) == pytest.approx(1.86, abs=1e-2)
    assert 100 * upper_bound(0, 80, alpha=0.025) == pytest.approx(4.5, abs=5e-2)
    assert 100 * upper_bound(0, 20) == pytest.approx(13.9, abs=5e-2)


def test_zero_failures_have_a_closed_form():
    for trials in (1, 7, 59, 4096):
        assert upper_bound(0, trials) == pytest.approx(1 - 0.05 ** (1 / trials), rel=1e-12)


def test_the_bound_is_the_root_of_the_exact_binomial_tail():
    bound = upper_bound(3, 40, alpha=0.025)
    tail = sum(math.comb(40, k) * bound**k * (1 - bound) ** (40 - k) for k in range(4))
    assert tail == pytest.approx(0.025, rel=1e-10)
    assert binomial_cdf(3, 40, bound) <= 0.025


def test_all_failures_and_no_successes_are_the_ends():
    assert upper_bound(5, 5) == 1.0
    assert lower_bound(0, 5) == 0.0
    assert lower_bound(5, 5) == pytest.approx(0.05 ** (1 / 5))


def test_incomplete_beta_matches_hand_values():
    assert regularised_incomplete_beta(1, 1, 0.3) == pytest.approx(0.3)
    assert regularised_incomplete_beta(2, 3, 0.5) == pytest.approx(0.6875)
    assert regularised_incomplete_beta(5000, 3, 0.9999) == pytest.approx(1 - regularised_incomplete_beta(3, 5000, 1e-4))


def test_judge_errors_are_corrected():
    assert 100 * corrected_rate(0.05, false_positive_rate=0.02, sensitivity=0.9) == pytest.approx(3.41, abs=5e-3)
    assert corrected_rate(0.01, false_positive_rate=0.02, sensitivity=0.9) == 0.0
    with pytest.raises(ValueError, match="more of the true"):
        corrected_rate(0.1, false_positive_rate=0.5, sensitivity=0.5)


def test_three_losses_in_four_hundred_pairs_prove_two_points_and_four_do_not():
    assert paired_loss_bound(3, 400) < 0.02 < paired_loss_bound(4, 400)


@pytest.mark.parametrize(("hits", "trials", "alpha"), [(0, 0, 0.05), (2, 1, 0.05), (-1, 3, 0.05), (0, 3, 0.0)])
def test_impossible_counts_are_refused(hits, trials, alpha):
    with pytest.raises(ValueError):
        upper_bound(hits, trials, alpha=alpha)
