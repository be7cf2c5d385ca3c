"""Who reads what of a fault of ours: operators the whole of it, customers a sentence and a code."""

from __future__ import annotations

import errno
import time

import pytest

from app.database import unit_of_work
from app.domain.job_lifecycle import JobStatus
from app.jobs import service as jobs
from app.work import service as work
from workers.bridge import Fault, faults_named
from workers.reaper import reap


def never() -> bool:
    return False


def test_customers_read_no_name_of_a_machine_and_operators_do(service):
    job_id = service.create_job()
    for _ in range(3):
        with unit_of_work(service.engine) as session:
            jobs.start(session, work.claim(session, "host-7:4711:x", ["tune"], lease_seconds=0.05))
        time.sleep(0.1)
        reap(service.engine, service.settings.worker)
    job = service.job(job_id)
    assert job.error_code == "attempts_exhausted"
    assert "host-7" in service.item(job_id).last_error
    assert not any("host-7" in text for text in (job.error_message, *(e.message for e in service.events(job_id))))


@pytest.mark.parametrize("behaviour", ["confess", "retryable"])
def test_what_a_trainer_says_of_its_own_faults_is_not_the_customers(service, behaviour):
    job_id = service.create_job()
    service.agent(behaviour).run_waiting(never)
    job = service.job(job_id)
    assert job.status is JobStatus.FAILED
    assert "/srv" not in job.error_message
    assert "No space left" not in job.error_message


def test_a_fault_of_the_disk_names_the_path_to_the_operator_only():
    with pytest.raises(Fault) as failed, faults_named():
        raise PermissionError(errno.EACCES, "Permission denied", "/srv/theriac/objects/x")
    assert "/srv" not in failed.value.error.message
    assert "/srv/theriac/objects/x" in str(failed.value)
