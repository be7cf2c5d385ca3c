"""Exact statistics of small counts: what k failures in n independent trials prove.

Knows: binomial tails, one-sided Clopper-Pearson bounds, sample sizes, judge errors, paired losses.
Refuses to know: what was counted, and which bound is good enough (the gate and its policy know that).
Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

_TINY = 1e-300
_EPSILON = 1e-16
_MAX_TERMS = 10_000


def binomial_cdf(successes: int, trials: int, probability: float) -> float:
    """P(X <= successes) for X ~ Binomial(trials, probability)."""
    if successes < 0:
        return 0.0
    if successes >= trials:
        return 1.0
    return regularised_incomplete_beta(trials - successes, successes + 1, 1.0 - probability)


def regularised_incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) by Lentz's continued fraction, on the side of the mean where it converges fast."""
    if a <= 0 or b <= 0 or not 0.0 <= x <= 1.0:
        raise ValueError(f"I_x(a, b) needs a, b > 0 and x in [0, 1], got a={a}, b={b}, x={x}")
    if x in (0.0, 1.0):
        return x
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    front = math.exp(log_front)
    if x < (a + 1) / (a + b + 2):
        return front * _beta_continued_fraction(a, b, x) / a
    return 1.0 - front * _beta_continued_fraction(b, a, 1.0 - x) / b


def _beta_continued_fraction(a: float, b: float, x: float) -> float:
    d = 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1))
    c, value = 1.0, d
    for m in range(1, _MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / _away_from_zero(1.0 + term * d)
            c = _away_from_zero(1.0 + term / c)
            value *= d * c
        if abs(d * c - 1.0) < _EPSILON * 8:
            return value
    raise ArithmeticError(f"incomplete beta did not converge for a={a}, b={b}, x={x}")


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def upper_bound(failures: int, trials: int, *, alpha: float = 0.05) -> float:
    """One-sided exact (Clopper-Pearson) upper bound of a failure rate: the p with P(X <= failures | p) = alpha."""
    _check_counts(failures, trials, alpha)
    if failures == trials:
        return 1.0
    return _bisect(lambda p: binomial_cdf(failures, trials, p) > alpha, low=failures / trials, high=1.0)


def lower_bound(successes: int, trials: int, *, alpha: float = 0.05) -> float:
    """One-sided exact lower bound of a success rate."""
    _check_counts(successes, trials, alpha)
    return 1.0 - upper_bound(trials - successes, trials, alpha=alpha)


def paired_loss_bound(losses: int, pairs: int, *, alpha: float = 0.05) -> float:
    """Upper bound of how much accuracy a change can have cost, from paired right/wrong answers.

    `losses` are rows that were right before and wrong after. Rows that turned right are not credited, so the
    bound holds for the drop in accuracy whatever the gains are.
    """
    return upper_bound(losses, pairs, alpha=alpha)


def mean_bound(mean: float, standard_error: float, *, alpha: float = 0.05) -> float:
    """One-sided upper bound of a mean from its standard error; for hundreds of rows, where a mean is normal."""
    return mean + NormalDist().inv_cdf(1.0 - alpha) * standard_error


def prompts_needed(limit: float, failures: int = 0, *, alpha: float = 0.05) -> int:
    """The smallest number of independent trials in which `failures` failures still prove a rate <= `limit`."""
    if not 0.0 < limit < 1.0:
        raise ValueError(f"limit must lie between 0 and 1, got {limit}")
    low, high = failures, failures + 1  # invariant: `low` does not certify
    while upper_bound(failures, high, alpha=alpha) > limit:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if upper_bound(failures, middle, alpha=alpha) > limit:
            low = middle
        else:
            high = middle
    return high


def corrected_rate(observed: float, *, false_positive_rate: float, sensitivity: float) -> float:
    """The true rate behind a judge's flags (Rogan-Gladen), clipped to [0, 1]."""
    if not 0.0 <= false_positive_rate < sensitivity <= 1.0:
        raise ValueError("a judge must flag more of the true cases than of the false ones")
    return min(1.0, max(0.0, (observed - false_positive_rate) / (sensitivity - false_positive_rate)))


def _check_counts(hits: int, trials: int, alpha: float) -> None:
    if trials < 1 or not 0 <= hits <= trials:
        raise ValueError(f"counts must satisfy 0 <= hits <= trials and trials >= 1, got {hits} of {trials}")
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")


def _bisect(is_below: Callable[[float], bool], *, low: float, high: float) -> float:
    """The smallest float above the root: rounded up, so that a bound is never reported too small."""
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return high
        if is_below(middle):
            low = middle
        else:
            high = middle
