"""Real text at real lengths, through the real service and the real trainer: nothing is cut, everything is reported."""

from __future__ import annotations

import csv
import io
import json
import sys

from tests.e2e.conftest import Up, wait_until
from tests.e2e.word_problems import as_jsonl, problems
from workers.ml.apothecary import shipped
from workers.ml.chat import encode_row
from workers.ml.data import parse_row

REAL_TRAINER = {
    "THERIAC_WORKER__TRAINER_COMMAND": json.dumps([sys.executable, "-m", "workers.ml", "run"]),
    "THERIAC_WORKER__LEASE_SECONDS": "30",
    "THERIAC_WORKER__SELF_FENCE_SECONDS": "20",
}


def test_a_hundred_word_problems_go_through_upload_training_recovery_and_gate(start_up) -> None:  # type: ignore[no-untyped-def]
    rows = problems()
    assert max(len(question) + len(answer) for question, answer in rows) > 1500
    up: Up = start_up("pass", **REAL_TRAINER)
    client = up.client
    file = client.files.create(file=("problems.jsonl", as_jsonl(rows)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="apothecary-1",
        training_file=file.id,
        seed=5,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}}},
        extra_body={"recovery": {"method": "scale-down", "dial": [0.5]}},
    )
    path = f"/fine_tuning/jobs/{job.id}/safety_report"
    job = wait_until(lambda: _settled(client, job.id), 420, "a verdict")
    report = client.get(path, cast_to=dict)
    assert report["verdict"] in {"block", "review"}, "twenty held-out rows prove nothing about accuracy"
    assert job.fine_tuned_model is None

    trained = report["rows"]["training_rows"]
    assert trained + report["rows"]["held_out_rows"] == len(rows)
    assert report["training"]["rows"] == trained
    losses = [float(row["train_loss"]) for row in csv.DictReader(io.StringIO(_result(client, job)))]
    assert len(losses) == -(-trained // 4)
    assert sum(losses[-5:]) < sum(losses[:5]), "the loss falls"


def test_no_row_of_that_length_is_near_the_context_limit() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shipped.MODEL_FOLDER, local_files_only=True)
    lengths = [
        len(encode_row(tokenizer, parse_row(json.loads(line)), max_tokens=shipped.CONTEXT))
        for line in as_jsonl(problems()).decode().split("\n")
        if line
    ]
    assert max(lengths) <= shipped.CONTEXT


def _settled(client, job_id):  # type: ignore[no-untyped-def]
    job = client.fine_tuning.jobs.retrieve(job_id)
    return job if job.status in {"succeeded", "failed", "cancelled", "paused"} else None


def _result(client, job) -> str:  # type: ignore[no-untyped-def]
    return str(client.files.content(job.result_files[0]).text)
