"""Values that describe a claim: who holds which work item, and under which fence.

Knows: the figures a claim is made with when its caller names none.
Refuses to know: how claims are stored and won (`app.work.repository`).
"""

from dataclasses import dataclass
from enum import StrEnum

from app.tables.work import WorkKind

LEASE_SECONDS = 30.0
BACKOFF_SECONDS = 30.0
# A cancel is final within 20 s of the request even if the worker is frozen: 15 s here, 2 s until the next
# reaper looks, and time to write.
CANCEL_PATIENCE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's claim. Every write made under it names `fence` and `owner`, and a stale one changes nothing."""

    work_id: str
    kind: WorkKind
    subject_id: str
    fence: int
    owner: str
    attempt: int
    lease_seconds: float = LEASE_SECONDS


@dataclass(frozen=True, slots=True)
class HeartbeatAnswer:
    alive: bool
    cancel_requested: bool


class ReapOutcome(StrEnum):
    """What became of an item whose worker is gone (or too slow to honour a cancel)."""

    QUEUED = "queued"
    DEAD = "dead"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class ReapedItem:
    work_id: str
    kind: WorkKind
    subject_id: str
    outcome: ReapOutcome
    error: str
