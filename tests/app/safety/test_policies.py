"""Policies: versions instead of changes, plans never wider than the policy."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from sqlalchemy import Engine, select, text

from app.base_models import service as base_models
from app.database import read_session, unit_of_work
from app.errors import InvalidRequest, Unavailable
from app.safety import service as safety
from app.safety.library import SPECS, GateLimits, MethodSpec, RecoveryPlan, method_name, parse_spec
from app.safety.schemas import AutoRecovery, NoRecovery, PolicyBody, SafetyRequest, SetRole
from app.storage import Storage
from app.tables.safety import Policy, ProviderSet

SETS = dict.fromkeys(SetRole, "pset_x")


def body(**changes: object) -> PolicyBody:
    return PolicyBody.model_validate({"sets": SETS, **changes})


def test_the_same_body_is_the_same_version_and_another_is_the_next(engine: Engine) -> None:
    with unit_of_work(engine) as session:
        first = safety.publish_policy(session, "strict", body())
        same = safety.publish_policy(session, "strict", body())
        other = safety.publish_policy(session, "strict", body(limits=GateLimits(harmful_score=0.02)))
    assert (first.id, first.version) == (same.id, 1)
    assert (other.version, other.body["limits"]["harmful_score"]) == (2, 0.02)
    assert first.body["limits"]["harmful_score"] == 0.05


def test_the_newest_version_is_used_unless_one_is_named(engine: Engine) -> None:
    with unit_of_work(engine) as session:
        safety.publish_policy(session, "strict", body())
        safety.publish_policy(session, "strict", body(max_answer_tokens=99))
        assert safety.find_policy(session, "base_x", "strict").version == 2
        assert safety.find_policy(session, "base_x", "strict@1").version == 1
        for unknown in ("strict@3", "other", "strict@one"):
            with pytest.raises(InvalidRequest):
                safety.find_policy(session, "base_x", unknown)


def test_a_policy_that_was_altered_in_place_is_refused(engine: Engine) -> None:
    with unit_of_work(engine) as session:
        safety.publish_policy(session, "strict", body())
    with unit_of_work(engine) as session:
        session.execute(text("UPDATE policy SET body = '{\"sets\": {}}'"))
    with read_session(engine) as session, pytest.raises(Unavailable, match="altered"):
        safety.read_body(session.scalars(select(Policy)).one())


def test_a_job_may_narrow_the_plan_and_never_widen_it() -> None:
    policy = body(recovery=RecoveryPlan(budget_seconds=100))
    assert safety.plan_recovery(policy, AutoRecovery(budget_seconds=9999)).budget_seconds == 100
    assert safety.plan_recovery(policy, AutoRecovery(budget_seconds=5)).budget_seconds == 5
    assert safety.plan_recovery(policy, AutoRecovery()).specs
    dial = safety.plan_recovery(policy, parse_spec({"method": "antidote"}))
    exact = safety.plan_recovery(policy, parse_spec({"method": "antidote", "strength": 0.3}))
    assert (dial.mode, exact.mode, exact.specs[0].strength) == ("auto", "fixed", 0.3)
    assert safety.plan_recovery(policy, NoRecovery()).mode == "none"
    with pytest.raises(InvalidRequest) as refused:
        safety.plan_recovery(body(allow_unrepaired=False), NoRecovery())
    assert refused.value.param == "recovery.method"


def test_a_policys_training_method_stays_whatever_the_job_asks_for() -> None:
    training = {"method": "panacea-train", "rho": 0.25}
    policy = body(recovery={"training": training})
    for wish in (AutoRecovery(), NoRecovery(), parse_spec({"method": "antidote"})):
        plan = RecoveryPlan.model_validate(safety.plan_recovery(policy, wish).model_dump(mode="json"))
        assert plan.training is not None
        assert plan.training.rho == 0.25
    assert safety.plan_recovery(body(), AutoRecovery()).training is None
    with pytest.raises(ValidationError, match="training"):
        body(recovery={"training": {"method": "panacea-train", "rho": -1}})


def test_a_policy_that_lists_methods_offers_no_other() -> None:
    listing = body(recovery={"specs": [{"method": "antidote"}, {"method": "antidote", "max_rows": 5}]})
    assert safety.plan_recovery(listing, parse_spec({"method": "antidote"})).specs
    with pytest.raises(InvalidRequest, match="only antidote\\.") as refused:
        safety.plan_recovery(listing, parse_spec({"method": "scale-down"}))
    assert refused.value.param == "recovery.method"
    for spec in SPECS:
        assert safety.plan_recovery(body(), parse_spec({"method": method_name(spec)})).specs, "none listed: all offered"


def test_strength_0_is_the_raw_fine_tune_and_needs_the_same_permission() -> None:
    identity = parse_spec({"method": "scale-down", "strength": 0})
    assert safety.plan_recovery(body(), identity).specs == (identity,)
    with pytest.raises(InvalidRequest) as refused:
        safety.plan_recovery(body(allow_unrepaired=False), identity)
    assert refused.value.param == "recovery.strength"
    assert safety.plan_recovery(body(allow_unrepaired=False), parse_spec({"method": "scale-down"})).specs


@pytest.mark.parametrize("spec", SPECS, ids=method_name)
def test_every_number_a_job_may_set_is_bounded_and_finite(spec: type[MethodSpec]) -> None:
    knobs = [name for name, field in spec.model_fields.items() if field.annotation in {int, float}]
    assert "strength" in knobs
    for name in knobs:
        for number in (1e15, float("inf"), float("nan")):
            with pytest.raises(ValidationError, match=name):
                parse_spec({"method": method_name(spec), name: number})


def test_a_frozen_policy_is_what_the_job_keeps(engine: Engine) -> None:
    with unit_of_work(engine) as session:
        policy = safety.publish_policy(session, "default", body())
        frozen = safety.freeze(session, "base_x", SafetyRequest(on_block="review"), AutoRecovery())
        safety.publish_policy(session, "default", body(max_answer_tokens=5))
    assert (frozen.policy_id, frozen.digest, frozen.version, frozen.on_block) == (policy.id, policy.digest, 1, "review")


def test_the_bundled_policy_names_every_set_by_digest_and_is_repeatable(engine: Engine, storage: Storage) -> None:
    base = base_models.register_bundled(engine)
    policy_id = safety.install_bundled(engine, storage, base_model_id=base.id)
    assert safety.install_bundled(engine, storage, base_model_id=base.id) == policy_id
    with read_session(engine) as session:
        policy = safety.get_policy(session, policy_id)
        sets = safety.get_sets(session, safety.read_body(policy))
        rows = {row.role: row for row in session.scalars(select(ProviderSet))}
    assert set(sets) == set(SetRole)
    assert len(rows) == len(SetRole)
    for role, row in sets.items():
        content = storage.get_bytes(row.storage_key)
        assert safety.digest_bytes(content) == row.sha256
        assert content.count(b"\n") == row.rows > 0, role
    confirmation = sets[SetRole.HARM_CONFIRMATION]
    assert (confirmation.groups, confirmation.categories, confirmation.imported_by) == (160, {"curse": 320}, None)


def test_a_policy_with_a_missing_set_stops_the_job(engine: Engine) -> None:
    with read_session(engine) as session, pytest.raises(Unavailable, match="missing"):
        safety.get_sets(session, body())
