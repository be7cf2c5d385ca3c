"""The distributed shape as real processes: PostgreSQL, Redis, gateway, Celery workers, side process; a stand-in trainer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest
import redis as redis_client
from sqlalchemy import select

from app.database import open_engine, read_session
from app.tables.events import Event
from app.tables.releases import Release
from app.tables.work import WorkItem
from scripts.local_servers import free_port
from tests.e2e.conftest import alive, children_of, create_job, follow, service_environment, wait_until

CELERY = ("-m", "celery", "-A", "workers.celery_app", "worker", "-Q", "tuning", "-c", "1")
QUIET = ("--without-gossip", "--without-mingle")


@dataclass
class Cluster:
    """Processes by name; every one is ended by its pid."""

    environment: dict[str, str]
    folder: Path
    database_url: str
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    url: str = ""
    api_key: str = ""

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=self.api_key, max_retries=2)

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


@pytest.fixture
def cluster(tmp_path: Path, new_postgres_database: Callable[[], str], redis_url: str) -> Iterator[Cluster]:
    port = free_port()
    database_url = new_postgres_database()
    environment = service_environment(
        tmp_path / "home",
        "slow_once",
        THERIAC_DATABASE_URL=database_url,
        THERIAC_REDIS_URL=redis_url,
        THERIAC_GATEWAY__PORT=str(port),
    )
    one = Cluster(environment, tmp_path, database_url, url=f"http://127.0.0.1:{port}")
    migrated = subprocess.run(
        [sys.executable, "-m", "app.cli", "migrate"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert migrated.returncode == 0, migrated.stderr
    found = re.search(r"thk_\w+", migrated.stdout)
    assert found is not None
    one.api_key = found.group()
    one.start("gateway", "-m", "app.cli", "gateway")
    one.start("side", "-m", "workers.side")
    yield one
    everybody = {process.pid for process in one.processes.values()}
    everybody |= set().union(*(children_of(pid) for pid in everybody))
    for process in one.processes.values():
        if process.poll() is None:
            process.terminate()
    for process in one.processes.values():
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    left = alive(everybody)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "stopping the processes left children behind"


def test_jobs_survive_a_killed_worker_and_a_lost_broker_and_end_once(cluster, redis_url):
    wait_until(lambda: "startup complete" in cluster.log("gateway"), 60, "the gateway")
    client = cluster.client
    jobs = [create_job(client, suffix=f"job{number}").id for number in range(3)]
    wait_until(lambda: all(client.fine_tuning.jobs.retrieve(job).status == "queued" for job in jobs), 30, "validation")
    redis_client.Redis.from_url(redis_url).flushall()  # every ring so far is lost
    first, second = (cluster.start(name, *CELERY, *QUIET) for name in ("worker-1", "worker-2"))
    running = wait_until(
        lambda: [job for job in jobs if client.fine_tuning.jobs.retrieve(job).to_dict().get("progress")], 60, "progress"
    )
    wait_until(lambda: _trainers(first.pid) and _trainers(second.pid), 30, "two workers at work")
    killed = children_of(first.pid)
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: not alive(killed), 3, "the end of everything under the killed worker")
    second.send_signal(signal.SIGTERM)
    began = time.monotonic()
    second.wait(30)
    assert time.monotonic() - began < 20, "a drain takes seconds"
    cluster.start("worker-3", *CELERY, *QUIET)
    for job in jobs:
        assert follow(client, job, 90).status == "succeeded"
    assert running
    engine = open_engine(cluster.database_url)
    with read_session(engine) as session:
        assert Counter(session.scalars(select(Release.job_id))) == Counter(jobs)
        topics = Counter(session.execute(select(Event.subject_id, Event.topic).where(Event.topic.is_not(None))).all())
        items = {item.subject_id: item for item in session.scalars(select(WorkItem)) if item.kind == "tune"}
    engine.dispose()
    assert all(topics[(job, "fine_tuning.job.succeeded")] == 1 for job in jobs), "told once"
    # Three claims that finished, one that was drained, one whose worker died, and the reaper's seizure of that one.
    assert sorted(item.fence for item in items.values()) == [1, 2, 3]
    assert max(item.attempt for item in items.values()) == 2, "a kill counts as an attempt, a drain does not"
    for name in ("gateway", "side", "worker-3"):
        assert "Traceback" not in cluster.log(name), cluster.log(name)[-3000:]


def _trainers(pid: int) -> list[int]:
    found = []
    for child in children_of(pid):
        try:
            if b"standin_trainer" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
        except OSError:
            continue
    return found
