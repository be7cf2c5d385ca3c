"""The unmodified `openai` package against the gateway in a real server."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import openai
import pytest
from fastapi import FastAPI
from openai import OpenAI

from app.tables.safety import Verdict
from tests.app.product import (
    BASE,
    DATASET,
    WEIGHTS,
    Product,
    ask_as,
    ended_job,
    judged,
    new_job,
    running_job,
    settle,
    upload,
    validate_next,
)


@pytest.fixture
def base_url(product: Product, serve: Callable[[FastAPI], str]) -> str:
    return serve(product.app) + "/v1"


@pytest.fixture
def customer(product: Product, base_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=base_url, api_key=product.api_key) as client:
        yield client


def test_a_whole_job_as_a_customer_writes_it(product: Product, customer: OpenAI) -> None:
    file = customer.files.create(
        file=("train.jsonl", DATASET),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 86400},
    )
    assert file.expires_at is not None and file.expires_at - file.created_at == 86400
    assert validate_next(product) == "processed"
    assert customer.files.wait_for_processing(file.id, poll_interval=0.01).status == "processed"
    job = customer.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        suffix="ci",
        seed=7,
        metadata={"team": "ci"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        extra_body={"recovery": {"method": "antidote"}, "safety": {"policy": "default", "on_block": "review"}},
    )
    assert (job.status, job.seed, job.metadata) == ("queued", 7, {"team": "ci"})
    assert job._request_id
    assert [found.id for found in customer.fine_tuning.jobs.list(metadata={"team": "ci"})] == [job.id]
    client = ask_as(product, product.api_key)
    customer.fine_tuning.jobs.cancel(job.id)
    plan, lease = running_job(product, client)
    assert customer.fine_tuning.jobs.retrieve(plan.job_id).status == "running"
    settle(product, lease, judged(product, plan, lease))
    ended = customer.fine_tuning.jobs.retrieve(plan.job_id)
    assert ended.status == "succeeded" and ended.fine_tuned_model is not None
    events = list(customer.fine_tuning.jobs.list_events(ended.id, limit=2))
    assert len(events) > 4
    assert "moderation_checks" in {event.type for event in events}
    assert customer.files.content(ended.result_files[0]).text.startswith("step,train_loss")
    assert ended.fine_tuned_model in {model.id for model in customer.models.list()}
    assert customer.models.retrieve(ended.fine_tuned_model).owned_by == ended.organization_id
    manifest = customer.get(f"/models/{ended.fine_tuned_model}/artifact", cast_to=object)
    assert isinstance(manifest, dict)
    weights = customer.get(f"/models/{ended.fine_tuned_model}/artifact/adapter_model.safetensors", cast_to=bytes)
    assert weights == WEIGHTS
    assert hashlib.sha256(weights).hexdigest() in {entry["sha256"] for entry in manifest["files"]}
    report = customer.get(f"/fine_tuning/jobs/{ended.id}/safety_report", cast_to=object)
    assert isinstance(report, dict) and report["object"] == "safety.report"
    assert list(customer.fine_tuning.jobs.checkpoints.list(ended.id)) == []
    customer.models.delete(ended.fine_tuned_model)
    with pytest.raises(openai.NotFoundError):
        customer.models.retrieve(ended.fine_tuned_model)


def test_a_blocked_job_as_a_customer_sees_it(product: Product, customer: OpenAI) -> None:
    job = ended_job(product, ask_as(product, product.api_key), Verdict.BLOCK)
    seen = customer.fine_tuning.jobs.retrieve(job.id)
    assert (seen.status, seen.fine_tuned_model) == ("failed", None)
    assert seen.error is not None and seen.error.code == "safety_gate_blocked"


def test_a_bad_file_as_a_customer_sees_it(product: Product, customer: OpenAI) -> None:
    bad = customer.files.create(file=("bad.jsonl", b"not json\n"), purpose="fine-tune")
    job_id = new_job(product, bad.id)
    validate_next(product)
    assert customer.files.wait_for_processing(bad.id, poll_interval=0.01).status == "error"
    assert customer.fine_tuning.jobs.retrieve(job_id).status == "failed"
    with pytest.raises(openai.BadRequestError) as refused:
        customer.fine_tuning.jobs.create(model=BASE, training_file=bad.id)
    assert (refused.value.code, refused.value.param) == ("invalid_training_file", "training_file")
    assert refused.value.type == "invalid_request_error"


def test_errors_arrive_as_the_packages_own_classes(product: Product, customer: OpenAI, base_url: str) -> None:
    file_id = upload(ask_as(product, product.api_key))
    job_id = new_job(product, file_id)
    customer.fine_tuning.jobs.cancel(job_id)
    with pytest.raises(openai.ConflictError) as conflict:
        customer.fine_tuning.jobs.cancel(job_id)
    assert conflict.value.code == "job_already_ended"
    assert conflict.value.request_id
    with pytest.raises(openai.NotFoundError):
        customer.files.retrieve("file-unknown")
    with pytest.raises(openai.BadRequestError):
        customer.fine_tuning.jobs.list(after="ftjob-unknown")
    with OpenAI(base_url=base_url, api_key="thk_wrong") as unknown, pytest.raises(openai.AuthenticationError):
        unknown.models.list()
    with OpenAI(base_url=base_url, api_key=product.other_key) as stranger, pytest.raises(openai.NotFoundError):
        stranger.fine_tuning.jobs.retrieve(job_id)


def test_every_page_is_walked_and_the_walk_ends(product: Product, customer: OpenAI) -> None:
    client = ask_as(product, product.api_key)
    ids = [upload(client, name=f"{number}.jsonl") for number in range(7)]
    assert [file.id for file in customer.files.list(limit=3)] == ids[::-1]
    jobs = [new_job(product, ids[0]) for _ in range(5)]
    assert [job.id for job in customer.fine_tuning.jobs.list(limit=2)] == jobs[::-1]
