"""The agent's drills: a stand-in trainer dies, hangs, lies and is cancelled; the job always ends where it should."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from sqlalchemy import select
from structlog.testing import capture_logs

from app.database import read_session, unit_of_work
from app.domain.job_lifecycle import JobStatus, Stage
from app.errors import Conflict, StorageFull
from app.jobs import service as jobs
from app.tables.releases import Release
from app.tables.work import WorkState
from app.work import service as work
from tests.workers.conftest import Service
from workers.reaper import reap
from workers.run import JobRun
from workers.supervisor import Child, threads_per_child


def never() -> bool:
    return False


@pytest.fixture
def when() -> Iterator[Callable[[Callable[[], object], Callable[[], object]], None]]:
    """Does something once a condition holds, next to the agent that occupies the main thread."""
    threads: list[threading.Thread] = []

    def watch(condition: Callable[[], object], act: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)
        act()

    def schedule(condition: Callable[[], object], act: Callable[[], object]) -> None:
        thread = threading.Thread(target=watch, args=(condition, act))
        threads.append(thread)
        thread.start()

    yield schedule
    for thread in threads:
        thread.join(20)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Child]:
    """Every child that was started, so that a drill can kill it and a test can see that none is left."""
    started: list[Child] = []
    original = Child.start.__func__

    def start(cls: type[Child], plan: object) -> Child:
        child = original(cls, plan)
        started.append(child)
        return child

    monkeypatch.setattr(Child, "start", classmethod(start))
    return started


def at_stage(service: Service, job_id: str, stage: Stage) -> bool:
    return service.job(job_id).stage is stage


def test_a_job_goes_from_queue_to_release(service):
    job_id = service.create_job()
    assert service.agent("pass").run_next(never)
    job = service.job(job_id)
    assert job.status is JobStatus.SUCCEEDED, job.error_message
    assert service.item(job_id).state is WorkState.DONE
    assert [entry["stage"] for entry in job.stage_history] == [
        "validating", "queued", "preparing", "training", "recovering", "gating", "packaging", "released",
    ]  # fmt: skip
    assert job.trained_tokens == 1234
    assert len(job.result_file_ids) == 1
    assert job.hyperparameters["n_epochs"] == 2
    kinds = [event.kind for event in service.events(job_id)]
    assert kinds.count("metrics") == 15


def test_the_stored_bundle_is_what_the_gate_judged(service):
    job_id = service.create_job()
    service.agent("pass").run_next(never)
    with read_session(service.engine) as session:
        release = session.scalars(select(Release).where(Release.job_id == job_id)).one()
    assert release.storage_prefix == f"releases/{job_id}/1"
    lines = []
    for entry in release.manifest["files"]:
        data = service.storage.get_bytes(f"{release.storage_prefix}/{entry['path']}")
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        blocks = [hashlib.sha256(data[at : at + (1 << 20)]).hexdigest() for at in range(0, len(data), 1 << 20)]
        assert entry["blocks"] == blocks
        if entry["path"] in release.manifest["candidate_files"]:
            lines.append(f"{entry['sha256']}  {entry['path']}\n")
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == release.candidate_digest
    report = json.loads(service.storage.get_bytes(f"{release.storage_prefix}/safety_report.json"))
    assert report["candidate_digest"] == release.candidate_digest
    assert report["base_model"]["name"] == service.base_name
    assert report["environment"]["OMP_NUM_THREADS"] == str(threads_per_child(service.settings.worker.slots))
    assert set(report["data"]["sets"]) == {
        "harmful", "refusals", "retention", "harm_selection", "harm_confirmation", "harmless_selection",
        "harmless_confirmation",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("behaviour", "status", "code"),
    [
        ("block", JobStatus.FAILED, "safety_gate_blocked"),
        ("error", JobStatus.FAILED, "gate_error"),
        ("review", JobStatus.PAUSED, None),
        ("user_error", JobStatus.FAILED, "user_row_too_long"),
        ("bug", JobStatus.FAILED, "system_error"),
        ("silent", JobStatus.FAILED, "system_trainer_protocol"),
        ("tamper", JobStatus.FAILED, "system_candidate_altered"),
        ("escape", JobStatus.FAILED, "system_trainer_protocol"),
    ],
)
def test_every_other_end_releases_nothing(service, behaviour, status, code):
    job_id = service.create_job()
    service.agent(behaviour).run_next(never)
    job = service.job(job_id)
    assert (job.status, job.error_code) == (status, code)
    assert job.fine_tuned_model is None
    assert list(service.storage.list("releases")) == []
    assert not list((service.settings.home / "scratch" / "tune").iterdir()), "no scratch folder is left"


def test_a_trainer_killed_in_a_stage_is_tried_again_and_succeeds(service):
    job_id = service.create_job()
    agent = service.agent("die_once")
    assert agent.run_next(never)
    assert service.job(job_id).status is JobStatus.QUEUED
    assert agent.run_next(never)
    assert service.job(job_id).status is JobStatus.SUCCEEDED
    assert service.item(job_id).fence == 2


def test_three_dead_trainers_are_the_end(service):
    job_id = service.create_job()
    agent = service.agent("suicide")
    assert agent.run_waiting(never) == 3
    job = service.job(job_id)
    assert (job.status, job.error_code) == (JobStatus.FAILED, "attempts_exhausted")
    assert service.item(job_id).state is WorkState.DEAD


def test_a_hanging_stage_ends_the_job_with_its_code(service):
    job_id = service.create_job()
    service.agent("hang", stage_timeout_seconds=0.5).run_next(never)
    assert service.job(job_id).error_code == "system_stage_timeout"


@pytest.mark.parametrize("behaviour", ["slow", "deaf"])
def test_a_cancel_while_running_is_final_within_seconds(service, when, children, behaviour):
    job_id = service.create_job()
    asked: list[float] = []
    training = partial(at_stage, service, job_id, Stage.TRAINING)
    when(training, lambda: (asked.append(time.monotonic()), service.cancel(job_id)))
    service.agent(behaviour).run_next(never)
    assert time.monotonic() - asked[0] < 5
    assert service.job(job_id).status is JobStatus.CANCELLED
    assert service.item(job_id).state is WorkState.CANCELLED
    assert children[0].process.returncode is not None


def test_a_cancel_while_the_worker_is_dead_is_finished_by_a_reaper(service):
    job_id = service.create_job()
    with unit_of_work(service.engine) as session:
        lease = work.claim(session, "dead worker", ["tune"], lease_seconds=0.1)
        jobs.start(session, lease)
    service.cancel(job_id)
    assert service.job(job_id).status is JobStatus.CANCEL_REQUESTED
    time.sleep(0.2)
    reap(service.engine, service.settings.worker)
    assert service.job(job_id).status is JobStatus.CANCELLED


def test_a_dead_workers_job_goes_back_to_the_queue_and_on_to_another(service):
    job_id = service.create_job()
    with unit_of_work(service.engine) as session:
        jobs.start(session, work.claim(session, "dead worker", ["tune"], lease_seconds=0.1))
    time.sleep(0.2)
    reap(service.engine, service.settings.worker)
    assert service.job(job_id).status is JobStatus.QUEUED
    service.agent("pass").run_next(never)
    job = service.job(job_id)
    assert job.status is JobStatus.SUCCEEDED
    assert job.fine_tuned_model is not None


def test_a_stolen_lease_stops_the_trainer_and_writes_nothing(service, when, children):
    job_id = service.create_job()

    def steal() -> None:
        with unit_of_work(service.engine) as session:
            item = service.item(job_id)
            work.repository.seize(session, item.id, item.fence, WorkState.QUEUED, next_run_at=time.time() + 3600)

    when(partial(at_stage, service, job_id, Stage.TRAINING), steal)
    started = time.monotonic()
    service.agent("deaf").run_next(never)
    assert time.monotonic() - started < 20
    assert children[0].process.returncode is not None
    assert service.item(job_id).state is WorkState.QUEUED, "the thief's word stands"


def test_a_worker_without_a_confirmed_heartbeat_kills_its_trainer_before_the_lease_ends(service, monkeypatch):
    job_id = service.create_job()
    ended: list[float] = []

    def silent(*_: object) -> bool:
        return False

    monkeypatch.setattr("workers.keeper.LeaseKeeper._beat", silent)
    started = time.monotonic()
    service.agent("deaf", self_fence_seconds=0.8, heartbeat_seconds=0.2).run_next(never)
    ended.append(time.monotonic() - started)
    assert 0.5 < ended[0] < service.settings.worker.lease_seconds
    assert service.job(job_id).status is JobStatus.RUNNING, "a fenced worker writes nothing; the reaper decides"


def test_a_heartbeat_that_hangs_does_not_keep_the_brake_from_being_pulled(service, children, monkeypatch):
    service.create_job()
    hang = threading.Event()

    def hanging(*_: object) -> bool:
        return hang.wait(10)

    monkeypatch.setattr("workers.keeper.LeaseKeeper._beat", hanging)
    monkeypatch.setattr("workers.keeper.JOIN_SECONDS", 0.1)
    started = time.monotonic()
    service.agent("deaf", self_fence_seconds=0.8, heartbeat_seconds=0.1).run_next(never)
    hang.set()
    assert time.monotonic() - started < service.settings.worker.lease_seconds
    assert children[0].process.returncode == -9


@pytest.mark.parametrize("seed", range(8))
def test_a_cancel_at_any_moment_is_never_also_a_release(service, when, seed):
    job_id = service.create_job()
    refused: list[Conflict] = []

    def cancel() -> None:
        try:
            service.cancel(job_id)
        except Conflict as error:
            refused.append(error)

    moment = time.monotonic() + random.Random(seed).uniform(0.0, 1.2)
    when(lambda: time.monotonic() > moment, cancel)
    service.agent("pass").run_next(never)
    wait = time.monotonic() + 10
    while not (refused or service.job(job_id).status is JobStatus.CANCELLED) and time.monotonic() < wait:
        time.sleep(0.05)
    job = service.job(job_id)
    with read_session(service.engine) as session:
        released = session.scalars(select(Release.id).where(Release.job_id == job_id)).all()
    assert (job.status, len(released), len(refused)) in {(JobStatus.CANCELLED, 0, 0), (JobStatus.SUCCEEDED, 1, 1)}


@pytest.mark.parametrize("place", ["fetch", "store"])
def test_a_full_disk_is_waited_for_and_leaves_nothing_current(service, monkeypatch, place):
    job_id = service.create_job()
    full = StorageFull("The service's storage is full.")

    def refuse(*_: object, **__: object) -> None:
        raise full

    method = {"fetch": "get_to_path", "store": "put_file"}[place]
    with monkeypatch.context() as broken:
        broken.setattr(f"app.storage.Storage.{method}", refuse)
        service.agent("pass").run_next(never)
    assert service.job(job_id).status is JobStatus.QUEUED
    assert "system_storage_full" in service.item(job_id).last_error
    service.agent("pass").run_next(never)
    assert service.job(job_id).status is JobStatus.SUCCEEDED


@pytest.mark.parametrize("stage", ["recovering", "gating"])
def test_a_cancel_in_a_later_stage_is_final_within_seconds(service, when, stage):
    job_id = service.create_job()
    asked: list[float] = []
    when(
        partial(at_stage, service, job_id, Stage(stage)),
        lambda: (asked.append(time.monotonic()), service.cancel(job_id)),
    )
    service.agent(f"slow_{stage}").run_next(never)
    assert time.monotonic() - asked[0] < 5
    assert service.job(job_id).status is JobStatus.CANCELLED


def test_a_draining_worker_hands_its_job_back_uncounted(service, when):
    job_id = service.create_job()
    draining = threading.Event()
    when(partial(at_stage, service, job_id, Stage.TRAINING), draining.set)
    service.agent("slow").run(draining.is_set)
    item = service.item(job_id)
    assert (item.state, item.attempt) == (WorkState.QUEUED, 0)
    assert service.job(job_id).status is JobStatus.QUEUED
    service.agent("pass").run_next(never)
    assert service.job(job_id).status is JobStatus.SUCCEEDED


@pytest.mark.parametrize(
    ("moment", "behaviour"),
    [("_outcome", "pass"), ("_interrupted", "slow"), ("_failed", "retryable")],
    ids=["before the start", "while draining", "before another try"],
)
def test_a_cancel_between_two_steps_is_final_at_once(service, when, monkeypatch, moment, behaviour):
    job_id = service.create_job()
    original = getattr(JobRun, moment)

    def cancelled_first(self: JobRun, *arguments: object) -> object:
        service.cancel(job_id)
        return original(self, *arguments)

    monkeypatch.setattr(JobRun, moment, cancelled_first)
    draining = threading.Event()
    if moment == "_interrupted":
        when(partial(at_stage, service, job_id, Stage.TRAINING), draining.set)
    with capture_logs() as lines:
        service.agent(behaviour).run_next(draining.is_set)
    assert "job.not_settled" not in [line["event"] for line in lines]
    assert service.job(job_id).status is JobStatus.CANCELLED
    assert service.item(job_id).state is WorkState.CANCELLED


def test_a_missing_object_is_named_and_does_not_run(service, children):
    job_id = service.create_job()
    service.storage.delete(service.file(service.job(job_id).training_file_id).storage_key)
    service.agent("pass").run_next(never)
    assert service.job(job_id).error_code == "system_object_missing"
    assert children == []


def test_an_altered_object_is_named_and_does_not_run(service, children):
    job_id = service.create_job()
    service.storage.put_bytes(service.file(service.job(job_id).training_file_id).storage_key, b"other rows")
    service.agent("pass").run_next(never)
    assert service.job(job_id).error_code == "system_object_altered"
    assert children == []


def test_litter_of_dead_workers_is_removed_and_live_folders_are_kept(service):
    job_id = service.create_job()
    with unit_of_work(service.engine) as session:
        lease = work.claim(session, "alive", ["tune"])
    root = service.settings.home / "scratch" / "tune"
    for name in (f"{job_id}.{lease.fence}", f"{job_id}.{lease.fence - 1}", "ftjob-unknown.7", "no-fence.x"):
        (root / name).mkdir(parents=True)
    service.agent("pass").clean_up()
    assert [path.name for path in root.iterdir()] == [f"{job_id}.{lease.fence}"]


def test_the_log_of_a_failed_trainer_is_kept_for_the_operator(service):
    service.create_job()
    service.agent("bug").run_next(never)
    [log] = (service.settings.home / "logs" / "trainers").iterdir()
    assert "a bug in the trainer" in log.read_text()


def test_progress_is_visible_while_the_job_runs(service, when):
    job_id = service.create_job()
    seen: list[tuple[Stage, dict[str, object]]] = []

    def look() -> None:
        job = service.job(job_id)
        seen.append((job.stage, job.progress))
        service.cancel(job_id)

    when(lambda: service.job(job_id).progress, look)
    service.agent("slow").run_next(never)
    [(stage, progress)] = seen
    assert stage is Stage.TRAINING
    assert progress["total_steps"] == 200
    assert progress["step"] >= 1
    assert progress["eta_seconds"] == 0.1
