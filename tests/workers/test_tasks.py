"""Celery's side: the settings that keep a ring harmless, and what a ring does."""

from __future__ import annotations

import pytest

from app.domain.job_lifecycle import JobStatus
from app.doorbell import Bell
from app.tables.files import FileStatus
from workers import celery_app, runtime
from workers.sweeps import SCHEDULE
from workers.tasks import sweep, wake, webhooks


@pytest.fixture
def in_child(service, monkeypatch):
    """The tasks' process-wide runtime, pointed at this test's service."""
    agent = service.agent("pass")
    made = runtime.Runtime(service.engine, service.storage, agent.settings)
    for module in (wake, webhooks, sweep):
        monkeypatch.setattr(module, "runtime", lambda: made)
    wake.agent.cache_clear()
    yield
    wake.agent.cache_clear()


def test_the_settings_make_a_lost_or_doubled_ring_harmless():
    conf = celery_app.app.conf
    assert conf.task_acks_late is False
    assert conf.task_ignore_result is True
    assert conf.accept_content == ["json"]
    assert conf.worker_disable_prefetch is True
    assert conf.worker_prefetch_multiplier == 1
    assert conf.broker_transport_options["visibility_timeout"] == 300


def test_a_ring_for_tuning_works_until_nothing_waits(service, in_child):
    jobs = [service.create_job() for _ in range(2)]
    wake.wake(Bell.TUNING)
    assert {service.job(job).status for job in jobs} == {JobStatus.SUCCEEDED}
    wake.wake(Bell.TUNING)  # a doubled ring finds nothing
    assert all(service.item(job).fence == 1 for job in jobs)


def test_a_ring_for_validation_validates(service, in_child):
    file_id = service.upload(validated=False)
    wake.wake(Bell.VALIDATION)
    assert service.file(file_id).status is FileStatus.PROCESSED


def test_a_forged_ring_does_nothing(service, in_child):
    job = service.create_job()
    wake.wake("../../etc/passwd")
    assert service.job(job).status is JobStatus.QUEUED


def test_a_draining_worker_claims_nothing(service, in_child, monkeypatch):
    job = service.create_job()
    monkeypatch.setattr(wake, "draining", lambda: True)
    wake.wake(Bell.TUNING)
    assert service.job(job).status is JobStatus.QUEUED


def test_side_tasks_run_the_same_functions(service, in_child):
    sweep._due.clear()
    sweep.sweep()
    assert list(sweep._due) == list(SCHEDULE)
    webhooks.webhooks()
