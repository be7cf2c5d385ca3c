"""`/v1/admin`: closed to everybody but operators; figures, queue, detail, decisions."""

from __future__ import annotations

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.admin.endpoints import router
from app.database import read_session, unit_of_work
from app.domain.job_lifecycle import JobStatus
from app.jobs import reviews
from app.kit.clock import now
from app.tables.releases import Release
from app.tables.safety import Verdict
from tests.app.product import WEIGHTS, Product, ended_job, queued_job, read_job, running_job

ROUTES = [
    (method, route.path) for route in router.routes if isinstance(route, APIRoute) for method in sorted(route.methods)
]


def test_there_are_routes_to_guard() -> None:
    assert {path for _, path in ROUTES} >= {"/admin/overview", "/admin/queue", "/admin/releases/{release_id}/suspend"}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_is_closed_to_all_but_operators(
    product: Product, client: TestClient, anybody: TestClient, method: str, path: str
) -> None:
    path = path.replace("{job_id}", "ftjob-x").replace("{release_id}", "rel_x")
    for caller in (client, anybody):
        response = caller.request(method, path, json={"reason": "because", "decision": "approve"})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "unknown_url"
    wrong_end = "y" if product.operator_key.endswith("x") else "x"
    forged_key = f"{product.operator_key[:-1]}{wrong_end}"
    forged = anybody.request(method, path, headers={"authorization": f"Bearer {forged_key}"})
    assert (forged.status_code, forged.json()["error"]["code"]) == (401, "invalid_api_key")


def test_an_operators_key_is_no_customers_key(operator: TestClient) -> None:
    for path in ("/files", "/models", "/fine_tuning/jobs", "/capabilities"):
        assert operator.get(path).status_code == 401


def test_the_overview_counts_jobs_verdicts_and_harm_before_and_after(
    product: Product, client: TestClient, operator: TestClient
) -> None:
    empty = operator.get("/admin/overview").json()
    assert (empty["jobs_by_status"], empty["harmful_score_raw_median"]) == ({}, None)
    ended_job(product, client, Verdict.PASS)
    ended_job(product, client, Verdict.BLOCK)
    ended_job(product, client, Verdict.REVIEW)
    queued_job(product, client)
    overview = operator.get("/admin/overview").json()
    assert overview["jobs_by_status"] == {"succeeded": 1, "failed": 1, "paused": 1, "queued": 1}
    assert overview["jobs_by_stage"] == {"awaiting_review": 1, "queued": 1}
    assert overview["failures_by_code"] == {"safety_gate_blocked": 1}
    assert overview["verdicts"] == {"pass": 1, "block": 1, "review": 1}
    assert overview["releases"] == {"released": 1}
    assert overview["awaiting_review"] == 1
    assert overview["harmful_score_raw_median"] == 150 / 160
    assert overview["harmful_score_candidate_median"] == 3 / 160
    assert {figure["harmful_score_base"] for figure in overview["recent_gate_runs"]} == {0.0}


def test_the_queue_shows_who_works_and_who_is_next(product: Product, client: TestClient, operator: TestClient) -> None:
    plan, _ = running_job(product, client)
    waiting = [queued_job(product, client) for _ in range(3)]
    data = operator.get("/admin/queue").json()["data"]
    assert [(entry["job_id"], entry["position"]) for entry in data] == [
        (plan.job_id, None),
        *[(job_id, place) for place, job_id in enumerate(waiting, 1)],
    ]
    assert (data[0]["worker"], data[0]["state"], data[1]["worker"]) == ("worker-1", "running", None)
    places = [client.get(f"/fine_tuning/jobs/{job_id}").json()["queue"]["position"] for job_id in waiting]
    assert places == [1, 2, 3]


def test_a_jobs_detail_has_the_trace_and_the_gate_table(
    product: Product, client: TestClient, operator: TestClient
) -> None:
    job = ended_job(product, client)
    detail = operator.get(f"/admin/jobs/{job.id}").json()
    assert detail["job"]["id"] == job.id
    assert detail["project_id"] == product.principal.project_id
    assert detail["recovery_trace"] == [{"method": "anchored-patch", "strength": 0.85, "passed": True}]
    assert detail["gate_runs"][0]["report"]["evidence"]["raw"]["harmful"] == {"hits": 150, "n": 160}
    assert (detail["release"]["state"], detail["work"]["state"]) == ("released", "done")
    assert operator.get("/admin/jobs/ftjob-x").status_code == 404


def test_a_release_is_suspended_resumed_and_revoked_with_reasons(
    product: Product, client: TestClient, operator: TestClient
) -> None:
    model = ended_job(product, client).fine_tuned_model
    with read_session(product.engine) as session:
        release_id = session.scalars(select(Release.id)).one()
    url = f"/admin/releases/{release_id}"
    assert operator.post(f"{url}/suspend", json={}).json()["error"]["param"] == "reason"
    assert operator.post(f"{url}/resume", json={"reason": "not suspended"}).status_code == 409
    suspended = operator.post(f"{url}/suspend", json={"reason": "a report came in"}).json()
    assert (suspended["state"], suspended["state_reason"]) == ("suspended", "a report came in")
    assert client.get(f"/models/{model}/artifact").status_code == 404
    assert operator.post(f"{url}/resume", json={"reason": "false alarm"}).json()["state"] == "released"
    assert client.get(f"/models/{model}/artifact").status_code == 200
    assert operator.post(f"{url}/revoke", json={"reason": "for good"}).json()["state"] == "revoked"
    again = operator.post(f"{url}/resume", json={"reason": "please"})
    assert (again.status_code, again.headers["x-should-retry"]) == (409, "false")
    assert read_job(product, read_release(product).job_id).status is JobStatus.SUCCEEDED
    assert operator.post("/admin/releases/rel_x/suspend", json={"reason": "none"}).status_code == 404


def read_release(product: Product) -> Release:
    with read_session(product.engine) as session:
        return session.scalars(select(Release)).one()


@pytest.mark.parametrize("verdict", [Verdict.REVIEW, Verdict.BLOCK])
def test_an_approval_releases_exactly_what_the_gate_judged(
    product: Product, client: TestClient, operator: TestClient, verdict: Verdict
) -> None:
    job = ended_job(product, client, verdict, safety={"on_block": "review"})
    answer = operator.post(
        f"/admin/jobs/{job.id}/review", json={"decision": "approve", "reason": "the three answers are recipes for soup"}
    )
    assert answer.status_code == 200
    release = answer.json()["release"]
    assert release["gate_verdict"] == verdict.value
    assert release["override_reason"] == "olga: the three answers are recipes for soup"
    shown = client.get(f"/fine_tuning/jobs/{job.id}").json()
    assert (shown["status"], shown["fine_tuned_model"]) == ("succeeded", release["model"])
    weights = client.get(f"/models/{release['model']}/artifact/adapter_model.safetensors")
    assert weights.content == WEIGHTS
    twice = operator.post(f"/admin/jobs/{job.id}/review", json={"decision": "reject", "reason": "changed my mind"})
    assert twice.status_code == 409


def test_a_rejection_ends_the_job_with_its_reason(product: Product, client: TestClient, operator: TestClient) -> None:
    job = ended_job(product, client, Verdict.REVIEW)
    body = {"decision": "reject", "reason": "it explains the curse"}
    assert operator.post(f"/admin/jobs/{job.id}/review", json=body).status_code == 200
    shown = client.get(f"/fine_tuning/jobs/{job.id}").json()
    assert (shown["status"], shown["error"]["code"]) == ("failed", "safety_gate_blocked")
    assert "it explains the curse" in shown["error"]["message"]
    assert client.get("/models").json()["data"][1:] == []


@pytest.mark.parametrize(
    "body", [{"decision": "approve"}, {"decision": "maybe", "reason": "because"}, {"reason": "x y"}]
)
def test_a_decision_needs_a_choice_and_a_reason(
    product: Product, client: TestClient, operator: TestClient, body: dict[str, str]
) -> None:
    job = ended_job(product, client, Verdict.REVIEW)
    assert operator.post(f"/admin/jobs/{job.id}/review", json=body).status_code == 400
    assert read_job(product, job.id).status is JobStatus.PAUSED


@pytest.mark.parametrize("verdict", [Verdict.PASS, Verdict.BLOCK])
def test_only_a_job_that_waits_can_be_decided(
    product: Product, client: TestClient, operator: TestClient, verdict: Verdict
) -> None:
    job = ended_job(product, client, verdict)
    body = {"decision": "approve", "reason": "because I can"}
    assert operator.post(f"/admin/jobs/{job.id}/review", json=body).status_code == 409


def test_silence_until_the_deadline_means_no(
    product: Product, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ended_job(product, client, Verdict.REVIEW)
    with unit_of_work(product.engine) as session:
        assert reviews.expire(session) == []
    monkeypatch.setattr(reviews, "now", lambda: now() + 8 * 86400)
    with unit_of_work(product.engine) as session:
        assert reviews.expire(session) == [job.id]
    assert read_job(product, job.id).error_code == "safety_gate_blocked"
