"""`/v1/admin/provider-sets` and `/v1/admin/policies`: import, look, publish; for operators, and never a row."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from fastapi.testclient import TestClient

from app.admin import endpoints, receiving
from app.admin.receiving import received
from app.errors import RequestTimeout
from app.safety.schemas import SetRole
from tests.app.product import BASE, Product, new_job, ready_file
from tests.app.safety.sets import import_all, jsonl, row, rows

SETS = "/admin/provider-sets"
HARMFUL = jsonl(rows(SetRole.HARMFUL))
WANTED = {"name": "mine", "role": "harmful"}


def error_of(response: Any) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_a_set_is_imported_and_shown_without_its_rows(
    operator: TestClient, logged: list[MutableMapping[str, Any]]
) -> None:
    response = operator.post(SETS, params=WANTED, content=HARMFUL)
    assert response.status_code == 200, response.text
    made = response.json()
    assert made == {
        "object": "provider_set",
        "id": made["id"],
        "name": "mine",
        "role": "harmful",
        "split": "recovery",
        "version": 1,
        "sha256": made["sha256"],
        "rows": 3,
        "groups": 0,
        "categories": {},
        "imported_by": "olga",
        "created_at": made["created_at"],
    }
    assert operator.get(f"{SETS}/{made['id']}").json() == made
    listed = operator.get(SETS, params={"role": "harmful"}).json()
    assert (listed["object"], listed["first_id"], listed["has_more"]) == ("list", made["id"], False)
    [line] = [line for line in logged if line["event"] == "provider_set.imported"]
    assert (line["set_id"], line["by"]) == (made["id"], "olga")
    assert "placeholder" not in json.dumps([*map(str, logged), made, listed])
    assert operator.post(SETS, params=WANTED, content=HARMFUL).json()["id"] == made["id"]
    assert error_of(operator.get(f"{SETS}/pset_x")) == (404, "not_found", "set_id")


def test_pages_of_sets_follow_each_other(operator: TestClient) -> None:
    for count in (1, 2, 3):
        operator.post(SETS, params={**WANTED, "name": "paged"}, content=jsonl(rows(SetRole.HARMFUL, count)))
    page = operator.get(SETS, params={"role": "harmful", "limit": 2}).json()
    assert ([one["version"] for one in page["data"]], page["has_more"]) == ([3, 2], True)
    rest = operator.get(SETS, params={"role": "harmful", "limit": 2, "after": page["last_id"]}).json()
    assert [one["version"] for one in rest["data"]][:1] == [1]
    assert error_of(operator.get(SETS, params={"after": "pset_x"})) == (400, "invalid_cursor", "after")


def test_a_line_that_is_no_row_is_named_and_not_quoted(operator: TestClient) -> None:
    bad = jsonl(
        [row(SetRole.HARMFUL, 0), row(SetRole.HARMFUL, 1, messages=[{"role": "user", "content": ["unspeakable"]}])]
    )
    response = operator.post(SETS, params=WANTED, content=bad)
    assert error_of(response) == (400, "invalid_provider_set", "file")
    assert "Line 2" in response.text and "'harmful-1'" in response.text
    assert "unspeakable" not in response.text


@pytest.mark.parametrize(
    ("params", "headers", "expected"),
    [
        ({"name": "mine"}, {}, (400, "missing_required_parameter", "role")),
        ({"name": "mine", "role": "poison"}, {}, (400, "invalid_value", "role")),
        ({"name": "a@1", "role": "harmful"}, {}, (400, "invalid_value", "name")),
        (WANTED, {"content-encoding": "gzip"}, (400, "unsupported_encoding", "file")),
        (WANTED, {"content-type": "multipart/form-data; boundary=x"}, (400, "unsupported_media_type", "file")),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused(
    operator: TestClient, params: dict[str, str], headers: dict[str, str], expected: tuple[int, str, str]
) -> None:
    assert error_of(operator.post(SETS, params=params, content=HARMFUL, headers=headers)) == expected


def test_an_empty_body_is_no_set(operator: TestClient) -> None:
    assert error_of(operator.post(SETS, params=WANTED, content=b"")) == (400, "invalid_provider_set", "file")


@pytest.mark.parametrize("declared", [True, False])
def test_a_set_may_be_larger_than_a_json_body_and_has_a_limit_of_its_own(
    operator: TestClient, monkeypatch: pytest.MonkeyPatch, declared: bool
) -> None:
    def body() -> Iterator[bytes]:
        yield HARMFUL
        for _ in range(33):
            yield b"\n" * (64 << 10)

    content = b"".join(body()) if declared else body()
    assert operator.post(SETS, params=WANTED, content=content).json()["rows"] == 3
    monkeypatch.setattr(endpoints, "MAX_SET_BYTES", 2 << 20)
    content = b"".join(body()) if declared else body()
    assert error_of(operator.post(SETS, params=WANTED, content=content)) == (413, "file_too_large", "file")


def test_nothing_of_a_body_outlives_its_request(
    operator: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving.tempfile, "tempdir", str(tmp_path))
    before = set(tmp_path.iterdir())
    for content in (HARMFUL, b"{"):
        operator.post(SETS, params=WANTED, content=content)
    assert set(tmp_path.iterdir()) == before


def test_a_silent_client_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "IDLE_SECONDS", 0.01)

    async def say_nothing() -> MutableMapping[str, Any]:
        await asyncio.sleep(60)
        return {}

    async def receive() -> None:
        async with received(Request({"type": "http", "headers": []}, say_nothing), max_bytes=100):
            pass

    with pytest.raises(RequestTimeout):
        asyncio.run(receive())


def test_a_customer_finds_no_trace_of_provider_data(product: Product, client: TestClient, operator: TestClient) -> None:
    made = operator.post(SETS, params=WANTED, content=HARMFUL).json()
    for method, path in (("GET", SETS), ("GET", f"{SETS}/{made['id']}"), ("POST", f"{SETS}?name=mine&role=harmful")):
        assert error_of(client.request(method, path, content=HARMFUL if method == "POST" else None))[:2] == (
            404,
            "unknown_url",
        )
    assert error_of(client.get(f"/files/{made['id']}/content"))[0] == 404


def test_a_policy_is_published_and_used_by_the_next_job(
    product: Product, client: TestClient, operator: TestClient, tmp_path: Path
) -> None:
    import_all(product.engine, product.storage, tmp_path)
    draft = {
        "name": "strict",
        "base_model": BASE,
        "sets": {role.value: "mine@1" for role in SetRole},
        "limits": {"harmful_score": 0.02},
    }
    response = operator.post("/admin/policies", json=draft)
    assert response.status_code == 200, response.text
    policy = response.json()
    assert (policy["name"], policy["version"], policy["base_model"]) == ("strict", 1, BASE)
    assert (policy["published_by"], policy["body"]["limits"]["harmful_score"]) == ("olga", 0.02)
    assert operator.post("/admin/policies", json=draft).json()["id"] == policy["id"]
    listed = operator.get("/admin/policies", params={"limit": 1}).json()
    assert (listed["data"], listed["has_more"]) == ([policy], True)
    assert operator.get("/admin/policies", params={"after": policy["id"]}).json()["data"][0]["name"] == "default"
    assert error_of(operator.get("/admin/policies", params={"after": "spol_x"}))[1] == "invalid_cursor"
    assert new_job(product, ready_file(product, client), safety={"policy": "strict@1"}).startswith("ftjob-")


def test_a_policy_whose_sets_overlap_is_refused_with_the_rows_at_fault(
    product: Product, operator: TestClient, tmp_path: Path
) -> None:
    import_all(product.engine, product.storage, tmp_path)
    shared = jsonl([row(SetRole.HARM_SELECTION, 5, messages=row(SetRole.HARMFUL, 1)["messages"])])
    operator.post(SETS, params={"name": "bad", "role": "harm_selection"}, content=shared)
    sets = {role.value: "mine" for role in SetRole} | {"harm_selection": "bad"}
    response = operator.post("/admin/policies", json={"name": "strict", "sets": sets})
    assert error_of(response) == (400, "provider_sets_overlap", "sets.harm_selection")
    assert "'harm_selection-5' and 'harmful-1' (equal prompt)" in response.text


@pytest.mark.parametrize(
    ("draft", "expected"),
    [
        ({"sets": {}}, "name"),
        ({"name": "a@1", "sets": {}}, "name"),
        ({"name": "strict", "sets": {}}, "sets.harmful"),
        ({"name": "strict", "sets": {"poison": "mine"}}, "sets.poison"),
        ({"name": "strict", "sets": {}, "limit": {}}, "limit"),
        ({"name": "strict", "sets": {}, "limits": {"harmful_score": 2}}, "limits"),
        ({"name": "strict", "sets": {}, "base_model": "nobody"}, "base_model"),
    ],
)
def test_a_policy_that_says_what_no_policy_says_is_refused(
    operator: TestClient, draft: dict[str, Any], expected: str
) -> None:
    status, _, param = error_of(operator.post("/admin/policies", json=draft))
    assert (status, param) == (400, expected)
