"""`/v1/files` on both databases: uploads in every shape, listing, content, deletion, other people's files."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, MutableMapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from app.database import unit_of_work
from app.errors import RequestTimeout, StorageFull
from app.files import service as files
from app.files.upload import FormReader, PartEnded, receive
from app.storage import ObjectWriter
from app.tables.files import File
from app.tables.work import WorkKind
from tests.app.product import DATASET, Product, claim, new_job, ready_file, upload, validate_next

BOUNDARY = "frontier"
FIELDS = {"id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status", "status_details"}


def form(*parts: tuple[str, bytes], end: bool = True) -> bytes:
    """A multipart body with its parts in the order given; a name with a slash carries a file name."""
    body = b""
    for name, content in parts:
        field, _, filename = name.partition("/")
        disposition = f'form-data; name="{field}"' + (f'; filename="{filename}"' if filename else "")
        body += f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"
    return body + (f"--{BOUNDARY}--\r\n".encode() if end else b"")


def post(client: TestClient, body: bytes, **headers: str) -> Any:
    content_type = f"multipart/form-data; boundary={BOUNDARY}"
    return client.post("/files", content=body, headers={"content-type": content_type, **headers})


def stored_objects(product: Product) -> list[str]:
    return sorted(product.storage.list("files"))


def test_an_upload_answers_with_every_field_and_waits_for_validation(product: Product, client: TestClient) -> None:
    response = post(client, form(("purpose", b"fine-tune"), ("file/train.jsonl", DATASET)))
    assert response.status_code == 200
    body = response.json()
    assert set(body) == FIELDS
    assert (body["object"], body["bytes"], body["filename"]) == ("file", len(DATASET), "train.jsonl")
    assert (body["purpose"], body["status"], body["expires_at"]) == ("fine-tune", "uploaded", None)
    assert body["id"].startswith("file-")
    assert claim(product, WorkKind.VALIDATE).subject_id == body["id"]
    assert product.storage.get_bytes(f"files/{body['id']}") == DATASET


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


def test_files_are_listed_newest_first_in_pages(client: TestClient) -> None:
    ids = [upload(client, name=f"{number}.jsonl") for number in range(5)]
    first = client.get("/files", params={"limit": 2}).json()
    assert [file["id"] for file in first["data"]] == [ids[4], ids[3]]
    assert (first["object"], first["has_more"], first["first_id"], first["last_id"]) == ("list", True, ids[4], ids[3])
    second = client.get("/files", params={"limit": 3, "after": ids[3]}).json()
    assert [file["id"] for file in second["data"]] == [ids[2], ids[1], ids[0]]
    assert second["has_more"] is False
    ascending = client.get("/files", params={"order": "asc", "after": ids[1]}).json()
    assert [file["id"] for file in ascending["data"]] == ids[2:]
    assert client.get("/files", params={"purpose": "batch"}).json()["data"] == []


def test_an_unknown_cursor_is_an_error_and_not_the_first_page(client: TestClient, stranger: TestClient) -> None:
    foreign = upload(stranger)
    for after in ("file-nonsense", foreign):
        response = client.get("/files", params={"after": after})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_cursor")


def test_somebody_elses_file_is_as_absent_as_an_unknown_one(
    product: Product, client: TestClient, stranger: TestClient
) -> None:
    file_id = ready_file(product, client)
    for method, path in (("GET", ""), ("GET", "/content"), ("GET", "/validation"), ("DELETE", "")):
        foreign = stranger.request(method, f"/files/{file_id}{path}")
        unknown = stranger.request(method, f"/files/file-unknown{path}")
        assert foreign.status_code == unknown.status_code == 404
        assert foreign.text == unknown.text.replace("file-unknown", file_id)
    assert stranger.get("/files").json()["data"] == []
    assert client.get(f"/files/{file_id}").status_code == 200


def test_a_deleted_file_is_gone_with_its_bytes(product: Product, client: TestClient) -> None:
    file_id = upload(client)
    assert client.delete(f"/files/{file_id}").json() == {"id": file_id, "object": "file", "deleted": True}
    assert client.get(f"/files/{file_id}").status_code == 404
    assert client.delete(f"/files/{file_id}").status_code == 404
    assert stored_objects(product) == []


def test_a_file_that_an_unfinished_job_needs_is_kept(product: Product, client: TestClient) -> None:
    file_id = ready_file(product, client)
    job_id = new_job(product, file_id)
    response = client.delete(f"/files/{file_id}")
    assert (response.status_code, response.json()["error"]["code"]) == (409, "file_in_use")
    assert response.headers["x-should-retry"] == "false"
    client.post(f"/fine_tuning/jobs/{job_id}/cancel")
    assert client.delete(f"/files/{file_id}").status_code == 200


def test_the_validation_report_says_where_and_what(product: Product, client: TestClient) -> None:
    file_id = upload(client, b'{"messages": []}\n' * 10)
    assert client.get(f"/files/{file_id}/validation").json()["verdict"] is None
    assert validate_next(product) == "error"
    file = client.get(f"/files/{file_id}").json()
    assert file["status"] == "error"
    assert file["status_details"] == ("line 1: expected at least one message at /messages [no_messages] (10 lines)")
    report = client.get(f"/files/{file_id}/validation").json()
    assert (report["verdict"], report["rules"][0]["id"], report["rules"][0]["count"]) == ("reject", "no_messages", 10)


def test_a_files_verdict_is_final(product: Product, client: TestClient) -> None:
    file_id = ready_file(product, client)
    with unit_of_work(product.engine) as session:
        files.give_up(session, file_id, "late")
    assert client.get(f"/files/{file_id}").json()["status"] == "processed"


def test_an_expired_file_is_gone_and_swept(
    product: Product, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [("purpose", b"fine-tune"), ("expires_after[anchor]", b"created_at"), ("expires_after[seconds]", b"3600")]
    file_id = post(client, form(*parts, ("file/x", DATASET))).json()["id"]
    later = client.get(f"/files/{file_id}").json()["expires_at"] + 1
    monkeypatch.setattr("app.files.repository.now", lambda: later)
    assert client.get(f"/files/{file_id}").status_code == 404
    with unit_of_work(product.engine) as session:
        assert files.expire(session) == [f"files/{file_id}"]


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
        asyncio.run(receive(silent(), content_type, product.storage, max_bytes=1 << 20, idle_seconds=0.05))
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
