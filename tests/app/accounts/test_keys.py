"""Keys: their form, what opens a door and what does not, and what is never shown."""

from __future__ import annotations

import re
import time

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from app.accounts import keys, repository
from app.accounts import service as accounts
from app.database import BUSY_TIMEOUT_MS, read_session, unit_of_work
from app.errors import NotFound
from app.kit.clock import now
from tests.app.product import Product, ask_as


def test_a_keys_form_can_be_recognised_offline() -> None:
    key = keys.new_key("thk")
    assert re.fullmatch(r"thk_[A-Za-z0-9]{12}_[A-Za-z0-9]{32}_[A-Za-z0-9]{6}", key.text)
    assert keys.parse(key.text, "thk") == key
    assert keys.parse(key.text, "tho") is None
    assert keys.parse(key.text[:-1] + ("a" if key.text[-1] != "a" else "b"), "thk") is None
    swapped = key.text.replace(key.secret, key.secret[::-1])
    assert keys.parse(swapped, "thk") is None


def test_the_checksum_is_crc32_in_base_62() -> None:
    # crc32("thk_a_b") is 0xcbea1f21; its base-62 digits, by long division, are '3JwF8t'.
    assert keys.checksum("thk_a_b") == "3JwF8t"


def test_a_secret_is_neither_stored_nor_shown(product: Product) -> None:
    parsed = keys.parse(product.api_key, "thk")
    assert parsed is not None
    assert parsed.secret not in repr(parsed)
    with read_session(product.engine) as session:
        row = session.execute(text("SELECT * FROM api_key WHERE name = 'ours'")).one()
    assert parsed.secret not in str(row)
    assert parsed.digest in str(row)


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer nonsense", "Basic {key}", "{key}", "Bearer {key}x", "Bearer {operator}"],
)
def test_everything_but_a_live_key_is_answered_alike(product: Product, anybody: TestClient, header: str | None) -> None:
    sent = header.format(key=product.api_key, operator=product.operator_key) if header is not None else None
    response = anybody.get("/models", headers={"authorization": sent} if sent is not None else {})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
    unknown = anybody.get("/models", headers={"authorization": f"Bearer {keys.new_key('thk').text}"})
    assert unknown.json() == response.json()


def test_a_revoked_key_stops_at_once(product: Product, client: TestClient) -> None:
    assert client.get("/models").status_code == 200
    parsed = keys.parse(product.api_key, "thk")
    assert parsed is not None
    with unit_of_work(product.engine) as session:
        accounts.revoke_key(session, parsed.key_id)
    assert client.get("/models").status_code == 401
    with pytest.raises(NotFound), unit_of_work(product.engine) as session:
        accounts.revoke_key(session, parsed.key_id)


def test_a_revoked_operator_key_stops_at_once(product: Product, operator: TestClient) -> None:
    with unit_of_work(product.engine) as session:
        accounts.revoke_key(session, accounts.list_operator_keys(session)[0].id)
    assert operator.get("/admin/overview").status_code == 401


def test_an_expired_key_and_an_archived_project_are_refused(product: Product) -> None:
    with unit_of_work(product.engine) as session:
        _, old = accounts.issue_key(session, product.principal.project_id, "old", expires_at=now() - 1)
        _, new = accounts.issue_key(session, product.principal.project_id, "new", expires_at=now() + 60)
    assert ask_as(product, old).get("/models").status_code == 401
    assert ask_as(product, new).get("/models").status_code == 200
    with unit_of_work(product.engine) as session:
        session.execute(text("UPDATE project SET archived_at = 1"))
    assert ask_as(product, new).get("/models").status_code == 401


def test_use_is_noted_at_most_once_a_minute(product: Product, client: TestClient) -> None:
    def last_used() -> float | None:
        with read_session(product.engine) as session:
            return next(key.last_used_at for key in accounts.list_keys(session) if key.name == "ours")

    assert last_used() is None
    client.get("/models")
    first = last_used()
    assert first is not None
    client.get("/models")
    assert last_used() == first


def test_a_project_is_made_once(product: Product) -> None:
    with unit_of_work(product.engine) as session:
        first = accounts.ensure_default_project(session)
        assert accounts.ensure_default_project(session).id == first.id
        assert accounts.organization_of(session, first.id).name == "default"


def test_a_database_that_cannot_be_written_still_lets_readers_in(
    product: Product, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OperationalError("UPDATE api_key", {}, Exception("database or disk is full"))

    monkeypatch.setattr(repository, "touch", full)
    assert client.get("/models").status_code == 200


def test_nobody_who_reads_waits_for_a_writer(product: Product, client: TestClient) -> None:
    if product.engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL locks rows")
    with unit_of_work(product.engine) as session:
        session.execute(text("SELECT 1"))  # begins, and so holds the one write lock
        started = time.monotonic()
        assert client.get("/models").status_code == 200
        assert time.monotonic() - started < 2
    with unit_of_work(product.engine) as session:
        assert session.scalar(text("PRAGMA busy_timeout")) == BUSY_TIMEOUT_MS, "others have their patience back"
