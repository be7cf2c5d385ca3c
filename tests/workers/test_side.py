"""The side process's work: validation in a bounded child, and going on after a fault."""

from __future__ import annotations

import json
import time

import pytest
from sqlalchemy import select

from app.database import read_session, unit_of_work
from app.domain.job_lifecycle import JobStatus
from app.files import service as files
from app.jobs import service as jobs
from app.jobs.schemas import JobCreate
from app.tables.files import File, FileStatus
from app.tables.work import WorkItem, WorkState
from workers import side, validating
from workers.child_output import parse_message
from workers.supervisor import Child
from workers.validating import Validator


def never() -> bool:
    return False


@pytest.fixture
def validator(service) -> Validator:
    return Validator(service.engine, service.storage, service.settings)


@pytest.fixture
def file_row(service):
    def read(file_id: str) -> File:
        with read_session(service.engine) as session:
            return session.scalars(select(File).where(File.id == file_id)).one()

    return read


@pytest.fixture
def item_of(service):
    def read(subject_id: str) -> WorkItem:
        with read_session(service.engine) as session:
            return session.scalars(select(WorkItem).where(WorkItem.subject_id == subject_id)).one()

    return read


def create_waiting_job(service, file_id: str) -> str:
    with unit_of_work(service.engine) as session:
        request = JobCreate(model=service.base_name, training_file=file_id)
        return jobs.create(session, service.principal, request).id


def test_a_good_file_is_processed_and_the_job_that_waited_is_queued(service, validator, file_row):
    file_id = service.upload(validated=False)
    job_id = create_waiting_job(service, file_id)
    assert service.job(job_id).status is JobStatus.VALIDATING_FILES
    assert validator.run_next(never)
    assert file_row(file_id).status is FileStatus.PROCESSED
    assert file_row(file_id).rows == 20
    assert service.job(job_id).status is JobStatus.QUEUED
    assert not validator.run_next(never)


def test_a_bad_file_names_the_line_and_fails_the_job_that_waited(service, validator, file_row):
    row = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    file_id = service.upload(validated=False, text=(row + "\n") * 10 + "{not json\n")
    job_id = create_waiting_job(service, file_id)
    validator.run_next(never)
    assert file_row(file_id).status is FileStatus.ERROR
    assert "line 11" in file_row(file_id).status_details
    job = service.job(job_id)
    assert (job.status, job.error_code, job.error_param) == (JobStatus.FAILED, "invalid_training_file", "training_file")


def test_a_missing_object_is_our_fault_and_ends_the_wait(service, validator, file_row):
    file_id = service.upload(validated=False)
    job_id = create_waiting_job(service, file_id)
    service.storage.delete(file_row(file_id).storage_key)
    validator.run_next(never)
    assert file_row(file_id).status is FileStatus.ERROR
    assert service.job(job_id).status is JobStatus.FAILED


def test_a_validator_that_runs_out_of_memory_refuses_the_file(service, validator, file_row, monkeypatch):
    monkeypatch.setattr(validating, "MEMORY_LIMIT_BYTES", 1 << 20)
    file_id = service.upload(validated=False)
    validator.run_next(never)
    assert file_row(file_id).status is FileStatus.ERROR
    assert "memory" in file_row(file_id).status_details


def test_a_killed_validator_is_tried_again_and_then_given_up(service, validator, file_row, monkeypatch):
    original = Child.read

    def kill_first(self, timeout=0.1):
        self.kill()
        return original(self, timeout)

    file_id = service.upload(validated=False)
    job_id = create_waiting_job(service, file_id)
    monkeypatch.setattr(Child, "read", kill_first)
    for _ in range(2):
        validator.run_next(never)
        assert file_row(file_id).status is FileStatus.UPLOADED, "a kill says nothing about the file"
    validator.run_next(never)
    assert file_row(file_id).status is FileStatus.ERROR
    assert service.job(job_id).status is JobStatus.FAILED


def test_a_file_deleted_before_validation_is_left_alone(service, validator, file_row, item_of):
    file_id = service.upload(validated=False)
    with unit_of_work(service.engine) as session:
        files.delete(session, service.principal.project_id, file_id)
    assert not validator.run_next(never)
    assert item_of(file_id).state is WorkState.CANCELLED


def test_a_draining_validator_hands_the_file_back(service, validator, item_of):
    file_id = service.upload(validated=False, text="x" * (8 << 20))
    validator.run_next(lambda: True)
    assert (item_of(file_id).state, item_of(file_id).attempt) in {(WorkState.QUEUED, 0), (WorkState.DONE, 1)}


def test_the_side_process_goes_on_after_a_fault_and_stops_when_asked(service, monkeypatch, file_row):
    monkeypatch.setattr(side, "PAUSE_AFTER_FAULT_SECONDS", 0.05)
    faults = iter([OSError("the store is away"), OSError("still")])
    original = Validator.run

    def faulty(self, stop):
        for fault in faults:
            raise fault
        original(self, stop)

    monkeypatch.setattr(Validator, "run", faulty)
    file_id = service.upload(validated=False)
    deadline = time.monotonic() + 30

    def stop() -> bool:
        return time.monotonic() > deadline or file_row(file_id).status is FileStatus.PROCESSED

    side.run(service.engine, service.storage, service.settings, stop)
    assert file_row(file_id).status is FileStatus.PROCESSED


@pytest.mark.parametrize("line", [b"", b"{", b"[1]", b"null", b'{"type": 3}', b"\xff", b"[" * 100_000])
def test_what_is_no_message_is_none(line):
    assert parse_message(line) is None


def test_values_that_no_database_takes_are_cleaned():
    assert parse_message(b'{"type": "event", "message": "a\\u0000b", "x": NaN, "y": Infinity}') == {
        "type": "event", "message": "ab", "x": None, "y": None,
    }  # fmt: skip
