"""What a customer does: upload, create a job, follow it, fetch the result. Only the `openai` package and HTTP.

Knows: OpenAI's fine-tuning calls and two of ours (report, artifact).
Refuses to know: that the service runs next door.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import NotFoundError, OpenAI
from openai.types.fine_tuning import FineTuningJob

TERMINAL = {"succeeded", "failed", "cancelled"}
POLL_SECONDS = 0.5
Watcher = Callable[[FineTuningJob], None]


@dataclass(frozen=True)
class Finished:
    """A job that ended, its safety report and how long a customer waited."""

    job: FineTuningJob
    report: dict[str, Any]
    seconds: float


def run_job(
    client: OpenAI, files: tuple[Path, Path], *, model: str, suffix: str, epochs: int, watch: Watcher
) -> Finished:
    """Uploads both files, creates the job and follows it to its end."""
    training, validation = (client.files.create(file=path.open("rb"), purpose="fine-tune") for path in files)
    began = time.monotonic()
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=training.id,
        validation_file=validation.id,
        suffix=suffix,
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs}}},
        extra_body={"recovery": {"method": "auto"}},
    )
    while job.status not in TERMINAL:
        time.sleep(POLL_SECONDS)
        job = client.fine_tuning.jobs.retrieve(job.id)
        watch(job)
    seconds = time.monotonic() - began
    return Finished(job, safety_report(client, job.id), seconds)


def safety_report(client: OpenAI, job_id: str) -> dict[str, Any]:
    """Empty when the job ended before a gate had anything to report."""
    try:
        report: dict[str, Any] = client.get(f"/fine_tuning/jobs/{job_id}/safety_report", cast_to=dict[str, Any])
    except NotFoundError:
        return {}
    return report


def download(client: OpenAI, model: str, folder: Path) -> list[str]:
    """Fetches every file of the released bundle and checks it against the manifest; returns the names."""
    manifest: dict[str, Any] = client.get(f"/models/{model}/artifact", cast_to=dict[str, Any])
    folder.mkdir(parents=True, exist_ok=True)
    for entry in manifest["files"]:
        content = client.get(f"/models/{model}/artifact/{entry['path']}", cast_to=bytes)
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise RuntimeError(f"{entry['path']} is not the file the manifest names")
        target = folder / entry["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return [entry["path"] for entry in manifest["files"]]
