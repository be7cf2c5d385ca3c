"""The life of a release: the right to fetch one exact digest.

Knows: the states a candidate's release can be in, and which change is allowed.
Refuses to know: jobs. A job's end never changes because a release was suspended, and a release granted
on appeal leaves the failed job's history alone.
"""

from enum import StrEnum


class ReleaseState(StrEnum):
    QUARANTINED = "quarantined"
    RELEASED = "released"
    SUSPENDED = "suspended"
    REVOKED = "revoked"
    REJECTED = "rejected"
    EXPIRED = "expired"


_R = ReleaseState
TRANSITIONS: dict[ReleaseState, frozenset[ReleaseState]] = {
    _R.QUARANTINED: frozenset({_R.RELEASED, _R.REJECTED, _R.EXPIRED}),
    _R.RELEASED: frozenset({_R.SUSPENDED, _R.REVOKED}),
    _R.SUSPENDED: frozenset({_R.RELEASED, _R.REVOKED}),
    _R.REVOKED: frozenset(),
    _R.REJECTED: frozenset(),
    _R.EXPIRED: frozenset(),
}
SERVABLE = frozenset({ReleaseState.RELEASED})


def sources(target: ReleaseState) -> frozenset[ReleaseState]:
    """The states from which `target` may be entered."""
    return frozenset(state for state, targets in TRANSITIONS.items() if target in targets)
