"""Workers killed and frozen at random while jobs run: none lost, none finished twice, no zombie heard."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import select

from app.database import read_session
from app.domain.job_lifecycle import TERMINAL
from app.tables.events import Event
from app.tables.jobs import Job
from app.tables.releases import Release
from app.tables.safety import GateRun
from app.tables.work import WorkItem, WorkKind
from tests.workers.conftest import STANDIN, Service

JOBS, WORKERS, LEASE_SECONDS, CHAOS_SECONDS = 12, 3, 5.0, 45.0
ROOT = Path(__file__).resolve().parents[2]


def start_worker(service: Service, log: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "THERIAC_HOME": str(service.settings.home),
        "THERIAC_DATABASE_URL": service.engine.url.render_as_string(hide_password=False),
        "THERIAC_WORKER__TRAINER_COMMAND": json.dumps([sys.executable, str(STANDIN), "pass_slowly"]),
        "THERIAC_WORKER__LEASE_SECONDS": str(LEASE_SECONDS),
        "THERIAC_WORKER__HEARTBEAT_SECONDS": "0.5",
        "THERIAC_WORKER__SELF_FENCE_SECONDS": "4",
        "THERIAC_WORKER__BACKOFF_SECONDS": "0",
        "THERIAC_WORKER__POLL_SECONDS": "0.2",
        "THERIAC_WORKER__REAP_SECONDS": "0.5",
    }
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "workers.agent"], env=environment, stdout=output, stderr=output, cwd=ROOT
        )


def unfinished(service: Service) -> int:
    with read_session(service.engine) as session:
        return sum(status not in TERMINAL for status in session.scalars(select(Job.status)))


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1])
def test_kills_and_freezes_lose_nothing_and_double_nothing(service, tmp_path, seed):
    chance = random.Random(seed)
    jobs = [service.create_job() for _ in range(JOBS)]
    with service.engine.begin() as connection:
        # Every kill counts as an attempt; here the kills are ours, so they must not use the jobs up.
        connection.exec_driver_sql("UPDATE work SET max_attempts = 1000")
    workers = [start_worker(service, tmp_path / "workers.log") for _ in range(WORKERS)]
    frozen: dict[int, float] = {}
    kills = freezes = 0
    calm, deadline = time.monotonic() + CHAOS_SECONDS, time.monotonic() + 300
    try:
        while unfinished(service) and time.monotonic() < calm:
            time.sleep(chance.uniform(0.5, 1.5))
            index = chance.randrange(WORKERS)
            if workers[index].pid in frozen:
                if time.monotonic() > frozen[workers[index].pid]:
                    workers[index].send_signal(signal.SIGCONT)
                    del frozen[workers[index].pid]
            elif chance.random() < 0.5:
                workers[index].kill()
                workers[index].wait()
                workers[index] = start_worker(service, tmp_path / "workers.log")
                kills += 1
            else:
                workers[index].send_signal(signal.SIGSTOP)
                frozen[workers[index].pid] = time.monotonic() + LEASE_SECONDS * chance.uniform(1.2, 2)
                freezes += 1
        for worker in workers:
            worker.send_signal(signal.SIGCONT)
        while unfinished(service) and time.monotonic() < deadline:
            time.sleep(0.5)
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):
                worker.send_signal(signal.SIGCONT)
                worker.terminate()
        for worker in workers:
            worker.wait(60)
    assert kills + freezes >= 5, "the drill did not disturb anybody"
    with read_session(service.engine) as session:
        statuses = Counter(status.value for status in session.scalars(select(Job.status)))
        releases = Counter(session.scalars(select(Release.job_id)))
        gate_runs = Counter(session.scalars(select(GateRun.job_id)))
        told = Counter(session.scalars(select(Event.subject_id).where(Event.topic == "fine_tuning.job.succeeded")))
        items = session.scalars(select(WorkItem).where(WorkItem.kind == WorkKind.TUNE)).all()
    once = Counter(jobs)
    assert statuses == {"succeeded": JOBS}
    assert releases == gate_runs == told == once
    assert all(item.owner is None and item.state.value == "done" for item in items)
    assert not list((service.settings.home / "run" / "trainers").glob("*.json")), "no trainer is left"
