"""Uploads on both databases: forms in every shape, limits, and what an upload that fails half-way leaves behind."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app.database import unit_of_work
from app.errors import PayloadTooLarge, RequestTimeout, StorageFull
from app.files import service as files
from app.files.endpoints import create
from app.files.upload import FormReader, PartEnded, Upload, receive
from app.storage import ObjectWriter
from app.tables.files import File
from app.tables.work import WorkKind
from tests.app.files.forms import BOUNDARY, form, post, stored_objects
from tests.app.product import DATASET, Product, claim, upload

FIELDS = {"id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status", "status_details"}


async def receive_as(product: Product, body: AsyncIterator[bytes], content_type: str, **limits: float) -> Upload:
    bounds: dict[str, Any] = {"project_id": product.principal.project_id, "max_bytes": 1 << 20, **limits}
    return await receive(body, content_type, product.storage, **bounds)


def test_an_upload_answers_with_every_field_and_waits_for_validation(product: Product, client: TestClient) -> None:
    response = post(client, form(("purpose", b"fine-tune"), ("file/train.jsonl", DATASET)))
    assert response.status_code == 200
    body = response.json()
    assert set(body) == FIELDS
    assert (body["object"], body["bytes"], body["filename"]) == ("file", len(DATASET), "train.jsonl")
    assert (body["purpose"], body["status"], body["expires_at"]) == ("fine-tune", "uploaded", None)
    assert body["id"].startswith("file-")
    assert claim(product, WorkKind.VALIDATE).subject_id == body["id"]
    assert stored_objects(product) == [f"files/{product.principal.project_id}/{body['id']}"]
    assert product.storage.get_bytes(stored_objects(product)[0]) == DATASET


def test_the_parts_of_the_form_may_come_in_any_order(client: TestClient) -> None:
    parts = [
        ("file/d.jsonl", DATASET),
        ("expires_after[seconds]", b"7200"),
        ("purpose", b"fine-tune"),
        ("expires_after[anchor]", b"created_at"),
    ]
    body = post(client, form(*parts)).json()
    assert body["expires_at"] - body["created_at"] == 7200


def test_the_stored_digest_is_that_of_the_bytes_sent(product: Product, client: TestClient) -> None:
    content = os.urandom(3 << 20) + b"\r\n--frontie\r\n--frontier-"  # almost boundaries, cut anywhere by the parser
    file_id = post(client, form(("purpose", b"fine-tune"), ("file/x", content))).json()["id"]
    assert client.get(f"/files/{file_id}/content").content == content
    with unit_of_work(product.engine) as session:
        assert files.get(session, product.principal.project_id, file_id).sha256 == hashlib.sha256(content).hexdigest()


BAD_FORMS = [
    (form(("purpose", b"fine-tune")), "missing_required_parameter", "file"),
    (form(("file/x", DATASET)), "missing_required_parameter", "purpose"),
    (form(("purpose", b"assistants"), ("file/x", DATASET)), "invalid_purpose", "purpose"),
    (form(("purpose", b"fine-tune"), ("file/x", b"")), "empty_file", "file"),
    (form(("purpose", b"fine-tune"), ("file/x", DATASET), ("file/y", DATASET)), "invalid_request", "file"),
    (form(("purpose", b"fine-tune"), ("file/x", DATASET), ("mood", b"good")), "unknown_parameter", None),
    (form(("purpose", b"x" * 9000), ("file/x", DATASET)), "malformed_form", None),
    (form(*[("purpose", b"fine-tune")] * 20, ("file/x", DATASET)), "malformed_form", None),
    (form(("purpose", b"fine-tune"), ("file/x", DATASET), end=False), "incomplete_upload", "file"),
    (b"no form at all", "malformed_form", "file"),
    (
        form(("purpose", b"fine-tune"), ("expires_after[anchor]", b"now"), ("file/x", DATASET)),
        "invalid_request",
        "expires_after[anchor]",
    ),
    *[
        (
            form(
                ("purpose", b"fine-tune"),
                ("expires_after[anchor]", b"created_at"),
                ("expires_after[seconds]", seconds),
                ("file/x", DATASET),
            ),
            "invalid_request",
            "expires_after[seconds]",
        )
        for seconds in (b"3599", b"2592001", b"soon", b"-1", b"9" * 40)
    ],
]


@pytest.mark.parametrize(("body", "code", "param"), BAD_FORMS)
def test_a_bad_form_is_refused_and_leaves_nothing(
    product: Product, client: TestClient, body: bytes, code: str, param: str | None
) -> None:
    response = post(client, body)
    assert response.status_code == 400
    assert (response.json()["error"]["code"], response.json()["error"]["param"]) == (code, param)
    assert stored_objects(product) == []
    assert client.get("/files").json()["data"] == []


def test_another_content_type_is_refused(client: TestClient) -> None:
    response = client.post("/files", json={"purpose": "fine-tune"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "file")
    response = post(client, form(("purpose", b"fine-tune")), **{"content-encoding": "gzip"})
    assert response.json()["error"]["code"] == "unsupported_encoding"


@pytest.mark.parametrize("length", [256, 257, 5000])
def test_a_boundary_longer_than_any_is_malformed(client: TestClient, length: int) -> None:
    body = form(("purpose", b"fine-tune"), ("file/x", DATASET)).replace(BOUNDARY.encode(), b"b" * length)
    response = post(client, body, **{"content-type": f"multipart/form-data; boundary={'b' * length}"})
    assert response.status_code == (200 if length == 256 else 400)
    assert length == 256 or response.json()["error"]["code"] == "malformed_form"


def test_nothing_is_read_after_the_end_of_the_form(product: Product) -> None:
    taken: list[bytes] = []

    async def endless() -> AsyncIterator[bytes]:
        yield form(("purpose", b"fine-tune"), ("file/x", DATASET))
        while True:
            taken.append(b"x" * 65536)
            assert len(taken) < 100
            yield taken[-1]

    upload = asyncio.run(receive_as(product, endless(), f"multipart/form-data; boundary={BOUNDARY}"))
    assert (upload.stored.bytes, len(taken)) == (len(DATASET), 0)


def test_bytes_that_belong_to_no_part_count_too(product: Product) -> None:
    """Line ends before the first boundary are no file bytes, and the parser skips them without end."""
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            assert taken < 100
            yield b"\r\n" * 32768

    with pytest.raises(PayloadTooLarge):
        asyncio.run(receive_as(product, endless(), f"multipart/form-data; boundary={BOUNDARY}"))
    assert stored_objects(product) == []


def test_a_server_answers_an_upload_whose_body_does_not_end(product: Product, serve: Callable[[FastAPI], str]) -> None:
    host, port = serve(product.app).removeprefix("http://").split(":")
    head = (
        f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {product.api_key}\r\n"
        f"content-type: multipart/form-data; boundary={BOUNDARY}\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    body = form(("purpose", b"fine-tune"), ("file/x", DATASET))
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode() + f"{len(body):x}\r\n".encode() + body + b"\r\n5\r\nafter\r\n")
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_a_file_over_the_limit_is_answered_413_declared_or_not(product: Product, client: TestClient) -> None:
    body = form(("purpose", b"fine-tune"), ("file/x", b"x" * ((4 << 20) + 1)))
    declared = post(client, form(("purpose", b"fine-tune"), ("file/x", b"x" * (5 << 20))))
    chunked = client.post(
        "/files",
        content=(body[start : start + 65536] for start in range(0, len(body), 65536)),
        headers={"content-type": f"multipart/form-data; boundary={BOUNDARY}"},
    )
    for response in (declared, chunked):
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "file_too_large"
    assert stored_objects(product) == []
    exact = form(("purpose", b"fine-tune"), ("file/x", b"x" * (4 << 20)))
    assert post(client, exact).status_code == 200


def test_a_full_disk_answers_507_and_leaves_nothing(
    product: Product, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(self: ObjectWriter, chunk: bytes) -> None:
        raise StorageFull("full")

    monkeypatch.setattr(ObjectWriter, "write", full)
    response = post(client, form(("purpose", b"fine-tune"), ("file/x", DATASET)))
    assert response.status_code == 507
    assert response.json()["error"]["code"] == "storage_full"
    assert int(response.headers["retry-after"]) > 0
    assert stored_objects(product) == []


def test_an_upload_whose_row_cannot_be_written_leaves_no_object(
    product: Product, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> File:
        raise RuntimeError("the database went away")

    monkeypatch.setattr(files, "create", broken)
    response = post(client, form(("purpose", b"fine-tune"), ("file/x", DATASET)))
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "database went away" not in response.text
    assert stored_objects(product) == []


def test_an_upload_whose_row_was_written_keeps_its_object_whatever_came_after(
    product: Product, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit may have reached the database although its acknowledgement did not reach us."""

    @contextmanager
    def unacknowledged(engine: Engine) -> Iterator[Session]:
        with unit_of_work(engine) as session:
            yield session
        raise OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))

    monkeypatch.setattr("app.files.endpoints.unit_of_work", unacknowledged)
    assert post(client, form(("purpose", b"fine-tune"), ("file/x", DATASET))).status_code == 503
    [file] = client.get("/files").json()["data"]
    assert client.get(f"/files/{file['id']}/content").content == DATASET


def test_an_upload_given_up_while_its_row_is_written_keeps_its_object(
    product: Product, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is shut down cancels the request; the thread that commits goes on."""
    reached, go_on = threading.Event(), threading.Event()
    original = files.create

    def slow(*args: Any, **named: Any) -> File:
        reached.set()
        assert go_on.wait(10)
        return original(*args, **named)

    class Request:
        def __init__(self) -> None:
            self.headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}

        async def stream(self) -> AsyncIterator[bytes]:
            yield form(("purpose", b"fine-tune"), ("file/x", DATASET))

    async def give_up() -> None:
        request: Any = Request()
        call = create(request, product.principal, product.storage, product.engine, product.app.state.settings)
        task = asyncio.create_task(call)
        assert await asyncio.to_thread(reached.wait, 10)
        task.cancel()
        await asyncio.wait([task], timeout=0.2)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    monkeypatch.setattr(files, "create", slow)
    asyncio.run(give_up())
    deadline = time.monotonic() + 10
    while not (listed := client.get("/files").json()["data"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert client.get(f"/files/{listed[0]['id']}/content").content == DATASET


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\rows.jsonl", "rows.jsonl"),
        ("a\u202egpj.jsonl", "agpj.jsonl"),
        ("x" * 400, "x" * 255),
        ("..", "upload"),
        ("snow ☃.jsonl", "snow ☃.jsonl"),
    ],
)
def test_a_file_name_is_display_text_only(client: TestClient, sent: str, shown: str) -> None:
    assert client.get(f"/files/{upload(client, name=sent)}").json()["filename"] == shown


def test_bytes_are_written_once_and_not_through_a_temporary_file(
    product: Product, client: TestClient, tmp_path: Path
) -> None:
    upload(client)
    written = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert len(written) == 1
    assert written[0].read_bytes() == DATASET


def test_a_client_that_goes_away_leaves_nothing(
    product: Product, serve: Callable[[FastAPI], str], logged: list[MutableMapping[str, Any]]
) -> None:
    host, port = serve(product.app).removeprefix("http://").split(":")
    head = (
        f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {product.api_key}\r\n"
        f"content-type: multipart/form-data; boundary={BOUNDARY}\r\ncontent-length: 3000000\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + form(("purpose", b"fine-tune"), ("file/x", b"x" * 1_000_000), end=False))
    deadline = time.monotonic() + 10
    while "client_gone" not in {line["event"] for line in logged}:
        assert time.monotonic() < deadline, logged
        time.sleep(0.01)
    assert stored_objects(product) == []
    assert "unexpected_error" not in {line["event"] for line in logged}


def test_a_client_that_falls_silent_is_not_waited_for(product: Product) -> None:
    async def silent() -> AsyncIterator[bytes]:
        yield form(("purpose", b"fine-tune"), ("file/x", DATASET), end=False)
        await asyncio.sleep(60)

    content_type = f"multipart/form-data; boundary={BOUNDARY}"
    with pytest.raises(RequestTimeout):
        asyncio.run(receive_as(product, silent(), content_type, idle_seconds=0.05))
    assert stored_objects(product) == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(content=st.binary(max_size=3000), cuts=st.lists(st.integers(0, 4000), max_size=12))
def test_a_form_means_the_same_however_it_is_cut(content: bytes, cuts: list[int]) -> None:
    body = form(("file/x", content), ("purpose", b"fine-tune"))
    reader = FormReader(f"multipart/form-data; boundary={BOUNDARY}")
    edges = sorted({0, *[cut for cut in cuts if cut < len(body)], len(body)})
    for start, end in pairwise(edges):
        reader.feed(body[start:end])
    assert reader.ended
    if f"--{BOUNDARY}".encode() not in content:
        pieces = list(reader.events)
        first_end = next(place for place, event in enumerate(pieces) if isinstance(event, PartEnded))
        assert b"".join(piece for piece in pieces[:first_end] if isinstance(piece, bytes)) == content
