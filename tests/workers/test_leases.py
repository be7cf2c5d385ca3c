"""Claims: one winner, no zombie, nothing lost. Every test runs on SQLite and on PostgreSQL."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
from sqlalchemy import Engine, select

from app.database import read_session, unit_of_work
from app.tables.work import WorkItem, WorkKind, WorkState
from app.work import service as work
from app.work.errors import LeaseLost
from app.work.lease import Lease, ReapOutcome

TUNE = [WorkKind.TUNE]


@pytest.fixture
def enqueue(engine: Engine, new_project: Callable[[str], str]) -> Callable[..., None]:
    new_project("proj_a")
    new_project("proj_b")

    def add(subject_id: str, project_id: str = "proj_a", **named: int) -> None:
        with unit_of_work(engine) as session:
            work.enqueue(session, WorkKind.TUNE, subject_id, project_id, **named)

    return add


@pytest.fixture
def claim(engine: Engine) -> Callable[..., Lease | None]:
    def take(owner: str = "worker", lease_seconds: float = 30.0) -> Lease | None:
        with unit_of_work(engine) as session:
            return work.claim(session, owner, TUNE, lease_seconds=lease_seconds)

    return take


@pytest.fixture
def item(engine: Engine) -> Callable[[str], WorkItem]:
    def get(subject_id: str) -> WorkItem:
        with read_session(engine) as session:
            return session.scalars(select(WorkItem).where(WorkItem.subject_id == subject_id)).one()

    return get


def test_many_claimers_get_each_item_exactly_once(engine, enqueue, claim):
    for number in range(40):
        enqueue(f"ftjob-{number}")
    taken: list[str] = []
    start = threading.Barrier(8)

    def claimer(name: str) -> None:
        start.wait()
        while (lease := claim(name)) is not None:
            taken.append(lease.subject_id)

    threads = [threading.Thread(target=claimer, args=(f"worker-{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # On PostgreSQL a claimer may see every row locked and leave early; what is left is simply still queued.
    while (lease := claim("last")) is not None:
        taken.append(lease.subject_id)
    assert Counter(taken) == Counter(f"ftjob-{number}" for number in range(40))


def test_nothing_waiting_means_no_lease(claim, enqueue):
    assert claim() is None


def test_an_item_of_another_kind_is_left_alone(engine, enqueue):
    enqueue("ftjob-1")
    with unit_of_work(engine) as session:
        assert work.claim(session, "side", [WorkKind.VALIDATE]) is None


def test_every_claim_raises_the_fence_and_the_attempt(engine, enqueue, claim):
    enqueue("ftjob-1")
    seen = []
    for _ in range(3):
        lease = claim()
        seen.append((lease.fence, lease.attempt))
        with unit_of_work(engine) as session:
            work.retry(session, lease, "the disk was full", backoff_seconds=0)
    assert seen == [(1, 1), (2, 2), (3, 3)]


def test_a_zombie_is_refused_at_every_write(engine, enqueue, claim):
    enqueue("ftjob-1")
    zombie = claim("first", lease_seconds=0.05)
    time.sleep(0.1)
    with unit_of_work(engine) as session:
        work.reap(session, backoff_seconds=0)
    current = claim("second")
    assert current.fence > zombie.fence
    for write in (work.complete, work.cancelled, work.hand_back, work.require):
        with pytest.raises(LeaseLost), unit_of_work(engine) as session:
            write(session, zombie)
    for write in (work.retry, work.fail):
        with pytest.raises(LeaseLost), unit_of_work(engine) as session:
            write(session, zombie, "late")
    with unit_of_work(engine) as session:
        assert work.heartbeat(session, zombie).alive is False
        assert work.holds(session, zombie) is False
        assert work.holds(session, current) is True


def test_the_same_owner_under_an_older_fence_is_a_zombie_too(engine, enqueue, claim):
    enqueue("ftjob-1")
    first = claim("worker")
    with unit_of_work(engine) as session:
        work.hand_back(session, first)
    claim("worker")
    with pytest.raises(LeaseLost), unit_of_work(engine) as session:
        work.complete(session, first)


def test_a_heartbeat_keeps_the_reaper_away(engine, enqueue, claim):
    enqueue("ftjob-1")
    lease = claim(lease_seconds=0.6)
    for _ in range(4):
        time.sleep(0.25)
        with unit_of_work(engine) as session:
            assert work.heartbeat(session, lease).alive
            assert work.reap(session) == []


def test_the_reaper_puts_an_abandoned_item_back_after_a_pause(engine, enqueue, claim, item):
    enqueue("ftjob-1")
    claim("dead worker", lease_seconds=0.05)
    time.sleep(0.1)
    with unit_of_work(engine) as session:
        [reaped] = work.reap(session, backoff_seconds=30)
    assert (reaped.subject_id, reaped.outcome) == ("ftjob-1", ReapOutcome.QUEUED)
    assert "dead worker" in reaped.error
    assert claim() is None, "30 s of backoff have not passed"
    assert 25 < item("ftjob-1").next_run_at - time.time() < 35


def test_two_reapers_take_an_item_away_once(engine, enqueue, claim):
    enqueue("ftjob-1")
    claim(lease_seconds=0.05)
    time.sleep(0.1)
    with unit_of_work(engine) as session:
        assert len(work.reap(session)) == 1
    with unit_of_work(engine) as session:
        assert work.reap(session) == []


def test_three_lost_workers_are_the_end(engine, enqueue, claim, item):
    enqueue("ftjob-1")
    outcomes = []
    for _ in range(3):
        claim(lease_seconds=0.02)
        time.sleep(0.05)
        with unit_of_work(engine) as session:
            outcomes += [reaped.outcome for reaped in work.reap(session, backoff_seconds=0)]
    assert outcomes == [ReapOutcome.QUEUED, ReapOutcome.QUEUED, ReapOutcome.DEAD]
    assert item("ftjob-1").state is WorkState.DEAD
    assert claim() is None


def test_a_retry_is_refused_when_the_attempts_are_used_up(engine, enqueue, claim, item):
    enqueue("ftjob-1", max_attempts=1)
    lease = claim()
    with unit_of_work(engine) as session:
        assert work.retry(session, lease, "again?") is False
    assert item("ftjob-1").state is WorkState.DEAD
    assert item("ftjob-1").last_error == "again?"


def test_a_drained_worker_hands_back_without_using_an_attempt(engine, enqueue, claim):
    enqueue("ftjob-1", max_attempts=1)
    for _ in range(5):
        lease = claim()
        assert lease.attempt == 1
        with unit_of_work(engine) as session:
            work.hand_back(session, lease)


def test_a_cancel_of_a_waiting_item_is_final_at_once(engine, enqueue, claim, item):
    enqueue("ftjob-1")
    with unit_of_work(engine) as session:
        assert work.request_cancel(session, WorkKind.TUNE, "ftjob-1") is False
    assert item("ftjob-1").state is WorkState.CANCELLED
    assert claim() is None


def test_a_cancel_of_a_running_item_travels_with_the_heartbeat(engine, enqueue, claim):
    enqueue("ftjob-1")
    lease = claim()
    with unit_of_work(engine) as session:
        assert work.request_cancel(session, WorkKind.TUNE, "ftjob-1") is True
    with unit_of_work(engine) as session:
        answer = work.heartbeat(session, lease)
    assert (answer.alive, answer.cancel_requested) == (True, True)
    with unit_of_work(engine) as session:
        work.cancelled(session, lease)


def test_the_reaper_finishes_a_cancel_that_a_live_worker_ignores(engine, enqueue, claim):
    enqueue("ftjob-1")
    lease = claim(lease_seconds=30)
    with unit_of_work(engine) as session:
        work.request_cancel(session, WorkKind.TUNE, "ftjob-1")
        assert work.reap(session, cancel_patience_seconds=15) == []
    time.sleep(0.1)
    with unit_of_work(engine) as session:
        [reaped] = work.reap(session, cancel_patience_seconds=0.05)
    assert reaped.outcome is ReapOutcome.CANCELLED
    with pytest.raises(LeaseLost), unit_of_work(engine) as session:
        work.complete(session, lease)


def test_a_greedy_project_does_not_starve_another(enqueue, claim):
    for number in range(10):
        enqueue(f"greedy-{number}", "proj_a")
    enqueue("modest", "proj_b")
    first, second = claim(), claim()
    assert first.subject_id == "greedy-0"
    assert second.subject_id == "modest", "the project with nothing running goes before the older items"


def test_priority_goes_before_age_inside_a_project(enqueue, claim):
    enqueue("old")
    enqueue("urgent", priority=5)
    assert claim().subject_id == "urgent"


def test_enqueueing_a_live_item_again_changes_nothing(enqueue, claim, item):
    enqueue("ftjob-1")
    lease = claim()
    enqueue("ftjob-1")
    assert item("ftjob-1").state is WorkState.RUNNING
    assert item("ftjob-1").fence == lease.fence


def test_an_ended_item_can_be_queued_anew_and_keeps_its_fence(engine, enqueue, claim):
    enqueue("ftjob-1")
    lease = claim()
    with unit_of_work(engine) as session:
        work.complete(session, lease)
    enqueue("ftjob-1")
    again = claim()
    assert (again.fence, again.attempt) == (lease.fence + 1, 1)


def test_a_rolled_back_claim_leaves_the_item_for_others(engine, enqueue, claim):
    enqueue("ftjob-1")
    with pytest.raises(RuntimeError), unit_of_work(engine) as session:
        assert work.claim(session, "worker", TUNE) is not None
        raise RuntimeError("the worker died before its commit")
    assert claim().attempt == 1
