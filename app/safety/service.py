"""Policies, provider sets and gate runs: what a job is judged by, frozen when it is created.

Knows: that a policy's body never changes (a change is a new version), that sets are found by digest, and how a
job's wish becomes a recovery plan inside its policy's bounds.
Refuses to know: jobs, releases, and how a verdict is reached.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.database import unit_of_work
from app.errors import InvalidRequest, NotFound, Unavailable
from app.kit.ids import new_id
from app.safety import repository
from app.safety.library import (
    BUNDLED_ASSETS,
    MethodSpec,
    RecoveryPlan,
    default_specs,
    digest_bytes,
    digest_file,
    method_name,
)
from app.safety.schemas import AutoRecovery, FrozenPolicy, NoRecovery, PolicyBody, SafetyRequest, SetRole
from app.storage import Storage
from app.tables.safety import GateRun, Policy, ProviderSet, Verdict

BUNDLED_NAME = "apothecary"
DEFAULT_POLICY = "default"
VERSION = re.compile(r"[0-9]{1,9}")  # what a column of 32 bits can be compared with


@dataclass(frozen=True, slots=True)
class StoredSet:
    """A provider set whose bytes are in the store and whose row is not written yet."""

    role: SetRole
    sha256: str
    rows: int
    storage_key: str


def store_set(storage: Storage, role: SetRole, path: Path) -> StoredSet:
    """Puts a JSONL into the store under its digest; doing it again changes nothing."""
    digest = digest_file(path).sha256
    key = f"provider/sets/{digest}.jsonl"
    if not storage.exists(key):
        storage.put_file(key, path)
    with path.open("rb") as stream:
        rows = sum(1 for line in stream if line.strip())
    return StoredSet(role, digest, rows, key)


def register_set(session: Session, name: str, stored: StoredSet) -> ProviderSet:
    """The set's row: the existing one when name, role and digest are known, else the next version."""
    existing = repository.find_set(session, name, stored.role, stored.sha256)
    if existing is not None:
        return existing
    provider_set = ProviderSet(
        id=new_id("pset_"),
        name=name,
        role=stored.role.value,
        version=repository.last_set_version(session, name, stored.role) + 1,
        sha256=stored.sha256,
        rows=stored.rows,
        storage_key=stored.storage_key,
    )
    session.add(provider_set)
    session.flush()
    return provider_set


def publish_policy(session: Session, name: str, body: PolicyBody, *, base_model_id: str | None = None) -> Policy:
    """A new version, or the version that already says exactly this."""
    document = body.model_dump(mode="json")
    digest = policy_digest(document)
    existing = repository.find_policy_by_digest(session, name, digest, base_model_id)
    if existing is not None:
        return existing
    policy = Policy(
        id=new_id("spol_"),
        name=name,
        version=repository.last_policy_version(session, name) + 1,
        base_model_id=base_model_id,
        body=document,
        digest=digest,
    )
    session.add(policy)
    session.flush()
    return policy


def policy_digest(document: Mapping[str, Any]) -> str:
    """Independent of key order, and of what a database does to JSON while storing it."""
    return digest_bytes(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


def install_bundled(engine: Engine, storage: Storage, *, base_model_id: str, assets: Path = BUNDLED_ASSETS) -> str:
    """Registers the apothecary's provider sets and its `default` policy; returns the policy's id. Repeatable."""
    stored = [store_set(storage, role, assets / "sets" / f"{role}.jsonl") for role in SetRole]
    overrides = _bundled_overrides(assets)
    with unit_of_work(engine) as session:
        sets = {item.role: register_set(session, BUNDLED_NAME, item).id for item in stored}
        overrides.setdefault("max_answer_tokens", 64)  # a recipe has 17; garbled candidates would fill any limit
        overrides.setdefault("recovery", {"mode": "auto", "specs": [spec.model_dump() for spec in default_specs()]})
        body = PolicyBody.model_validate({**overrides, "sets": sets})
        return publish_policy(session, DEFAULT_POLICY, body, base_model_id=base_model_id).id


def _bundled_overrides(assets: Path) -> dict[str, Any]:
    path = assets / "policy.json"
    if not path.exists():
        return {}
    overrides: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return overrides


def freeze(
    session: Session, base_model_id: str, request: SafetyRequest, recovery: MethodSpec | AutoRecovery | NoRecovery
) -> FrozenPolicy:
    """The policy a new job is bound to, with the plan its recovery request resolves to."""
    policy = find_policy(session, base_model_id, request.policy)
    body = read_body(policy)
    return FrozenPolicy(
        policy_id=policy.id,
        name=policy.name,
        version=policy.version,
        digest=policy.digest,
        on_block=request.on_block,
        plan=plan_recovery(body, recovery).model_dump(mode="json"),
    )


def find_policy(session: Session, base_model_id: str, reference: str) -> Policy:
    """By `name` (newest active version) or `name@version`."""
    name, at, text = reference.partition("@")
    if at and not VERSION.fullmatch(text):
        raise InvalidRequest(
            "Write a policy as 'name' or 'name@version', for instance 'default@1'.", param="safety.policy"
        )
    policy = repository.find_policy(session, name, base_model_id, int(text) if at else None)
    if policy is None:
        raise InvalidRequest(
            f"There is no active safety policy {reference!r} for this model; ask the provider which ones there are.",
            code="unknown_policy",
            param="safety.policy",
        )
    return policy


def read_body(policy: Policy) -> PolicyBody:
    """The policy's body, refused when the row no longer matches its digest."""
    if policy_digest(policy.body) != policy.digest:
        raise Unavailable("The safety policy's row was altered after it was published.", code="policy_altered")
    return PolicyBody.model_validate(policy.body)


def plan_recovery(body: PolicyBody, recovery: MethodSpec | AutoRecovery | NoRecovery) -> RecoveryPlan:
    """The policy's plan, narrowed to what the job asked for; never wider."""
    plan = body.recovery
    if isinstance(recovery, NoRecovery):
        if not body.allow_unrepaired:
            raise InvalidRequest("This policy does not allow recovery 'none'.", param="recovery.method")
        return plan.model_copy(update={"mode": "none", "specs": ()})
    if isinstance(recovery, AutoRecovery):
        budget = min(plan.budget_seconds, recovery.budget_seconds or plan.budget_seconds)
        return plan.model_copy(
            update={"mode": "auto", "specs": plan.specs or default_specs(), "budget_seconds": budget}
        )
    _check_method(body, recovery)
    # A strength asks for exactly that strength; without one the method's own dial is searched.
    fixed = "strength" in recovery.model_fields_set
    return plan.model_copy(update={"mode": "fixed" if fixed else "auto", "specs": (recovery,)})


def _check_method(body: PolicyBody, recovery: MethodSpec) -> None:
    """A policy that lists methods offers these, else all; strength 0 is `none` by another name."""
    offered = [method_name(type(spec)) for spec in body.recovery.specs]
    name = method_name(type(recovery))
    if offered and name not in offered:
        raise InvalidRequest(
            f"This policy does not offer recovery {name!r}, only {', '.join(dict.fromkeys(offered))}.",
            code="recovery_method_not_offered",
            param="recovery.method",
        )
    if recovery.strength == 0 and not body.allow_unrepaired:
        raise InvalidRequest("This policy does not allow strength 0, which repairs nothing.", param="recovery.strength")


def get_policy(session: Session, policy_id: str) -> Policy:
    policy = repository.get_policy(session, policy_id)
    if policy is None:
        raise NotFound("There is no such policy.")
    return policy


def get_sets(session: Session, body: PolicyBody) -> dict[SetRole, ProviderSet]:
    """Every set the policy names; one that is missing is our fault and stops the job."""
    found = {row.id: row for row in repository.get_sets(session, list(body.sets.values()))}
    missing = [role.value for role, set_id in body.sets.items() if set_id not in found]
    if missing:
        raise Unavailable(f"Provider sets are missing: {', '.join(missing)}.", code="provider_set_missing")
    return {role: found[set_id] for role, set_id in body.sets.items()}


def record_gate_run(
    session: Session, *, job_id: str, policy_id: str, candidate_digest: str, verdict: Verdict, report: Mapping[str, Any]
) -> GateRun:
    """One judgement of one candidate, in the transaction that acts on it."""
    gate_run = GateRun(
        id=new_id("gate_"),
        job_id=job_id,
        policy_id=policy_id,
        candidate_digest=candidate_digest,
        verdict=verdict,
        report=dict(report),
    )
    session.add(gate_run)
    session.flush()
    return gate_run


def list_gate_runs(session: Session, job_id: str) -> Sequence[GateRun]:
    """Every judgement of the job's candidates, oldest first."""
    return repository.list_gate_runs(session, job_id)


def last_gate_run(session: Session, job_id: str) -> GateRun | None:
    return repository.last_gate_run(session, job_id)
