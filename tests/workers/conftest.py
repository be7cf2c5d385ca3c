"""A service without its processes: database, store, bundled base and policy, and jobs ready to be worked on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select

from app.accounts.service import Principal
from app.base_models import service as base_models
from app.database import read_session, unit_of_work
from app.files import service as files
from app.files.service import NewFile
from app.jobs import service as jobs
from app.jobs.schemas import JobCreate
from app.safety import service as safety
from app.settings import Settings, WorkerSettings
from app.storage import Storage, open_storage
from app.tables.events import Event
from app.tables.files import File
from app.tables.jobs import Job
from app.tables.work import WorkItem, WorkKind
from app.work import service as work
from tests.databases import engine, new_project, postgres_with_tables
from workers.agent import Agent

__all__ = ["engine", "new_project", "postgres_with_tables"]

STANDIN = Path(__file__).with_name("standin_trainer.py")
ROWS = "".join(
    json.dumps({"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}) + "\n"
    for n in range(20)
)


@dataclass
class Service:
    """What the drills look at and turn."""

    engine: Engine
    storage: Storage
    settings: Settings
    base_name: str
    principal: Principal

    def agent(self, behaviour: str, **bounds: Any) -> Agent:
        """An agent whose trainer is the stand-in, behaving as named."""
        command = (sys.executable, str(STANDIN), behaviour)
        worker = self.settings.worker.model_copy(update={"trainer_command": command, **bounds})
        return Agent(self.engine, self.storage, self.settings.model_copy(update={"worker": worker}))

    def upload(self, *, validated: bool = True, text: str = ROWS) -> str:
        file_id = files.new_file_id()
        stored = self.storage.put_bytes(files.storage_key(self.principal.project_id, file_id), text.encode())
        with unit_of_work(self.engine) as session:
            files.create(session, self.principal.project_id, NewFile(file_id, "train.jsonl", "fine-tune"), stored)
        if validated:
            with unit_of_work(self.engine) as session:
                lease = work.claim(session, "side", [WorkKind.VALIDATE])
                assert lease is not None
                files.settle_validation(session, lease, {"verdict": "accept", "rows": 20})
                work.complete(session, lease)
        return file_id

    def create_job(self, **request: Any) -> str:
        body = {"model": self.base_name, "training_file": self.upload(), **request}
        with unit_of_work(self.engine) as session:
            return jobs.create(session, self.principal, JobCreate.model_validate(body)).id

    def job(self, job_id: str) -> Job:
        with read_session(self.engine) as session:
            return session.scalars(select(Job).where(Job.id == job_id)).one()

    def item(self, job_id: str) -> WorkItem:
        with read_session(self.engine) as session:
            return session.scalars(select(WorkItem).where(WorkItem.subject_id == job_id)).one()

    def file(self, file_id: str) -> File:
        with read_session(self.engine) as session:
            return session.scalars(select(File).where(File.id == file_id)).one()

    def events(self, job_id: str) -> list[Event]:
        with read_session(self.engine) as session:
            return list(session.scalars(select(Event).where(Event.subject_id == job_id).order_by(Event.seq)))

    def cancel(self, job_id: str) -> None:
        with unit_of_work(self.engine) as session:
            jobs.cancel(session, self.principal.project_id, job_id)


@pytest.fixture
def service(engine: Engine, new_project: Callable[[str], str], tmp_path: Path) -> Service:
    quick = WorkerSettings(
        lease_seconds=8, heartbeat_seconds=0.2, self_fence_seconds=6, poll_seconds=0.05, reap_seconds=0.1,
        cancel_grace_seconds=1, backoff_seconds=0, stage_timeout_seconds=30,
    )  # fmt: skip
    settings = Settings(home=tmp_path / "home", worker=quick)
    storage = open_storage(settings)
    base = base_models.register_bundled(engine)
    safety.install_bundled(engine, storage, base_model_id=base.id)
    project_id = new_project("proj_a")
    return Service(engine, storage, settings, base.name, Principal(project_id, "org_test", "key_test"))
