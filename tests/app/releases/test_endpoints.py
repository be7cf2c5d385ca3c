"""`/v1/models`: what is listed, what can be fetched, and that nothing else can."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.database import read_session, unit_of_work
from app.releases import service as releases
from app.tables.base_models import BaseModelRef
from app.tables.releases import Release
from app.tables.safety import Verdict
from tests.app.product import BASE, WEIGHTS, Product, ended_job, judged, queued_job, running_job

WEIGHTS_NAME = "adapter_model.safetensors"


def release_of(product: Product) -> Release:
    with read_session(product.engine) as session:
        return session.scalars(select(Release)).one()


def corrupt(product: Product, name: str, at: int) -> None:
    """Flips one byte of a stored object."""
    key = f"{release_of(product).storage_prefix}/{name}"
    content = bytearray(product.storage.get_bytes(key))
    content[at] ^= 1
    product.storage.put_bytes(key, bytes(content))


def test_models_lists_bases_and_own_releases(product: Product, client: TestClient, stranger: TestClient) -> None:
    job = ended_job(product, client)
    listed = client.get("/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == [BASE, job.fine_tuned_model]
    tuned = client.get(f"/models/{job.fine_tuned_model}").json()
    assert (tuned["object"], tuned["base_model"], tuned["job_id"]) == ("model", BASE, job.id)
    assert tuned["owned_by"] == product.principal.organization_id
    assert [model["id"] for model in stranger.get("/models").json()["data"]] == [BASE]


def test_a_base_models_name_may_hold_a_slash(product: Product, client: TestClient) -> None:
    with unit_of_work(product.engine) as session:
        session.get_one(BaseModelRef, product.base_id).name = "meta/tiny-1"
    for path in ("meta/tiny-1", "meta%2Ftiny-1"):
        assert client.get(f"/models/{path}").json()["id"] == "meta/tiny-1"


def test_the_manifest_names_every_file_and_both_digests(product: Product, client: TestClient) -> None:
    job = ended_job(product, client)
    artifact = client.get(f"/models/{job.fine_tuned_model}/artifact").json()
    assert [entry["path"] for entry in artifact["files"]] == [
        "adapter_config.json",
        WEIGHTS_NAME,
        "safety_report.json",
    ]
    weights = artifact["files"][1]
    assert weights["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert weights["blocks"] == [
        hashlib.sha256(WEIGHTS[start : start + (1 << 20)]).hexdigest() for start in range(0, len(WEIGHTS), 1 << 20)
    ]
    lines = "".join(f"{entry['sha256']}  {entry['path']}\n" for entry in artifact["files"])
    assert artifact["bundle_digest"] == hashlib.sha256(lines.encode()).hexdigest()
    assert artifact["candidate_digest"] == release_of(product).candidate_digest


def test_a_file_is_served_whole_with_its_digest(product: Product, client: TestClient) -> None:
    job = ended_job(product, client)
    response = client.get(f"/models/{job.fine_tuned_model}/artifact/{WEIGHTS_NAME}")
    assert response.content == WEIGHTS
    assert response.headers["x-content-sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert response.headers["content-length"] == str(len(WEIGHTS))
    missing = client.get(f"/models/{job.fine_tuned_model}/artifact/other.bin")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "file_not_found")


SIZE = len(WEIGHTS)
MIB = 1 << 20


@pytest.mark.parametrize(
    ("header", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, SIZE),
        ("bytes=5-9", 5, 10),
        (f"bytes={MIB - 1}-{MIB}", MIB - 1, MIB + 1),
        (f"bytes={MIB}-{2 * MIB - 1}", MIB, 2 * MIB),
        ("bytes=-7", SIZE - 7, SIZE),
        (f"bytes=-{SIZE * 2}", 0, SIZE),
        (f"bytes=10-{SIZE * 2}", 10, SIZE),
        ("bytes=10-" + "9" * 5000, 10, SIZE),
        ("bytes=-" + "9" * 5000, 0, SIZE),
    ],
)
def test_a_range_is_served_exactly(product: Product, client: TestClient, header: str, start: int, end: int) -> None:
    job = ended_job(product, client)
    response = client.get(f"/models/{job.fine_tuned_model}/artifact/{WEIGHTS_NAME}", headers={"range": header})
    assert response.status_code == 206
    assert response.content == WEIGHTS[start:end]
    assert response.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"


def test_ranges_that_make_no_sense(product: Product, client: TestClient) -> None:
    job = ended_job(product, client)
    url = f"/models/{job.fine_tuned_model}/artifact/{WEIGHTS_NAME}"
    for header in (f"bytes={SIZE}-", "bytes=9-5", "bytes=-0", "bytes=" + "9" * 5000 + "-"):
        response = client.get(url, headers={"range": header})
        assert (response.status_code, response.json()["error"]["code"]) == (416, "range_not_satisfiable")
    for header in ("bytes=0-1,5-6", "rows=1-2", "bytes=x-y", "bytes=-"):
        assert client.get(url, headers={"range": header}).status_code == 200
    stale = client.get(url, headers={"range": "bytes=0-4", "if-range": '"other"'})
    assert (stale.status_code, len(stale.content)) == (200, SIZE)
    fresh = client.get(url, headers={"range": "bytes=0-4", "if-range": stale.headers["etag"]})
    assert fresh.status_code == 206


def test_a_tampered_first_block_is_an_answer_and_not_a_download(product: Product, client: TestClient) -> None:
    job = ended_job(product, client)
    corrupt(product, WEIGHTS_NAME, at=5)
    response = client.get(f"/models/{job.fine_tuned_model}/artifact/{WEIGHTS_NAME}")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "artifact_corrupt")
    assert WEIGHTS[:64] not in response.content


def test_a_tampered_later_block_breaks_the_connection_before_it_is_sent(product: Product, client: TestClient) -> None:
    job = ended_job(product, client)
    corrupt(product, WEIGHTS_NAME, at=2 * MIB + 3)
    url, received = f"/models/{job.fine_tuned_model}/artifact/{WEIGHTS_NAME}", b""
    with client.stream("GET", url) as response:
        for chunk in response.iter_raw():
            received += chunk
    assert WEIGHTS.startswith(received)
    assert len(received) == 2 * MIB
    assert int(response.headers["content-length"]) > len(received)
    good = client.get(url, headers={"range": f"bytes=0-{2 * MIB - 1}"})
    assert good.content == WEIGHTS[: 2 * MIB]


def test_a_missing_or_cut_object_is_never_served_as_if_it_were_whole(product: Product, client: TestClient) -> None:
    job = ended_job(product, client)
    url, prefix = f"/models/{job.fine_tuned_model}/artifact", release_of(product).storage_prefix
    product.storage.put_bytes(f"{prefix}/{WEIGHTS_NAME}", WEIGHTS[:100])
    assert client.get(f"{url}/{WEIGHTS_NAME}").status_code == 503
    product.storage.delete(f"{prefix}/adapter_config.json")
    assert client.get(f"{url}/adapter_config.json").status_code == 503


def test_the_tar_holds_the_bundle_and_is_the_same_every_time(product: Product, client: TestClient) -> None:
    job = ended_job(product, client)
    first = client.get(f"/models/{job.fine_tuned_model}/artifact.tar")
    assert first.status_code == 200
    assert first.headers["content-length"] == str(len(first.content))
    assert first.content == client.get(f"/models/{job.fine_tuned_model}/artifact.tar").content
    with tarfile.open(fileobj=io.BytesIO(first.content)) as bundle:
        members = {member.name: bundle.extractfile(member).read() for member in bundle}  # type: ignore[union-attr]
        assert {member.mtime for member in bundle.getmembers()} == {0}
    assert members[WEIGHTS_NAME] == WEIGHTS
    assert set(members) == {"adapter_config.json", WEIGHTS_NAME, "safety_report.json", "manifest.json"}
    assert json.loads(members["manifest.json"])["candidate_digest"] == release_of(product).candidate_digest


def test_the_raw_candidate_is_reachable_by_no_route(product: Product, client: TestClient) -> None:
    """A candidate that is being judged, was blocked, waits for review or was cancelled: every form of its name."""
    plan, lease = running_job(product, client)
    judged(product, plan, lease, Verdict.BLOCK)
    names = [plan.model_id, plan.job_id, f"quarantine/{plan.job_id}/{lease.fence}", f"{plan.model_id}:ckpt-step-10"]
    client.post(f"/fine_tuning/jobs/{plan.job_id}/cancel")
    for verdict in (Verdict.BLOCK, Verdict.REVIEW, Verdict.ERROR):
        names.append(f"ft:tiny:ours::{ended_job(product, client, verdict).id[-8:]}")
    for name in names:
        for path in ("", "/artifact", "/artifact.tar", f"/artifact/{WEIGHTS_NAME}"):
            response = client.get(f"/models/{name}{path}")
            assert response.status_code == 404, (name, path)
            assert WEIGHTS[:64] not in response.content
    assert [model["id"] for model in client.get("/models").json()["data"]] == [BASE]


def test_paths_cannot_leave_the_bundle(product: Product, client: TestClient) -> None:
    job = ended_job(product, client)
    client.get("/models")
    for path in ("../x", "..%2F..%2Ftheriac.db", "%2Fetc%2Fpasswd", "adapter_config.json/"):
        assert client.get(f"/models/{job.fine_tuned_model}/artifact/{path}").status_code == 404


def test_somebody_elses_model_is_as_absent_as_an_unknown_one(
    product: Product, client: TestClient, stranger: TestClient
) -> None:
    model = ended_job(product, client).fine_tuned_model
    assert model is not None
    requests = [("GET", ""), ("GET", "/artifact"), ("GET", "/artifact.tar"), ("GET", f"/artifact/{WEIGHTS_NAME}")]
    for method, path in [*requests, ("DELETE", "")]:
        foreign = stranger.request(method, f"/models/{model}{path}")
        unknown = stranger.request(method, f"/models/ft:x{path}")
        assert foreign.status_code == unknown.status_code == 404
        assert foreign.text == unknown.text.replace("ft:x", model)


def test_a_deleted_model_is_gone_and_a_base_model_cannot_be_deleted(product: Product, client: TestClient) -> None:
    model = ended_job(product, client).fine_tuned_model
    assert client.delete(f"/models/{model}").json() == {"id": model, "object": "model", "deleted": True}
    assert client.get(f"/models/{model}").status_code == 404
    assert client.get(f"/models/{model}/artifact").status_code == 404
    refused = client.delete(f"/models/{BASE}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")


def test_a_suspended_release_is_not_served_until_it_is_resumed(product: Product, client: TestClient) -> None:
    model, release = ended_job(product, client).fine_tuned_model, release_of(product)
    url = f"/models/{model}/artifact/{WEIGHTS_NAME}"
    for move, status in ((releases.suspend, 404), (releases.resume, 200), (releases.revoke, 404)):
        with unit_of_work(product.engine) as session:
            move(session, release.id, "drill")
        assert client.get(url).status_code == status
        assert client.get(f"/models/{model}").status_code == status
        assert (model in {entry["id"] for entry in client.get("/models").json()["data"]}) is (status == 200)


def test_a_job_in_the_queue_has_no_model(product: Product, client: TestClient) -> None:
    job_id = queued_job(product, client)
    assert client.get(f"/fine_tuning/jobs/{job_id}").json()["fine_tuned_model"] is None
    assert client.get(f"/models/ft:tiny:ours::{job_id[-8:]}").status_code == 404
