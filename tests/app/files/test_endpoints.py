"""`/v1/files` on both databases: listing, reports, deletion, expiry, other people's files."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event

from app.database import unit_of_work
from app.files import service as files
from app.jobs import service as jobs
from app.jobs.schemas import JobCreate
from app.storage import Storage
from app.tables.files import File
from tests.app.files.forms import form, post, stored_objects
from tests.app.product import BASE, DATASET, Product, new_job, ready_file, upload, validate_next


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


def test_a_page_goes_on_behind_a_file_that_ended_meanwhile(product: Product, client: TestClient) -> None:
    ids = [upload(client, name=f"{number}.jsonl") for number in range(4)]
    client.delete(f"/files/{ids[2]}")
    with unit_of_work(product.engine) as session:
        session.get_one(File, ids[1]).expires_at = time.time() - 1
    for ended, expected in ((ids[2], [ids[0]]), (ids[1], [ids[0]])):
        page = client.get("/files", params={"after": ended}).json()
        assert [file["id"] for file in page["data"]] == expected


def test_only_the_validation_report_is_read_when_it_is_asked_for(product: Product, client: TestClient) -> None:
    """A report may hold hundreds of samples, a list ten thousand files."""
    file_id = ready_file(product, client)
    said: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        said.append(statement)

    event.listen(product.engine, "before_cursor_execute", note)
    try:
        for path in ("", f"/{file_id}", f"/{file_id}/content"):
            assert client.get(f"/files{path}").status_code == 200
        assert said and not [statement for statement in said if "report" in statement]
        assert client.get(f"/files/{file_id}/validation").json()["verdict"] == "accept"
    finally:
        event.remove(product.engine, "before_cursor_execute", note)
    assert [statement for statement in said if "report" in statement]


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


def test_a_deletion_holds_although_the_store_is_away(
    product: Product, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep removes the bytes later."""
    file_id = upload(client)

    def away(self: Storage, key: str) -> None:
        raise OSError("the store is away")

    monkeypatch.setattr(Storage, "delete", away)
    assert client.delete(f"/files/{file_id}").json()["deleted"] is True
    assert client.get(f"/files/{file_id}").status_code == 404
    assert len(stored_objects(product)) == 1


def test_a_file_that_an_unfinished_job_needs_is_kept(product: Product, client: TestClient) -> None:
    file_id = ready_file(product, client)
    job_id = new_job(product, file_id)
    response = client.delete(f"/files/{file_id}")
    assert (response.status_code, response.json()["error"]["code"]) == (409, "file_in_use")
    assert response.headers["x-should-retry"] == "false"
    client.post(f"/fine_tuning/jobs/{job_id}/cancel")
    assert client.delete(f"/files/{file_id}").status_code == 200


def test_a_file_is_not_deleted_from_under_a_job_that_is_being_created(product: Product, client: TestClient) -> None:
    file_id = ready_file(product, client)
    request = JobCreate.model_validate({"model": BASE, "training_file": file_id})
    with ThreadPoolExecutor(1) as pool:
        with unit_of_work(product.engine) as session:
            jobs.create(session, product.principal, request)
            answer = pool.submit(client.delete, f"/files/{file_id}")
            time.sleep(0.3)
            assert not answer.done(), "it waits for the job's transaction"
        assert (answer.result().status_code, answer.result().json()["error"]["code"]) == (409, "file_in_use")
    assert client.get(f"/files/{file_id}").status_code == 200


def test_a_file_does_not_expire_from_under_a_job_that_is_being_created(
    product: Product, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_id = ready_file(product, client)
    with unit_of_work(product.engine) as session:
        session.get_one(File, file_id).expires_at = time.time() + 3600
    request = JobCreate.model_validate({"model": BASE, "training_file": file_id})

    def expire() -> list[str]:
        with unit_of_work(product.engine) as session:
            return files.expire(session)

    with ThreadPoolExecutor(1) as pool:
        with unit_of_work(product.engine) as session:
            jobs.create(session, product.principal, request)
            monkeypatch.setattr("app.files.repository.now", lambda: time.time() + 7200)
            expired = pool.submit(expire)
            time.sleep(0.3)
        assert expired.result() == []
    assert expire() == []


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
        assert files.expire(session) == [files.storage_key(product.principal.project_id, file_id)]
