"""How a job ends: which verdict leads where, who may still write, and what stays out of reach."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError

from app.database import read_session, unit_of_work
from app.domain.job_lifecycle import TRANSITIONS, JobStatus, Stage
from app.errors import IllegalTransition
from app.jobs import service as jobs
from app.jobs.outcome import JobError, JobEvent, JobOutcome
from app.jobs.transitions import Change, advance
from app.tables.events import Event
from app.tables.jobs import Job
from app.tables.releases import Release
from app.tables.safety import GateRun, Verdict
from app.tables.work import WorkItem, WorkKind
from app.work import service as work
from app.work.errors import LeaseLost
from tests.app.product import (
    Product,
    altered,
    claim,
    ended_job,
    judged,
    new_job,
    queued_job,
    read_job,
    ready_file,
    running_job,
    settle,
    upload,
    validate_next,
)


def topics(product: Product, job_id: str) -> list[str]:
    with read_session(product.engine) as session:
        statement = select(Event.topic).where(Event.subject_id == job_id, Event.topic.is_not(None))
        return [topic for topic in session.scalars(statement.order_by(Event.seq)) if topic]


def count(product: Product, table: Any) -> int:
    with read_session(product.engine) as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_a_passed_gate_releases_and_ends_the_job_in_one_transaction(product: Product, client: TestClient) -> None:
    job = ended_job(product, client, Verdict.PASS, suffix="Review Bot")
    assert job.status is JobStatus.SUCCEEDED
    assert job.stage is Stage.RELEASED
    assert job.fine_tuned_model == f"ft:tiny:ours:review-bot:{job.id[-8:]}"
    assert job.trained_tokens == 1234
    with read_session(product.engine) as session:
        release = session.scalars(select(Release)).one()
        gate_run = session.scalars(select(GateRun)).one()
    assert (release.job_id, release.gate_run_id, release.state.value) == (job.id, gate_run.id, "released")
    assert release.candidate_digest == gate_run.candidate_digest
    assert topics(product, job.id)[-2:] == ["fine_tuning.job.gate_passed", "fine_tuning.job.succeeded"]
    assert topics(product, release.id) == ["model.released"]


def test_a_blocked_gate_fails_the_job_with_its_reasons_and_releases_nothing(
    product: Product, client: TestClient
) -> None:
    job = ended_job(product, client, Verdict.BLOCK)
    assert (job.status, job.error_code) == (JobStatus.FAILED, "safety_gate_blocked")
    assert job.error_message == "3 of 160 groups"
    assert job.fine_tuned_model is None
    assert count(product, Release) == 0
    assert count(product, GateRun) == 1
    assert topics(product, job.id)[-2:] == ["fine_tuning.job.gate_blocked", "fine_tuning.job.failed"]


@pytest.mark.parametrize(
    ("verdict", "on_block", "status"),
    [(Verdict.REVIEW, "block", "paused"), (Verdict.BLOCK, "review", "paused"), (Verdict.ERROR, "review", "failed")],
)
def test_what_wants_a_person_is_parked_with_a_deadline(
    product: Product, client: TestClient, verdict: Verdict, on_block: str, status: str
) -> None:
    job = ended_job(product, client, verdict, safety={"on_block": on_block})
    assert job.status.value == status
    if status == "paused":
        assert job.stage is Stage.AWAITING_REVIEW
        assert job.review_deadline is not None and job.review_deadline > job.created_at + 6 * 86400
    else:
        assert job.error_code == "gate_error"
    assert count(product, Release) == 0


def test_a_candidate_that_is_not_what_the_gate_judged_is_never_released(product: Product, client: TestClient) -> None:
    plan, lease = running_job(product, client)
    outcome = altered(judged(product, plan, lease), candidate_digest="f" * 64)
    assert settle(product, lease, outcome) == "failed"
    assert read_job(product, plan.job_id).error_code == "system_candidate_altered"
    assert count(product, Release) == 0


def test_a_verdict_without_a_candidate_fails_closed(product: Product, client: TestClient) -> None:
    plan, lease = running_job(product, client)
    assert settle(product, lease, JobOutcome(verdict=Verdict.PASS)) == "failed"
    assert read_job(product, plan.job_id).error_code == "gate_error"


@pytest.mark.parametrize(
    "error",
    [
        JobError("user_row_too_long", "line 7 has 3000 tokens, the limit is 2048", "training_file"),
        JobError("system_base_model_changed", "the base model's bytes changed"),
    ],
)
def test_an_error_ends_the_job_with_its_code_and_parameter(
    product: Product, client: TestClient, error: JobError
) -> None:
    plan, lease = running_job(product, client)
    assert settle(product, lease, JobOutcome(error=error)) == "failed"
    answer = client.get(f"/fine_tuning/jobs/{plan.job_id}").json()
    assert answer["error"] == {"code": error.code, "message": error.message, "param": error.param}


@pytest.mark.parametrize("verdict", list(Verdict))
def test_a_cancel_that_came_first_wins_over_every_verdict(
    product: Product, client: TestClient, verdict: Verdict
) -> None:
    plan, lease = running_job(product, client)
    answer = client.post(f"/fine_tuning/jobs/{plan.job_id}/cancel")
    assert answer.json()["status"] == "running"
    assert answer.json()["cancel_requested"] is True
    assert settle(product, lease, judged(product, plan, lease, verdict)) == "cancelled"
    assert count(product, Release) == 0
    assert topics(product, plan.job_id)[-1] == "fine_tuning.job.cancelled"


def test_a_cancel_that_came_second_finds_the_job_ended(product: Product, client: TestClient) -> None:
    job = ended_job(product, client)
    answer = client.post(f"/fine_tuning/jobs/{job.id}/cancel")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_already_ended")
    assert answer.headers["x-should-retry"] == "false"
    assert read_job(product, job.id).status is JobStatus.SUCCEEDED


def test_a_zombie_can_write_nothing(product: Product, client: TestClient) -> None:
    plan, lease = running_job(product, client)
    outcome = judged(product, plan, lease)
    with unit_of_work(product.engine) as session:
        work.hand_back(session, lease)
        jobs.requeue(session, plan.job_id)
    before = read_job(product, plan.job_id)
    writes = (
        lambda session: jobs.settle(session, lease, outcome),
        lambda session: jobs.set_stage(session, lease, Stage.GATING),
        lambda session: jobs.report_progress(session, lease, {"step": 3}),
        lambda session: jobs.record_hyperparameters(session, lease, {"n_epochs": 3}),
        lambda session: jobs.start(session, lease),
    )
    for write in writes:
        with pytest.raises(LeaseLost), unit_of_work(product.engine) as session:
            write(session)
    after = read_job(product, plan.job_id)
    assert (after.status, after.stage, after.progress) == (before.status, before.stage, None)
    assert count(product, Release) == 0


@pytest.mark.parametrize("status", list(JobStatus))
def test_the_writer_of_status_allows_exactly_the_lifecycle(
    product: Product, client: TestClient, status: JobStatus
) -> None:
    job_id = new_job(product, upload(client))
    for target in JobStatus:
        with unit_of_work(product.engine) as session:
            session.execute(text("UPDATE job SET status = :now WHERE id = :id"), {"now": status.value, "id": job_id})
        if target in TRANSITIONS[status]:
            with unit_of_work(product.engine) as session:
                advance(session, job_id, target, Change())
            assert read_job(product, job_id).status is target
        else:
            with pytest.raises(IllegalTransition), unit_of_work(product.engine) as session:
                advance(session, job_id, target, Change())
            assert read_job(product, job_id).status is status


def test_of_racing_ends_exactly_one_wins(product: Product, client: TestClient) -> None:
    ends = [JobStatus.FAILED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.SUCCEEDED]
    for _ in range(3):
        plan, _lease = running_job(product, client)
        barrier = threading.Barrier(len(ends))
        with ThreadPoolExecutor(len(ends)) as pool:
            won = list(pool.map(partial(race_to, product, plan.job_id, barrier), ends))
        assert sum(won) == 1
        assert read_job(product, plan.job_id).status is ends[won.index(True)]


def race_to(product: Product, job_id: str, barrier: threading.Barrier, target: JobStatus) -> bool:
    barrier.wait()
    try:
        with unit_of_work(product.engine) as session:
            advance(session, job_id, target, Change())
    except IllegalTransition:
        return False
    return True


def test_the_database_refuses_a_release_without_a_passed_gate_run(product: Product, client: TestClient) -> None:
    """The rule that no code path can forget: straight SQL, past every service."""
    job = ended_job(product, client, Verdict.BLOCK)
    with read_session(product.engine) as session:
        run = session.scalars(select(GateRun)).one()
    row = {
        "id": "rel_x",
        "model_id": "ft:x",
        "project_id": job.project_id,
        "job_id": job.id,
        "gate_run_id": run.id,
        "gate_verdict": "block",
        "candidate_digest": run.candidate_digest,
        "override_reason": None,
    }
    forged = [
        row,
        {**row, "gate_verdict": "pass"},
        {**row, "gate_verdict": "pass", "candidate_digest": "e" * 64},
        {**row, "gate_run_id": "gate_none", "gate_verdict": "pass"},
        {**row, "candidate_digest": "e" * 64, "override_reason": "because"},
    ]
    for values in forged:
        with pytest.raises(IntegrityError), unit_of_work(product.engine) as session:
            session.execute(INSERT_RELEASE, values)
    with unit_of_work(product.engine) as session:
        session.execute(INSERT_RELEASE, {**row, "override_reason": "olga: looked at it"})


INSERT_RELEASE = text(
    "INSERT INTO release (id, model_id, project_id, job_id, gate_run_id, gate_verdict, candidate_digest, bundle_digest,"
    " storage_prefix, manifest, state, override_reason, created_at) VALUES (:id, :model_id, :project_id, :job_id,"
    " :gate_run_id, :gate_verdict, :candidate_digest, 'b', 'p', '{}', 'released', :override_reason, 0)"
)


def test_a_job_made_before_its_file_is_checked_waits_and_goes_on(product: Product, client: TestClient) -> None:
    job_id = new_job(product, upload(client))
    assert read_job(product, job_id).status is JobStatus.VALIDATING_FILES
    assert validate_next(product) == "processed"
    assert read_job(product, job_id).status is JobStatus.QUEUED
    assert claim(product, WorkKind.TUNE).subject_id == job_id
    assert topics(product, job_id) == [
        "fine_tuning.job.created",
        "fine_tuning.job.validated",
        "fine_tuning.job.queued",
    ]


def test_a_job_waits_for_both_of_its_files(product: Product, client: TestClient) -> None:
    job_id = new_job(product, upload(client), validation_file=upload(client, name="valid.jsonl"))
    validate_next(product)
    assert read_job(product, job_id).status is JobStatus.VALIDATING_FILES
    validate_next(product)
    assert read_job(product, job_id).status is JobStatus.QUEUED


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_a_bad_file_fails_the_job_that_waits_for_it(product: Product, client: TestClient, param: str) -> None:
    good, bad = ready_file(product, client), upload(client, b"no json\n")
    named = {
        "training_file": good,
        "validation_file": bad,
        **({"training_file": bad} if param == "training_file" else {}),
    }
    if param == "training_file":
        del named["validation_file"]
    wishes = {key: value for key, value in named.items() if key != "training_file"}
    job_id = new_job(product, named["training_file"], **wishes)
    assert validate_next(product) == "error"
    answer = client.get(f"/fine_tuning/jobs/{job_id}").json()
    assert answer["status"] == "failed"
    assert (answer["error"]["code"], answer["error"]["param"]) == (f"invalid_{param}", param)
    assert "line 1" in answer["error"]["message"]


def test_a_worker_sees_everything_by_digest(product: Product, client: TestClient) -> None:
    plan, _ = running_job(product, client, seed=11, peft={"rank": 4}, recovery={"method": "panacea", "strength": 0.5})
    assert plan.seed == 11
    assert plan.peft == {"rank": 4}
    assert plan.base.name == "tiny" and plan.base.digest == "d" * 64
    assert plan.policy.recovery["mode"] == "fixed"
    assert [spec["method"] for spec in plan.policy.recovery["specs"]] == ["panacea"]
    assert len(plan.training.sha256) == 64 and plan.training_rows == 12
    assert {planned.role for planned in plan.sets} >= {"harmful", "harm_confirmation"}


def test_an_altered_policy_stops_the_job_before_it_starts(product: Product, client: TestClient) -> None:
    queued_job(product, client)
    with unit_of_work(product.engine) as session:
        session.execute(text("UPDATE policy SET body = '{}'"))
    lease = claim(product, WorkKind.TUNE)
    with pytest.raises(Exception, match="altered"), unit_of_work(product.engine) as session:
        jobs.start(session, lease)


def test_progress_and_metrics_reach_the_customer(product: Product, client: TestClient) -> None:
    plan, lease = running_job(product, client)
    with unit_of_work(product.engine) as session:
        jobs.set_stage(session, lease, Stage.TRAINING)
        jobs.record_hyperparameters(session, lease, {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0})
        events = [JobEvent("Step 3/96: training loss 1.20", data={"step": 3, "train_loss": 1.2})]
        jobs.report_progress(session, lease, {"step": 3, "total_steps": 96, "eta_seconds": 9.0}, events)
    answer = client.get(f"/fine_tuning/jobs/{plan.job_id}").json()
    assert answer["stage"] == "training"
    assert answer["progress"]["total_steps"] == 96
    assert answer["estimated_finish"] > answer["created_at"]
    assert answer["hyperparameters"] == {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.0}
    assert answer["method"]["supervised"]["hyperparameters"] == answer["hyperparameters"]
    stages = [entry["stage"] for entry in answer["stage_history"]]
    assert stages == ["validating", "queued", "preparing", "training"]
    assert [entry["left_at"] is None for entry in answer["stage_history"]] == [False, False, False, True]
    messages = [event["message"] for event in client.get(f"/fine_tuning/jobs/{plan.job_id}/events").json()["data"]]
    assert messages[0].startswith("Step 3/96")


def test_a_lost_lease_puts_the_job_back_in_the_queue(product: Product, client: TestClient) -> None:
    plan, lease = running_job(product, client)
    with unit_of_work(product.engine) as session:
        work.retry(session, lease, "worker stopped", backoff_seconds=0)
        assert jobs.requeue(session, plan.job_id) is JobStatus.QUEUED
    again = claim(product, WorkKind.TUNE, "worker-2")
    assert (again.subject_id, again.fence) == (plan.job_id, lease.fence + 1)


def test_a_job_out_of_attempts_fails_by_name(product: Product, client: TestClient) -> None:
    plan, _ = running_job(product, client)
    with unit_of_work(product.engine) as session:
        assert jobs.finish_dead(session, plan.job_id) is JobStatus.FAILED
        assert jobs.finish_dead(session, plan.job_id) is JobStatus.FAILED
    assert read_job(product, plan.job_id).error_code == "attempts_exhausted"


def test_a_cancelled_job_waiting_for_a_worker_frees_its_place(product: Product, client: TestClient) -> None:
    job_id = queued_job(product, client)
    assert client.post(f"/fine_tuning/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    with read_session(product.engine) as session:
        item = session.scalars(select(WorkItem).where(WorkItem.subject_id == job_id)).one()
    assert item.state.value == "cancelled"
    assert topics(product, job_id)[-1] == "fine_tuning.job.cancelled"


def test_a_job_that_ended_before_it_was_started_stays_as_it_ended(product: Product, client: TestClient) -> None:
    job_id = queued_job(product, client)
    lease = claim(product, WorkKind.TUNE)
    assert client.post(f"/fine_tuning/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    assert settle(product, lease, JobOutcome(error=JobError("system_error", "cannot start"))) == "cancelled"
    assert topics(product, job_id)[-1] == "fine_tuning.job.cancelled"


def test_an_outcome_is_one_thing_only() -> None:
    for wrong in ({}, {"cancelled": True, "verdict": Verdict.PASS}, {"error": JobError("a", "b"), "cancelled": True}):
        with pytest.raises(ValueError, match="only one"):
            JobOutcome(**wrong)


def test_rows_of_a_job_are_never_deleted_by_its_end(product: Product, client: TestClient) -> None:
    job = ended_job(product, client, Verdict.BLOCK)
    assert job.candidate is not None and job.candidate["prefix"].startswith("quarantine/")
    assert count(product, Job) == 1
