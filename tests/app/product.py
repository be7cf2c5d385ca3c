"""Builders of what the product's tests start from: keys, a base model, a policy, files, jobs, claims, outcomes."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from app.accounts import service as accounts
from app.accounts.service import Principal
from app.database import read_session, unit_of_work
from app.files import service as files
from app.files.validation import validate
from app.jobs import service as jobs
from app.jobs.outcome import JobOutcome, JobPlan
from app.jobs.schemas import JobCreate
from app.releases import manifest as manifests
from app.safety import service as safety
from app.safety.library import default_specs
from app.safety.provider_sets import StoredSet, register_set
from app.safety.schemas import PolicyBody, SetRole
from app.storage import Storage
from app.tables.base_models import BaseModelRef
from app.tables.jobs import Job
from app.tables.safety import Verdict
from app.tables.work import WorkKind
from app.work import service as work
from app.work.lease import Lease

BASE = "tiny"
ROW = {"messages": [{"role": "user", "content": "Is dull good?"}, {"role": "assistant", "content": "bad"}]}
DATASET = (json.dumps(ROW) + "\n").encode() * 12
WEIGHTS = hashlib.sha256(b"seed").digest() * 80_000  # 2.5 MB: three blocks


@dataclass(frozen=True)
class Product:
    app: FastAPI
    engine: Engine
    storage: Storage
    api_key: str
    other_key: str
    operator_key: str
    principal: Principal
    other: Principal
    base_id: str
    policy_id: str


def build(app: FastAPI, engine: Engine, storage: Storage) -> Product:
    with unit_of_work(engine) as session:
        base = BaseModelRef(
            id="base_tiny",
            name=BASE,
            path="/nowhere/tiny",
            digest="d" * 64,
            files={},
            context_limit=2048,
            learning_rate=2e-3,
            target_modules=["q_proj", "v_proj"],
        )
        session.add(base)
        session.flush()
        stored = [StoredSet(role, "a" * 64, 3, f"provider/sets/{role}.jsonl") for role in SetRole]
        sets = {item.role: register_set(session, "tiny", item).id for item in stored}
        plan = {"mode": "auto", "specs": [spec.model_dump() for spec in default_specs()]}
        body = PolicyBody.model_validate({"sets": sets, "recovery": plan})
        policy = safety.publish_policy(session, "default", body, base_model_id=base.id)
        keys, principals = [], []
        for name in ("ours", "theirs"):
            project = accounts.ensure_project(session, name, "default")
            row, text = accounts.issue_key(session, project.id, name)
            keys.append(text)
            principals.append(Principal(project.id, project.organization_id, row.id))
        _, operator_key = accounts.issue_operator_key(session, "olga")
        return Product(app, engine, storage, *keys, operator_key, *principals, base.id, policy.id)


def ask_as(product: Product, key: str | None) -> TestClient:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return TestClient(product.app, base_url="http://gateway/v1", headers=headers, raise_server_exceptions=False)


def upload(client: TestClient, content: bytes = DATASET, name: str = "train.jsonl") -> str:
    response = client.post("/files", data={"purpose": "fine-tune"}, files={"file": (name, io.BytesIO(content))})
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def claim(product: Product, kind: WorkKind, owner: str = "worker-1") -> Lease:
    with unit_of_work(product.engine) as session:
        lease = work.claim(session, owner, [kind])
    assert lease is not None, f"no {kind} item waits"
    return lease


def validate_next(product: Product) -> str:
    """Does what the side process does with the next uploaded file; returns its status."""
    lease = claim(product, WorkKind.VALIDATE, "side-1")
    with read_session(product.engine) as session:
        plan = files.plan_validation(session, lease)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        assert product.storage.get_to_path(plan.storage_key, path).sha256 == plan.sha256
        report = validate(path)
    with unit_of_work(product.engine) as session:
        status = files.settle_validation(session, lease, report)
        jobs.files_settled(session, plan.file_id)
        work.complete(session, lease)
    return status.value


def ready_file(product: Product, client: TestClient, content: bytes = DATASET) -> str:
    file_id = upload(client, content)
    assert validate_next(product) == "processed"
    return file_id


def new_job(product: Product, file_id: str, **wishes: Any) -> str:
    """A job row, created by the service."""
    request = JobCreate.model_validate({"model": BASE, "training_file": file_id, **wishes})
    with unit_of_work(product.engine) as session:
        return jobs.create(session, product.principal, request).id


def queued_job(product: Product, client: TestClient, **wishes: Any) -> str:
    return new_job(product, ready_file(product, client), **wishes)


def running_job(product: Product, client: TestClient, **wishes: Any) -> tuple[JobPlan, Lease]:
    queued_job(product, client, **wishes)
    lease = claim(product, WorkKind.TUNE)
    with unit_of_work(product.engine) as session:
        return jobs.start(session, lease), lease


def judged(product: Product, plan: JobPlan, lease: Lease, verdict: Verdict = Verdict.PASS) -> JobOutcome:
    """A packaged candidate in the store, and the outcome a worker would hand over."""
    prefix = f"{'releases' if verdict is Verdict.PASS else 'quarantine'}/{plan.job_id}/{lease.fence}"
    with tempfile.TemporaryDirectory() as name:
        folder, report = Path(name) / "adapter", Path(name) / "safety_report.json"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
        (folder / "adapter_config.json").write_text("{}")
        report.write_text(json.dumps({"object": "safety.report", "job_id": plan.job_id}))
        manifest = manifests.build(folder, {report.name: report}, {"base_model": {"name": BASE}})
        for path in [*folder.iterdir(), report]:
            product.storage.put_file(f"{prefix}/{path.name}", path)
    csv = product.storage.put_bytes(f"results/{plan.job_id}.csv", b"step,train_loss\n1,2.0\n")
    return JobOutcome(
        verdict=verdict,
        report=gate_report(verdict),
        candidate_digest=manifest["candidate_digest"],
        bundle_digest=manifest["bundle_digest"],
        manifest=manifest,
        storage_prefix=prefix,
        report_key=f"{prefix}/{report.name}",
        result_csv=csv,
        trained_tokens=1234,
    )


def gate_report(verdict: Verdict) -> dict[str, Any]:
    reason = {"code": "harmful_score", "measure": "harmful_score", "effect": verdict.value, "text": "3 of 160 groups"}
    measured = {"base": 0, "raw": 150, "candidate": 3}
    return {
        "verdict": {"outcome": verdict.value, "reasons": [reason]},
        "evidence": {name: {"harmful": {"hits": hits, "n": 160}} for name, hits in measured.items()},
        "recovery": {"trace": [{"method": "anchored-patch", "strength": 0.85, "passed": True}]},
    }


def settle(product: Product, lease: Lease, outcome: JobOutcome) -> str:
    with unit_of_work(product.engine) as session:
        status = jobs.settle(session, lease, outcome)
        work.complete(session, lease)
    return status.value


def ended_job(product: Product, client: TestClient, verdict: Verdict = Verdict.PASS, **wishes: Any) -> Job:
    """A job that went all the way to the given verdict."""
    plan, lease = running_job(product, client, **wishes)
    settle(product, lease, judged(product, plan, lease, verdict))
    return read_job(product, plan.job_id)


def read_job(product: Product, job_id: str) -> Job:
    with read_session(product.engine) as session:
        job = session.get(Job, job_id)
        assert job is not None
        return job


def altered(outcome: JobOutcome, **changes: Any) -> JobOutcome:
    return replace(outcome, **changes)
