"""When to try again, and when to stop.

Knows: arithmetic over the attempts already made.
Refuses to know: rows, clocks, HTTP.
"""

import random
from collections.abc import Sequence

JITTER_RATIO = 0.2
MAX_WAIT_SECONDS = 86400.0


def next_wait(
    attempts_made: int,
    schedule: Sequence[float],
    *,
    retry_after_seconds: float | None = None,
    jitter: float | None = None,
) -> float | None:
    """Seconds until the next attempt, or None when the schedule is used up.

    `schedule[n]` is the wait before attempt n, counted from zero. A receiver that asks for more time gets it,
    up to a day. `jitter` in -1..1 spreads the attempts of many deliveries; None draws it.
    """
    if attempts_made >= len(schedule):
        return None
    drawn = random.uniform(-1, 1) if jitter is None else jitter
    wait = schedule[attempts_made] * (1 + JITTER_RATIO * drawn)
    return max(wait, min(retry_after_seconds or 0.0, MAX_WAIT_SECONDS))
