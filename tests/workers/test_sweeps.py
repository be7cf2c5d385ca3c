"""What sweeps end, remove and forget, and what they must never touch: whatever may be somebody else's."""

from __future__ import annotations

import asyncio
import os
import time

import pytest
from sqlalchemy import select

from app.database import read_session, unit_of_work
from app.domain.job_lifecycle import JobStatus
from app.files import service as files
from app.jobs import idempotency
from app.releases import service as releases
from app.storage import Storage
from app.tables.files import File
from app.tables.idempotency import AnsweredRequest
from app.tables.jobs import Job
from app.tables.work import WorkKind
from app.work import service as work
from workers import sweeps

DAYS = 86400.0


def never() -> bool:
    return False


@pytest.fixture
def days_later(monkeypatch):
    """Makes what was written before old; the grace age has passed for all of it."""

    def pass_by(days: float) -> None:
        for module in ("app.storage", "app.housekeeping.service"):
            monkeypatch.setattr(f"{module}.now", lambda: time.time() + days * DAYS)

    return pass_by


@pytest.fixture
def sweep_objects(service, days_later):
    def sweep(days: float = 2) -> None:
        days_later(days)
        sweeps.remove_abandoned_objects(service.engine, service.storage, service.settings)

    return sweep


def put(service, *keys: str) -> None:
    for key in keys:
        service.storage.put_bytes(key, b"x")


def remaining(service, *keys: str) -> list[bool]:
    return [service.storage.exists(key) for key in keys]


def expire(service, file_id: str, *, seconds_ago: float = 1.0) -> None:
    with unit_of_work(service.engine) as session:
        session.get(File, file_id).expires_at = time.time() - seconds_ago


def test_attempts_that_nobody_settled_are_removed_and_results_are_kept(service, sweep_objects):
    tried_again = service.create_job()
    service.agent("suicide").run_next(never)
    service.agent("pass").run_next(never)
    assert service.item(tried_again).fence == 2
    kept = service.job(tried_again).candidate["prefix"]
    blocked = service.create_job()
    service.agent("block").run_next(never)
    running = service.create_job()
    with unit_of_work(service.engine) as session:
        lease = work.claim(session, "alive", [WorkKind.TUNE])
    assert (lease.subject_id, lease.fence) == (running, 1)
    litter = [
        f"releases/{tried_again}/1/adapter_model.safetensors",
        f"results/{tried_again}/1/step_metrics.csv",
        f"releases/{blocked}/1/adapter_model.safetensors",
    ]
    in_use = [f"quarantine/{running}/1/adapter_model.safetensors", f"quarantine/{blocked}/1/manifest.json"]
    put(service, *litter, *in_use)
    before = set(service.storage.list(""))
    sweep_objects()
    assert before - set(service.storage.list("")) == set(litter)
    assert kept == f"releases/{tried_again}/2"
    assert [key for key in service.storage.list(kept) if key.endswith("manifest.json")]
    assert list(service.storage.list(f"results/{tried_again}/2"))


def test_what_this_database_does_not_know_may_be_somebody_elses(service, sweep_objects):
    """A fresh database beside a shared bucket, or a clone of an older state, removes nothing."""
    job_id = service.create_job()
    service.agent("pass").run_next(never)
    foreign = [
        "releases/ftjob-elsewhere/1/adapter_model.safetensors",
        "quarantine/ftjob-elsewhere/1/adapter_model.safetensors",
        "results/ftjob-elsewhere/1/step_metrics.csv",
        f"releases/{job_id}/9/adapter_model.safetensors",  # a fence that was never handed out here
        "files/proj_elsewhere/file-elsewhere",
        "files/file-elsewhere",
        "files/proj_a/deeper/file-elsewhere",
    ]
    put(service, *foreign)
    sweep_objects(400)
    assert all(remaining(service, *foreign))


def test_nothing_young_is_removed(service, sweep_objects):
    job_id = service.create_job()
    service.agent("suicide").run_next(never)
    service.agent("pass").run_next(never)
    young = [f"releases/{job_id}/1/adapter_model.safetensors", "files/proj_a/file-without-a-row"]
    put(service, *young)
    sweep_objects(0.9)
    assert all(remaining(service, *young))
    sweep_objects(1.1)
    assert not any(remaining(service, *young))


def test_bytes_of_deleted_files_go_although_the_store_was_away_when_they_were_deleted(service, sweep_objects):
    deleted, expired, kept = (service.upload() for _ in range(3))
    keys = [service.file(file_id).storage_key for file_id in (deleted, expired, kept)]
    expire(service, expired)
    with unit_of_work(service.engine) as session:
        files.delete(session, service.principal.project_id, deleted)  # and then the process died
        files.expire(session)
    sweep_objects()
    assert remaining(service, *keys) == [False, False, True]


def test_a_deleted_result_file_goes_and_the_model_stays(service, sweep_objects):
    job_id = service.create_job()
    service.agent("pass").run_next(never)
    job = service.job(job_id)
    with unit_of_work(service.engine) as session:
        key = files.delete(session, service.principal.project_id, job.result_file_ids[0])
    sweep_objects()
    assert not service.storage.exists(key)
    assert service.storage.exists(f"{job.candidate['prefix']}/manifest.json")


def test_of_a_deleted_model_the_safety_report_remains(service, sweep_objects, days_later):
    job_id = service.create_job()
    service.agent("pass").run_next(never)
    job = service.job(job_id)
    with unit_of_work(service.engine) as session:
        releases.delete(session, service.principal.project_id, job.fine_tuned_model)
    before = list(service.storage.list(job.candidate["prefix"]))
    assert len(before) > 1
    sweep_objects(0.5)
    assert list(service.storage.list(job.candidate["prefix"])) == before
    sweep_objects(2)
    assert list(service.storage.list(job.candidate["prefix"])) == [job.report_key]


def test_what_a_killed_process_left_half_written_is_removed(service, sweep_objects):
    folder = service.settings.home / "objects" / "files" / "proj_a"

    async def name_while_writing() -> str:
        async with service.storage.writer("files/proj_a/half") as writer:
            await writer.write(b"x" * (9 << 20))
            [path] = folder.iterdir()
            return path.name

    name = asyncio.run(name_while_writing())
    assert name != "half", "the store writes beside the object"
    left, young = folder / name, folder / name.replace("half", "young")
    for path in (left, young):
        path.write_bytes(b"x")
    os.utime(young, (time.time() + 2 * DAYS,) * 2)
    sweep_objects()
    assert (left.exists(), young.exists()) == (False, True)


def test_an_object_that_cannot_be_removed_keeps_no_other_from_it(service, monkeypatch):
    file_ids = [service.upload() for _ in range(3)]
    for age, file_id in enumerate(reversed(file_ids)):
        expire(service, file_id, seconds_ago=age + 1)
    stuck, *others = [service.file(file_id).storage_key for file_id in file_ids]
    original = Storage.delete

    def delete(self, key):
        if key == stuck:
            raise PermissionError(key)
        original(self, key)

    monkeypatch.setattr(Storage, "delete", delete)
    sweeps.expire_files(service.engine, service.storage, service.settings)
    assert remaining(service, stuck, *others) == [True, False, False]
    assert all(service.file(file_id).deleted_at is not None for file_id in file_ids)


def test_expired_files_in_use_do_not_keep_others_waiting(service, monkeypatch):
    monkeypatch.setattr(files, "EXPIRE_BATCH", 1)
    job_id = service.create_job()
    in_use, free = service.job(job_id).training_file_id, service.upload()
    expire(service, in_use, seconds_ago=100)
    expire(service, free)
    sweeps.expire_files(service.engine, service.storage, service.settings)
    assert (service.file(in_use).deleted_at, service.file(free).deleted_at is None) == (None, False)
    service.cancel(job_id)
    sweeps.expire_files(service.engine, service.storage, service.settings)
    assert service.file(in_use).deleted_at is not None


def test_a_review_that_nobody_decided_ends_as_a_block(service):
    job_id = service.create_job()
    service.agent("review").run_next(never)
    with unit_of_work(service.engine) as session:
        session.get(Job, job_id).review_deadline = time.time() - 1
    sweeps.expire_reviews(service.engine, service.storage, service.settings)
    job = service.job(job_id)
    assert (job.status, job.error_code) == (JobStatus.FAILED, "safety_gate_blocked")


def test_the_reconciler_rings_for_work_that_waits(service, monkeypatch):
    rung: list[str] = []
    monkeypatch.setattr("app.doorbell.ring", rung.append)
    service.create_job()
    rung.clear()
    with unit_of_work(service.engine) as session:
        work.ring_for_waiting(session, older_than_seconds=0)
    assert rung == ["tuning"]


def test_answers_are_forgotten_when_they_are_no_longer_given_again(service):
    with unit_of_work(service.engine) as session:
        for key in ("old", "young"):
            idempotency.remember(session, service.principal.project_id, key=key, digest="d", body={})
    with unit_of_work(service.engine) as session:
        old = session.scalars(select(AnsweredRequest).where(AnsweredRequest.key == "old")).one()
        old.created_at = time.time() - idempotency.KEY_SECONDS - 1
    sweeps.forget_answers(service.engine, service.storage, service.settings)
    with read_session(service.engine) as session:
        assert session.scalars(select(AnsweredRequest.key)).all() == ["young"]


def test_a_sweep_that_fails_keeps_no_other_waiting_and_has_its_turn_again(service, monkeypatch):
    ran: list[str] = []

    def broken(*_: object) -> None:
        ran.append("broken")
        raise OSError("the store is away")

    def fine(*_: object) -> None:
        ran.append("fine")

    monkeypatch.setattr(sweeps, "SCHEDULE", {broken: 0.0, fine: 3600.0})
    due: dict[sweeps.Sweep, float] = {}
    for _ in range(2):
        sweeps.run_due(due, never, service.engine, service.storage, service.settings)
    assert ran == ["broken", "fine", "broken"]
    sweeps.run_due({}, lambda: True, service.engine, service.storage, service.settings)
    assert len(ran) == 3
