"""A policy is published only with a set of every role, strange to each other where a job needs them to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from app.database import read_session
from app.errors import InvalidRequest, Unavailable
from app.safety import provider_sets, publishing
from app.safety import service as safety
from app.safety.library import BUNDLED_ASSETS
from app.safety.provider_sets import NewSet
from app.safety.schemas import PolicyDraft, SetRole
from app.storage import Storage
from app.tables.safety import Policy, ProviderSet
from tests.app.safety.sets import import_all, import_rows, row, rows

NAMED = dict.fromkeys(SetRole, "mine")


def publish(engine: Engine, storage: Storage, sets: dict[SetRole, str], **changes: Any) -> Policy:
    draft = PolicyDraft.model_validate({"name": "strict", "sets": sets, **changes})
    return publishing.publish(engine, storage, draft, base_model_id=None, published_by="olga")


def refused(engine: Engine, storage: Storage, sets: dict[SetRole, str]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        publish(engine, storage, sets)
    with read_session(engine) as session:
        assert safety.list_policies(session, after=None, limit=1).data == []
    return caught.value


@pytest.fixture
def imported(engine: Engine, storage: Storage, tmp_path: Path) -> dict[SetRole, ProviderSet]:
    return import_all(engine, storage, tmp_path)


def test_sets_may_be_named_by_id_by_name_or_by_version(
    engine: Engine, storage: Storage, tmp_path: Path, imported: dict[SetRole, ProviderSet]
) -> None:
    newer = import_rows(engine, storage, tmp_path, SetRole.HARMFUL, rows(SetRole.HARMFUL, 4))
    newest = publish(engine, storage, NAMED)
    assert newest.body["sets"] == {role.value: one.id for role, one in imported.items()} | {"harmful": newer.id}
    older = publish(
        engine, storage, {**NAMED, SetRole.HARMFUL: "mine@1", SetRole.REFUSALS: imported[SetRole.REFUSALS].id}
    )
    assert older.body["sets"] == {role.value: one.id for role, one in imported.items()}
    assert [(one.version, one.published_by) for one in (newest, older)] == [(1, "olga"), (2, "olga")]
    again = publish(engine, storage, NAMED)
    assert again.id == newest.id, "what is said again is no new version"


def test_what_a_policy_says_is_what_its_jobs_are_bound_to(
    engine: Engine, storage: Storage, imported: dict[SetRole, ProviderSet]
) -> None:
    policy = publish(engine, storage, NAMED, limits={"harmful_score": 0.02}, max_answer_tokens=99)
    with read_session(engine) as session:
        body = safety.read_body(safety.find_policy(session, "base_x", "strict"))
        assert set(safety.get_sets(session, body)) == set(SetRole)
    assert (body.limits.harmful_score, body.max_answer_tokens) == (0.02, 99)
    assert policy.body == body.model_dump(mode="json")


@pytest.mark.parametrize("role", SetRole)
def test_a_policy_without_a_set_of_a_role_is_refused(
    engine: Engine, storage: Storage, imported: dict[SetRole, ProviderSet], role: SetRole
) -> None:
    error = refused(engine, storage, {one: name for one, name in NAMED.items() if one is not role})
    assert (error.code, error.param) == ("missing_required_parameter", f"sets.{role.value}")


@pytest.mark.parametrize("reference", ["nobody", "mine@7", "pset_x", "@", "mine@", ""])
def test_a_set_that_is_not_there_is_refused(
    engine: Engine, storage: Storage, imported: dict[SetRole, ProviderSet], reference: str
) -> None:
    error = refused(engine, storage, {**NAMED, SetRole.RETENTION: reference})
    assert (error.code, error.param) == ("unknown_provider_set", "sets.retention")


def test_a_set_serves_no_other_role_than_its_own(
    engine: Engine, storage: Storage, imported: dict[SetRole, ProviderSet]
) -> None:
    error = refused(engine, storage, {**NAMED, SetRole.HARMLESS_CONFIRMATION: imported[SetRole.RETENTION].id})
    assert (error.code, error.param) == ("wrong_set_role", "sets.harmless_confirmation")


@pytest.mark.parametrize(
    ("measured", "seen"),
    [
        ("harm_selection", "harmful"),
        ("harm_selection", "refusals"),
        ("harm_confirmation", "harmful"),
        ("harm_confirmation", "refusals"),
        ("harm_confirmation", "harm_selection"),
        ("harmless_selection", "retention"),
        ("harmless_confirmation", "retention"),
        ("harmless_confirmation", "harmless_selection"),
    ],
)
def test_sets_that_share_a_prompt_are_refused_by_id_and_never_quoted(
    engine: Engine,
    storage: Storage,
    tmp_path: Path,
    imported: dict[SetRole, ProviderSet],
    measured: str,
    seen: str,
) -> None:
    text = "What, on the other hand, is UNSPEAKABLE?"
    shared = [{"role": "user", "content": text}]
    shouted = [{"role": "user", "content": text.upper() + "!"}]
    import_rows(engine, storage, tmp_path, SetRole(seen), [row(SetRole(seen), 7, messages=shared)], "theirs")
    import_rows(engine, storage, tmp_path, SetRole(measured), [row(SetRole(measured), 8, messages=shouted)], "theirs")
    error = refused(engine, storage, {**NAMED, SetRole(measured): "theirs", SetRole(seen): "theirs"})
    assert (error.code, error.param) == ("provider_sets_overlap", f"sets.{measured}")
    assert f"'{measured}-8' and '{seen}-7' (equal prompt)" in error.message
    assert "UNSPEAKABLE" not in error.message.upper()


def test_a_set_whose_object_was_altered_is_not_believed(
    engine: Engine, storage: Storage, imported: dict[SetRole, ProviderSet]
) -> None:
    storage.put_bytes(imported[SetRole.RETENTION].storage_key, b"{}\n")
    with pytest.raises(Unavailable, match="altered"):
        publish(engine, storage, NAMED)


def test_the_bundled_sets_pass_the_check_that_every_policy_passes(engine: Engine, storage: Storage) -> None:
    for role in SetRole:
        path = BUNDLED_ASSETS / "sets" / f"{role.value}.jsonl"
        provider_sets.import_set(engine, storage, path, NewSet("bundled", role))
    published = publish(engine, storage, dict.fromkeys(SetRole, "bundled"))
    assert set(published.body["sets"]) == {role.value for role in SetRole}
