"""`/v1/fine_tuning/jobs` on both databases: shapes, refusals, pages, filters, other people's jobs, idempotency."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.database import unit_of_work
from app.safety.library import default_specs, method_name
from app.tables.base_models import BaseModelRef
from app.tables.safety import Verdict
from tests.app.product import (
    BASE,
    Product,
    ended_job,
    new_job,
    queued_job,
    ready_file,
    running_job,
    upload,
    validate_next,
)
from workers.bridge import job_spec

OPENAI_FIELDS = {
    "id", "object", "created_at", "finished_at", "estimated_finish", "model", "fine_tuned_model", "organization_id",
    "status", "training_file", "validation_file", "result_files", "trained_tokens", "hyperparameters", "method",
    "seed", "integrations", "metadata", "error", "user_provided_suffix",
}  # fmt: skip


def create(client: TestClient, file_id: str, headers: dict[str, str] | None = None, **wishes: Any) -> Any:
    body = {"model": BASE, "training_file": file_id, **wishes}
    return client.post("/fine_tuning/jobs", json=body, headers=headers)


def test_a_new_job_has_every_field(product: Product, client: TestClient) -> None:
    file_id = ready_file(product, client)
    response = create(client, file_id, seed=7, suffix="ci", metadata={"team": "ci"})
    assert response.status_code == 200
    job = response.json()
    assert set(job) >= OPENAI_FIELDS
    assert (job["object"], job["status"], job["stage"], job["model"]) == ("fine_tuning.job", "queued", "queued", BASE)
    assert (job["seed"], job["user_provided_suffix"], job["metadata"]) == (7, "ci", {"team": "ci"})
    assert job["hyperparameters"] == {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert job["method"] == {"type": "supervised", "supervised": {"hyperparameters": job["hyperparameters"]}}
    assert (job["result_files"], job["error"], job["integrations"]) == ([], None, None)
    assert job["recovery"] == {"method": "auto"}
    assert (job["safety"]["policy"], job["safety"]["version"], job["safety"]["on_block"]) == ("default", 1, "block")
    shown = client.get(f"/fine_tuning/jobs/{job['id']}").json()
    assert shown["queue"] == {"position": 1}
    assert {**shown, "queue": None} == job


def test_a_job_without_a_seed_gets_one_and_keeps_it(product: Product, client: TestClient) -> None:
    job = create(client, ready_file(product, client)).json()
    assert 0 <= job["seed"] < 2**31
    assert client.get(f"/fine_tuning/jobs/{job['id']}").json()["seed"] == job["seed"]


def test_both_ways_to_give_hyperparameters_are_understood(product: Product, client: TestClient) -> None:
    file_id = ready_file(product, client)
    old = create(client, file_id, hyperparameters={"n_epochs": 2}).json()
    new = create(client, file_id, method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}})
    assert old["hyperparameters"]["n_epochs"] == new.json()["hyperparameters"]["n_epochs"] == 2


REFUSALS = [
    ({"model": "gpt-9"}, "model_not_found", "model"),
    ({"model": "ft:tiny:x:y:z"}, "unsupported_parameter", "model"),
    ({"training_file": "file-unknown"}, "file_not_found", "training_file"),
    ({"training_file": None}, "invalid_value", "training_file"),
    ({"validation_file": "file-unknown"}, "file_not_found", "validation_file"),
    ({"mood": 1}, "unknown_parameter", "mood"),
    ({"seed": -1}, "invalid_value", "seed"),
    ({"seed": 2**31}, "invalid_value", "seed"),
    ({"seed": "x"}, "invalid_value", "seed"),
    ({"suffix": ""}, "invalid_value", "suffix"),
    ({"suffix": "x" * 65}, "invalid_value", "suffix"),
    ({"metadata": {"k" * 65: "v"}}, "invalid_value", "metadata"),
    ({"metadata": {"k": "v" * 513}}, "invalid_value", "metadata.k"),
    ({"metadata": {str(n): "v" for n in range(17)}}, "invalid_value", "metadata"),
    ({"hyperparameters": {"n_epochs": 0}}, "invalid_value", "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": 51}}, "invalid_value", "hyperparameters.n_epochs"),
    ({"hyperparameters": {"batch_size": 257}}, "invalid_value", "hyperparameters.batch_size"),
    ({"hyperparameters": {"learning_rate_multiplier": 0}}, "invalid_value", "hyperparameters.learning_rate_multiplier"),
    ({"hyperparameters": {"n_epochs": "many"}}, "invalid_value", "hyperparameters.n_epochs"),
    ({"hyperparameters": {"beta": 1}}, "unknown_parameter", "hyperparameters.beta"),
    ({"method": {"type": "dpo"}}, "unsupported_parameter", "method.type"),
    ({"method": {"type": "reinforcement"}}, "unsupported_parameter", "method.type"),
    ({"method": {"type": "magic"}}, "invalid_value", "method.type"),
    ({"method": {"dpo": {}}}, "unsupported_parameter", "method.dpo"),
    (
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 99}}}},
        "invalid_value",
        "method.supervised.hyperparameters.n_epochs",
    ),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "unsupported_parameter", "integrations"),
    ({"recovery": {"method": "prayer"}}, "unknown_recovery_method", "recovery.method"),
    ({"recovery": {}}, "unknown_recovery_method", "recovery.method"),
    ({"recovery": "antidote"}, "invalid_value", "recovery"),
    ({"recovery": {"method": "antidote", "strength": 1.5}}, "invalid_value", "recovery.strength"),
    ({"recovery": {"method": "panacea", "rho": 0}}, "invalid_value", "recovery.rho"),
    ({"recovery": {"method": "antidote", "rho": 1}}, "unknown_parameter", "recovery.rho"),
    ({"recovery": {"method": "auto", "budget_seconds": 0}}, "invalid_value", "recovery.budget_seconds"),
    ({"safety": {"policy": "nobody's"}}, "unknown_policy", "safety.policy"),
    ({"safety": {"policy": "default@9"}}, "unknown_policy", "safety.policy"),
    ({"safety": {"policy": "default@x"}}, "invalid_request", "safety.policy"),
    ({"safety": {"policy": "default@" + "9" * 30}}, "invalid_request", "safety.policy"),
    ({"recovery": {"method": "noise"}}, "recovery_method_not_offered", "recovery.method"),
    ({"recovery": {"method": "csulora"}}, "recovery_needs_pretrained", "recovery.method"),
    (
        {"recovery": {"method": "compose", "parts": [{"method": "safelora"}, {"method": "scale-down"}]}},
        "recovery_needs_pretrained",
        "recovery.method",
    ),
    ({"recovery": {"method": "anchored-patch", "refusal_rows": 10**9}}, "invalid_value", "recovery.refusal_rows"),
    ({"safety": {"on_block": "shrug"}}, "invalid_value", "safety.on_block"),
    ({"peft": {"rank": 0}}, "invalid_value", "peft.rank"),
    ({"peft": {"rank": 257}}, "invalid_value", "peft.rank"),
    ({"peft": {"dropout": 1}}, "invalid_value", "peft.dropout"),
    ({"peft": {"target_modules": ["lm_head"]}}, "invalid_value", "peft.target_modules"),
    ({"peft": {"target_modules": []}}, "invalid_value", "peft.target_modules"),
    ({"peft": {"quantization": "nf4"}}, "unsupported_parameter", "peft.quantization"),
]  # fmt: skip


def test_what_cannot_be_done_is_refused_by_name(product: Product, client: TestClient) -> None:
    file_id = ready_file(product, client)
    for wishes, code, param in REFUSALS:
        response = client.post("/fine_tuning/jobs", json={"model": BASE, "training_file": file_id, **wishes})
        assert response.status_code == 400, (wishes, response.text)
        error = response.json()["error"]
        assert (error["code"], error["param"]) == (code, param), wishes
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
    assert client.get("/fine_tuning/jobs").json()["data"] == []


def test_a_base_with_weights_before_alignment_takes_the_methods_that_need_them(
    product: Product, client: TestClient
) -> None:
    assert client.get("/capabilities").json()["base_models"][0]["pretrained"] is False
    with unit_of_work(product.engine) as session:
        base = session.get_one(BaseModelRef, product.base_id)
        base.pretrained_path, base.pretrained_digest = "/nowhere/before", "e" * 64
    assert client.get("/capabilities").json()["base_models"][0]["pretrained"] is True
    plan, _ = running_job(product, client, recovery={"method": "csulora", "strength": 1})
    assert (plan.base.pretrained_path, plan.base.pretrained_digest) == ("/nowhere/before", "e" * 64)
    choice = job_spec(plan).base
    assert (str(choice.pretrained), choice.pretrained_digest) == ("/nowhere/before", "e" * 64)


@pytest.mark.parametrize(
    "number",
    ["1e999", "-1e999", "NaN", "Infinity"],
)
@pytest.mark.parametrize(
    "wish",
    [
        '"recovery": {"method": "panacea", "rho": %s}',
        '"recovery": {"method": "panacea", "strength": %s}',
        '"recovery": {"method": "auto", "budget_seconds": %s}',
        '"peft": {"alpha": %s}',
        '"peft": {"dropout": %s}',
        '"hyperparameters": {"learning_rate_multiplier": %s}',
    ],
)
def test_what_is_no_finite_number_is_refused(client: TestClient, wish: str, number: str) -> None:
    body = f'{{"model": "{BASE}", "training_file": "file-x", {wish % number}}}'
    response = client.post("/fine_tuning/jobs", content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")


@pytest.mark.parametrize("depth", [40, 300, 900, 955])
@pytest.mark.parametrize(
    ("param", "wish"),
    [
        ("integrations", '"integrations": [{"a": %s}]'),
        ("method", '"method": {"dpo": {"a": %s}}'),
        ("mood", '"mood": %s'),
    ],
)
def test_what_is_nested_too_deeply_is_refused(client: TestClient, param: str, wish: str, depth: int) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        nested = opening * depth + "1" + closing * depth
        body = f'{{"model": "{BASE}", "training_file": "file-x", {wish % nested}}}'
        response = client.post("/fine_tuning/jobs", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] in {param, None}, "None: the decoder gave up before us"


@pytest.mark.parametrize("missing", ["model", "training_file"])
def test_a_missing_parameter_is_named(client: TestClient, missing: str) -> None:
    body = {"model": BASE, "training_file": "file-x"}
    del body[missing]
    error = client.post("/fine_tuning/jobs", json=body).json()["error"]
    assert (error["code"], error["param"]) == ("missing_required_parameter", missing)


@pytest.mark.parametrize("body", [b"{", b"", b"\xff", b"[]", b"null"])
def test_a_body_that_is_no_object_is_refused_in_the_envelope(client: TestClient, body: bytes) -> None:
    response = client.post("/fine_tuning/jobs", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_file_that_failed_validation_or_has_another_use_is_refused(product: Product, client: TestClient) -> None:
    bad = upload(client, b"no json")
    assert validate_next(product) == "error"
    response = create(client, bad)
    assert response.json()["error"]["code"] == "invalid_training_file"
    assert "line 1" in response.json()["error"]["message"]
    result = ended_job(product, client).result_file_ids[0]
    assert create(client, result).json()["error"]["code"] == "wrong_purpose"
    good = ready_file(product, client)
    assert create(client, good, validation_file=good).json()["error"]["param"] == "validation_file"


def test_another_projects_file_cannot_be_trained_on(product: Product, client: TestClient, stranger: TestClient) -> None:
    foreign = create(stranger, ready_file(product, client)).json()["error"]
    assert (foreign["code"], foreign["param"]) == ("file_not_found", "training_file")


@pytest.mark.parametrize(
    ("recovery", "mode", "methods"),
    [
        ({"method": "auto"}, "auto", [method_name(type(spec)) for spec in default_specs()]),
        ({"method": "none"}, "none", []),
        ({"method": "antidote"}, "auto", ["antidote"]),
        ({"method": "antidote", "strength": 0.2}, "fixed", ["antidote"]),
    ],
)
def test_a_recovery_wish_becomes_a_plan_inside_the_policy(
    product: Product, client: TestClient, recovery: dict[str, Any], mode: str, methods: list[str]
) -> None:
    plan, _ = running_job(product, client, recovery=recovery)
    assert plan.policy.recovery["mode"] == mode
    assert [spec["method"] for spec in plan.policy.recovery["specs"]] == methods
    assert client.get(f"/fine_tuning/jobs/{plan.job_id}").json()["recovery"] == recovery


def test_jobs_are_listed_newest_first_in_pages(product: Product, client: TestClient) -> None:
    file_id = ready_file(product, client)
    ids = [new_job(product, file_id) for _ in range(5)]
    first = client.get("/fine_tuning/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in first["data"]] == [ids[4], ids[3]]
    assert first["has_more"] is True
    rest = client.get("/fine_tuning/jobs", params={"after": ids[3]}).json()
    assert [job["id"] for job in rest["data"]] == [ids[2], ids[1], ids[0]]
    assert rest["has_more"] is False
    unknown = client.get("/fine_tuning/jobs", params={"after": "ftjob-x"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (400, "invalid_cursor")


def test_jobs_are_found_by_their_metadata(product: Product, client: TestClient) -> None:
    file_id = ready_file(product, client)
    both = new_job(product, file_id, metadata={"team": "a", "run": "1"})
    team = new_job(product, file_id, metadata={"team": "a"})
    none = new_job(product, file_id)

    def found(query: str) -> list[str]:
        return [job["id"] for job in client.get(f"/fine_tuning/jobs?{query}").json()["data"]]

    assert found("metadata[team]=a") == [team, both]
    assert found("metadata%5Bteam%5D=a&metadata%5Brun%5D=1") == [both]
    assert found("metadata[team]=b") == []
    assert found("metadata=null") == [none]
    assert found("") == [none, team, both]


def test_somebody_elses_job_is_as_absent_as_an_unknown_one(
    product: Product, client: TestClient, stranger: TestClient
) -> None:
    job = ended_job(product, client)
    paths = ["", "/events", "/checkpoints", "/safety_report"]
    requests = [("GET", path) for path in paths] + [("POST", path) for path in ("/cancel", "/pause", "/resume")]
    for method, path in requests:
        foreign = stranger.request(method, f"/fine_tuning/jobs/{job.id}{path}")
        unknown = stranger.request(method, f"/fine_tuning/jobs/ftjob-unknown{path}")
        assert foreign.status_code == unknown.status_code == 404, path
        assert foreign.text == unknown.text.replace("ftjob-unknown", job.id)
    assert stranger.get("/fine_tuning/jobs").json()["data"] == []


def test_the_timeline_is_paged_newest_first(product: Product, client: TestClient) -> None:
    job = ended_job(product, client)
    everything = client.get(f"/fine_tuning/jobs/{job.id}/events").json()
    assert everything["has_more"] is False
    messages = [event["message"] for event in everything["data"]]
    assert messages[0].startswith("New fine-tuned model created: ft:tiny:ours:")
    assert messages[-1] == f"Created fine-tuning job: {job.id}"
    assert {event["type"] for event in everything["data"]} == {"message", "moderation_checks"}
    assert all(event["id"].startswith("ftevent-") for event in everything["data"])
    seen, after = [], None
    while True:
        params = {"limit": 2, **({"after": after} if after else {})}
        page = client.get(f"/fine_tuning/jobs/{job.id}/events", params=params).json()
        seen += page["data"]
        if not page["has_more"]:
            break
        after = page["data"][-1]["id"]
    assert seen == everything["data"]
    assert client.get(f"/fine_tuning/jobs/{job.id}/events", params={"after": "ftevent-x"}).status_code == 400


def test_the_safety_report_is_there_for_good_and_bad_ends(product: Product, client: TestClient) -> None:
    fresh = queued_job(product, client)
    absent = client.get(f"/fine_tuning/jobs/{fresh}/safety_report")
    assert (absent.status_code, absent.json()["error"]["code"]) == (404, "no_safety_report")
    client.post(f"/fine_tuning/jobs/{fresh}/cancel")
    for verdict in (Verdict.PASS, Verdict.BLOCK):
        job = ended_job(product, client, verdict)
        report = client.get(f"/fine_tuning/jobs/{job.id}/safety_report").json()
        assert report == {"object": "safety.report", "job_id": job.id}


def test_the_result_file_is_a_file_of_the_customer(product: Product, client: TestClient) -> None:
    job = ended_job(product, client)
    (file_id,) = client.get(f"/fine_tuning/jobs/{job.id}").json()["result_files"]
    file = client.get(f"/files/{file_id}").json()
    assert (file["purpose"], file["filename"], file["status"]) == ("fine-tune-results", "step_metrics.csv", "processed")
    assert client.get(f"/files/{file_id}/content").text.startswith("step,train_loss")


def test_what_is_not_offered_says_so(product: Product, client: TestClient) -> None:
    job_id = queued_job(product, client)
    for path in ("pause", "resume"):
        response = client.post(f"/fine_tuning/jobs/{job_id}/{path}")
        assert (response.status_code, response.json()["error"]["code"]) == (400, "unsupported_operation")
    assert client.get(f"/fine_tuning/jobs/{job_id}/checkpoints").json()["data"] == []


def test_one_idempotency_key_makes_one_job(product: Product, client: TestClient, stranger: TestClient) -> None:
    file_id, headers = ready_file(product, client), {"idempotency-key": "k-1"}
    first = create(client, file_id, headers, suffix="a")
    again = create(client, file_id, headers, suffix="a")
    assert again.json() == first.json()
    other = create(client, file_id, headers, suffix="b")
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_mismatch")
    assert create(client, file_id, {"idempotency-key": "k-2"}, suffix="a").json()["id"] != first.json()["id"]
    foreign = create(stranger, ready_file(product, stranger), headers)
    assert foreign.status_code == 200
    assert len(client.get("/fine_tuning/jobs").json()["data"]) == 2
    assert create(client, file_id, {"idempotency-key": "k" * 256}).status_code == 400


def test_a_refused_request_does_not_use_up_its_key(product: Product, client: TestClient) -> None:
    headers = {"idempotency-key": "k-1"}
    assert create(client, "file-unknown", headers).status_code == 400
    assert create(client, ready_file(product, client), headers).status_code == 200


def test_a_clients_own_retry_finds_the_job_it_made(product: Product, client: TestClient) -> None:
    file_id = ready_file(product, client)
    first = create(client, file_id, {"x-stainless-retry-count": "0"})
    retried = create(client, file_id, {"x-stainless-retry-count": "1"})
    assert retried.json()["id"] == first.json()["id"]
    meant = create(client, file_id, {"x-stainless-retry-count": "0"})
    assert meant.json()["id"] != first.json()["id"]


def test_equal_requests_at_once_make_one_job(product: Product, client: TestClient) -> None:
    file_id, headers = ready_file(product, client), {"idempotency-key": "storm"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: create(client, file_id, headers), range(16)))
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 200}) == 1
    assert len(client.get("/fine_tuning/jobs").json()["data"]) == 1


def test_an_answer_never_shows_what_only_the_provider_may_see(product: Product, client: TestClient) -> None:
    job = ended_job(product, client, Verdict.BLOCK)
    shown = json.dumps(client.get(f"/fine_tuning/jobs/{job.id}").json())
    assert job.candidate is not None
    for secret in (job.candidate["prefix"], "worker-1", "plan", "candidate"):
        assert secret not in shown
