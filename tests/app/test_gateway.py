"""What every answer has in common: envelope, request id, authorization of every route, health, clean logs."""

from __future__ import annotations

import json
import re
from collections.abc import MutableMapping
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.errors import ServiceError
from app.files import service as files
from tests.app.product import Product, ask_as, ready_file, upload

ENVELOPE = {"message", "type", "param", "code"}
OPEN_PATHS = {"/healthz", "/readyz"}


def operations(product: Product) -> list[tuple[str, str]]:
    """Every operation of the public schema, with its path parameters filled in."""
    paths = product.app.openapi()["paths"]
    return [(verb.upper(), re.sub(r"\{[^}]+\}", "unknown", path)) for path, verbs in paths.items() for verb in verbs]


@pytest.fixture
def root(product: Product) -> TestClient:
    return TestClient(product.app, base_url="http://gateway", raise_server_exceptions=False)


def test_no_route_but_health_answers_without_a_key(product: Product, root: TestClient) -> None:
    listed = operations(product)
    assert len(listed) > 25
    for method, path in listed:
        if path in OPEN_PATHS:
            continue
        response = root.request(method, path)
        assert response.status_code in ({404} if "/admin/" in path else {401}), (method, path)
        assert set(response.json()["error"]) == ENVELOPE


def test_no_route_of_a_customer_finds_anything_of_a_stranger(product: Product, client: TestClient) -> None:
    """Every operation that names an object, asked for one that is not there, answers 404 in the envelope."""
    for method, path in operations(product):
        if "unknown" not in path or "/admin/" in path:
            continue
        response = client.request(method, path.removeprefix("/v1"), json={"event_type": "model.released"})
        assert response.status_code in {400, 404}, (method, path, response.text)
        assert set(response.json()["error"]) == ENVELOPE


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "unknown_url"),
        ("GET", "/files/a/b/c", 404, "unknown_url"),
        ("PUT", "/files", 405, "method_not_allowed"),
        ("DELETE", "/fine_tuning/jobs", 405, "method_not_allowed"),
        ("GET", "/fine_tuning/jobs?limit=0", 400, "invalid_value"),
        ("GET", "/fine_tuning/jobs?limit=many", 400, "invalid_value"),
        ("GET", "/files?limit=10001", 400, "invalid_value"),
        ("GET", "/files?order=sideways", 400, "invalid_value"),
    ],
)
def test_refusals_of_the_framework_wear_the_envelope(
    client: TestClient, method: str, path: str, status: int, code: str
) -> None:
    response = client.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert set(response.json()["error"]) == ENVELOPE
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-request-id"]


def test_a_body_that_is_too_large_is_answered_413_declared_or_not(client: TestClient) -> None:
    huge = b'{"model": "' + b"x" * (2 << 20) + b'"}'
    headers = {"content-type": "application/json"}
    declared = client.post("/fine_tuning/jobs", content=huge, headers=headers)
    chunked = client.post("/fine_tuning/jobs", content=iter([huge[: 1 << 20], huge[1 << 20 :]]), headers=headers)
    for response in (declared, chunked):
        assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize(
    ("offered", "kept"),
    [("my-id_1", True), ("x" * 64, True), ("x" * 65, False), ("a b", False), ("a\nb", False), ("", False)],
)
def test_a_request_id_is_always_returned(client: TestClient, offered: str, kept: bool) -> None:
    returned = client.get("/models", headers={"x-request-id": offered.replace("\n", "%0a")}).headers["x-request-id"]
    assert (returned == offered) is kept
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", returned)


def test_an_unexpected_fault_tells_nothing_but_its_request_id(
    product: Product, monkeypatch: pytest.MonkeyPatch, logged: list[MutableMapping[str, Any]]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("postgresql://user:hunter2@db/theriac")

    monkeypatch.setattr(files, "list_page", broken)
    response = ask_as(product, product.api_key).get("/files")
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "hunter2" not in response.text
    assert response.headers["x-request-id"]
    assert [line["event"] for line in logged if line["log_level"] == "error"] == ["unexpected_error"]


def test_every_refusal_of_the_tree_has_a_code_a_status_and_a_type() -> None:
    def tree(root: type[ServiceError]) -> list[type[ServiceError]]:
        return [root, *(leaf for child in root.__subclasses__() for leaf in tree(child))]

    for kind in tree(ServiceError):
        assert 400 <= kind.status < 600
        assert re.fullmatch(r"[a-z_]+", kind.code)
        assert kind.type in {
            "server_error", "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error",
        }  # fmt: skip


def test_health_and_readiness(product: Product, root: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert root.get("/healthz").json() == {"status": "ok"}
    # This database has its tables but was not migrated, which is what a forgotten migration looks like.
    unready = root.get("/readyz")
    assert (unready.status_code, unready.json()["error"]["code"]) == (503, "unavailable")
    assert unready.headers["x-should-retry"] == "true"


def test_logs_hold_no_content_no_key_and_no_query(
    product: Product, client: TestClient, logged: list[MutableMapping[str, Any]]
) -> None:
    canary = "CANARY-5512"
    file_id = ready_file(product, client)
    upload(client, f"{canary}\n".encode() * 12, name=f"{canary}.jsonl")
    client.post("/fine_tuning/jobs", json={"model": canary, "training_file": file_id, "metadata": {canary: canary}})
    client.get("/fine_tuning/jobs", params={f"metadata[{canary}]": canary})
    client.get(f"/files/{canary}", headers={"x-custom": canary})
    lines = json.dumps(logged, default=str)
    assert "request" in lines
    assert canary not in lines
    assert product.api_key not in lines


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "x" * 300, "\u202e", ""])
def test_no_text_in_a_body_is_a_fault_of_ours(product: Product, client: TestClient, text: str) -> None:
    file_id = upload(client)
    for wish in (
        {"suffix": text},
        {"metadata": {"k": text}},
        {"metadata": {text: "v"}},
        {"model": text},
        {"training_file": text},
        {"safety": {"policy": text}},
        {"recovery": {"method": text}},
        {"peft": {"target_modules": [text]}},
    ):
        body = json.dumps({"model": "tiny", "training_file": file_id, **wish})
        response = client.post("/fine_tuning/jobs", content=body, headers={"content-type": "application/json"})
        assert response.status_code in {200, 400}, (wish, response.text)
        if "\0" in text or "\ud800" in text:
            assert response.status_code == 400
            assert str(response.json()["error"]["param"]).startswith(next(iter(wish)))


@pytest.mark.parametrize("piece", ["%00", "%ff", "a%0d%0ab", "%F0%9F%98%80", "a" * 3000])
def test_no_url_is_a_fault_of_ours(client: TestClient, piece: str) -> None:
    for path in (
        f"/files/{piece}",
        f"/files?after={piece}",
        f"/files?purpose={piece}",
        f"/fine_tuning/jobs/{piece}/events?after={piece}",
        f"/fine_tuning/jobs?metadata[{piece}]={piece}",
        f"/models/{piece}",
        f"/models/x/artifact/{piece}",
    ):
        assert client.get(path).status_code < 500, path
