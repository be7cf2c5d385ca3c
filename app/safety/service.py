"""Policies and gate runs: what a job is judged by, frozen when it is created.

Knows: that a policy's body never changes (a change is a new version), and how a job's wish becomes a recovery plan
inside its policy's bounds.
Refuses to know: jobs, releases, how a verdict is reached, how sets come here (`provider_sets`) and whether they may
stand beside each other (`publishing`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.database import unit_of_work
from app.errors import Conflict, InvalidRequest, NotFound, Unavailable
from app.kit.ids import new_id
from app.kit.pagination import Keyset, Page, fetch_page
from app.safety import repository
from app.safety.library import (
    BUNDLED_ASSETS,
    MethodSpec,
    RecoveryPlan,
    default_specs,
    digest_bytes,
    method_name,
)
from app.safety.provider_sets import register_set, store_set
from app.safety.schemas import AutoRecovery, FrozenPolicy, NoRecovery, PolicyBody, SafetyRequest, SetRole
from app.storage import Storage
from app.tables.safety import GateRun, Policy, ProviderSet, Verdict

BUNDLED_NAME = "apothecary"
DEFAULT_POLICY = "default"
KEYSET = Keyset(Policy.created_at, Policy.id)
VERSION = re.compile(r"[0-9]{1,9}")  # what a column of 32 bits can be compared with


def publish_policy(
    session: Session, name: str, body: PolicyBody, *, base_model_id: str | None = None, published_by: str | None = None
) -> Policy:
    """A new version, or the version that already says exactly this. `publishing` checks the sets before."""
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
        published_by=published_by,
    )
    session.add(policy)
    try:
        session.flush()
    except IntegrityError as error:
        raise Conflict(
            f"Another version of {name!r} was published at the same moment; try again.", code="policy_version_taken"
        ) from error
    return policy


def list_policies(session: Session, *, after: str | None, limit: int) -> Page[Policy]:
    """Newest first."""
    cursor = None
    if after is not None:
        last = repository.get_policy(session, after)
        if last is None:
            raise InvalidRequest("'after' names no policy.", code="invalid_cursor", param="after")
        cursor = (last.created_at, last.id)
    return fetch_page(session, repository.all_policies(), KEYSET, cursor=cursor, limit=limit)


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
    if recovery.output == "sparse-patch":
        raise InvalidRequest(
            f"Recovery {name!r} with form 'patch' gives no adapter that could be released; ask for form 'adapter'.",
            param="recovery.form",
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
