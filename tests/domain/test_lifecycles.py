"""Both machines, pair by pair, against tables written out by hand."""

import itertools

import pytest

from app.domain.job_lifecycle import TERMINAL, TRANSITIONS, JobStatus, cancel_target, sources
from app.domain.release_lifecycle import TRANSITIONS as RELEASE_TRANSITIONS
from app.domain.release_lifecycle import ReleaseState
from app.domain.release_lifecycle import sources as release_sources

ALLOWED = {
    "validating_files": "queued failed cancelled",
    "queued": "running paused failed cancelled",
    "running": "queued pausing paused cancel_requested succeeded failed",
    "pausing": "paused queued cancel_requested failed",
    "paused": "queued succeeded failed cancelled",
    "cancel_requested": "cancelled",
    "succeeded": "",
    "failed": "",
    "cancelled": "",
}
RELEASES = {
    "quarantined": "released rejected expired",
    "released": "suspended revoked",
    "suspended": "released revoked",
    "revoked": "",
    "rejected": "",
    "expired": "",
}


@pytest.mark.parametrize(("status", "target"), list(itertools.product(JobStatus, JobStatus)))
def test_a_job_may_move_exactly_where_the_table_says(status: JobStatus, target: JobStatus) -> None:
    expected = target.value in ALLOWED[status.value].split()
    assert (target in TRANSITIONS[status]) is expected
    assert (status in sources(target)) is expected


def test_terminal_jobs_are_the_ones_that_lead_nowhere() -> None:
    assert {status for status in JobStatus if not TRANSITIONS[status]} == TERMINAL


def test_every_status_can_be_reached_from_the_first_and_can_end() -> None:
    reached, frontier = set(), {JobStatus.VALIDATING_FILES}
    while frontier:
        reached |= frontier
        frontier = {target for status in frontier for target in TRANSITIONS[status]} - reached
    assert reached == set(JobStatus)


@pytest.mark.parametrize(
    ("status", "target"),
    [
        ("validating_files", "cancelled"),
        ("queued", "cancelled"),
        ("running", "cancel_requested"),
        ("pausing", "cancel_requested"),
        ("paused", "cancelled"),
        ("cancel_requested", None),
        ("succeeded", None),
        ("failed", None),
        ("cancelled", None),
    ],
)
def test_cancel_waits_only_where_somebody_works(status: str, target: str | None) -> None:
    assert cancel_target(JobStatus(status)) == (JobStatus(target) if target else None)


@pytest.mark.parametrize(("state", "target"), list(itertools.product(ReleaseState, ReleaseState)))
def test_a_release_may_move_exactly_where_the_table_says(state: ReleaseState, target: ReleaseState) -> None:
    expected = target.value in RELEASES[state.value].split()
    assert (target in RELEASE_TRANSITIONS[state]) is expected
    assert (state in release_sources(target)) is expected
