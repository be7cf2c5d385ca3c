"""The command line: against a real server over HTTP, and against the database of a home folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from fastapi import FastAPI
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from app import setup
from app.commands import base_models, files, jobs, keys, models
from app.main import create_app
from app.safety.library import BUNDLED_ASSETS
from app.settings import Settings, get_settings
from app.tables.safety import Verdict
from tests.app.product import BASE, DATASET, WEIGHTS, Product, ask_as, ended_job, ready_file, running_job, validate_next

GROUPS = {"files": files, "jobs": jobs, "models": models, "keys": keys, "base-models": base_models}
Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    def invoke(group: str, *arguments: str, **environment: str) -> Result:
        return CliRunner().invoke(GROUPS[group].commands, list(arguments), env=environment)

    return invoke


@pytest.fixture
def theriac(product: Product, serve: Callable[[FastAPI], str], run: Run) -> Run:
    """Commands with the service's address and the first customer's key in the environment."""
    url = serve(product.app)

    def invoke(group: str, *arguments: str, key: str = product.api_key) -> Result:
        return run(group, *arguments, THERIAC_URL=url, THERIAC_API_KEY=key)

    return invoke


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("THERIAC_HOME", str(tmp_path / "theriac"))
    get_settings.cache_clear()
    yield tmp_path / "theriac"
    get_settings.cache_clear()


def parsed(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_files_are_uploaded_listed_explained_and_deleted(product: Product, theriac: Run, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(DATASET)
    file = parsed(theriac("files", "upload", str(path), "--json"))
    assert (file["filename"], file["bytes"]) == ("train.jsonl", len(DATASET))
    assert validate_next(product) == "processed"
    assert [listed["id"] for listed in parsed(theriac("files", "list", "--json"))] == [file["id"]]
    table = theriac("files", "list").stdout
    assert "train.jsonl" in table and "processed" in table
    assert "no rule is broken" in theriac("files", "validation", file["id"]).stdout
    assert theriac("files", "delete", file["id"]).stdout == f"deleted {file['id']}\n"
    assert "no files" in theriac("files", "list").stdout


def test_a_broken_dataset_is_explained(product: Product, theriac: Run, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": []}\n' * 10)
    file = parsed(theriac("files", "upload", str(path), "--json"))
    validate_next(product)
    shown = theriac("files", "validation", file["id"]).stdout
    assert "reject" in shown and "no_messages" in shown


def test_jobs_are_created_listed_and_cancelled(product: Product, theriac: Run) -> None:
    file_id = ready_file(product, ask_as(product, product.api_key))
    job = parsed(
        theriac("jobs", "create", "--model", BASE, "--training-file", file_id, "--epochs", "2", "--seed", "5", "--json")
    )
    assert (job["seed"], job["hyperparameters"]["n_epochs"]) == (5, 2)
    assert [listed["id"] for listed in parsed(theriac("jobs", "list", "--json"))] == [job["id"]]
    assert job["id"][:10] in theriac("jobs", "list").stdout.replace("\n", "")
    assert theriac("jobs", "cancel", job["id"]).stdout == f"{job['id']}  cancelled\n"
    events = parsed(theriac("jobs", "events", job["id"], "--json"))
    assert [event["message"] for event in events][::2] == [
        f"Created fine-tuning job: {job['id']}",
        "Fine-tuning job cancelled",
    ]


@pytest.mark.parametrize(
    ("verdict", "code", "last"),
    [(Verdict.PASS, 0, "succeeded: ft:tiny"), (Verdict.BLOCK, 1, "failed:"), (Verdict.REVIEW, 3, "paused")],
)
def test_watching_a_job_ends_with_its_result(
    product: Product, theriac: Run, verdict: Verdict, code: int, last: str
) -> None:
    job = ended_job(product, ask_as(product, product.api_key), verdict)
    result = theriac("jobs", "watch", job.id)
    assert result.exit_code == code
    assert result.stdout.startswith(last)
    assert "Created fine-tuning job" in result.stderr


def test_a_progress_line_says_what_is_known() -> None:
    job = {"stage": "training", "progress": {"step": 3, "total_steps": 96, "train_loss": 1.25, "eta_seconds": 9.4}}
    assert jobs.progress_line({**job, "queue": None}) == "training  step 3/96  loss 1.2500  9 s left"
    waiting = {"stage": "queued", "progress": None, "queue": {"position": 2}}
    assert jobs.progress_line(waiting) == "queued  place 2 in the queue"


def test_a_model_is_downloaded_and_every_file_checked(product: Product, theriac: Run, tmp_path: Path) -> None:
    job = ended_job(product, ask_as(product, product.api_key))
    model, folder = str(job.fine_tuned_model), tmp_path / "adapter"
    assert [listed["id"] for listed in parsed(theriac("models", "list", "--json"))] == [BASE, model]
    assert theriac("models", "download", model, str(folder)).exit_code == 0
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "safety_report.json",
    ]


def test_a_tampered_download_keeps_nothing_of_the_file(product: Product, theriac: Run, tmp_path: Path) -> None:
    job = ended_job(product, ask_as(product, product.api_key))
    assert job.candidate is not None
    key = f"{job.candidate['prefix']}/adapter_model.safetensors"
    product.storage.put_bytes(key, WEIGHTS[:-1] + b"!")
    result = theriac("models", "download", str(job.fine_tuned_model), str(tmp_path / "adapter"))
    assert result.exit_code == 2
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_a_refusal_is_one_line_with_its_code(product: Product, theriac: Run, run: Run) -> None:
    unknown = theriac("jobs", "cancel", "ftjob-x")
    assert (unknown.exit_code, unknown.stderr) == (
        1,
        "error: Could not find fine tune: ftjob-x (not_found, fine_tuning_job_id)\n",
    )
    assert "invalid_api_key" in theriac("models", "list", key="thk_wrong").stderr
    assert "THERIAC_API_KEY" in run("models", "list", THERIAC_URL="http://127.0.0.1:9", THERIAC_API_KEY="").stderr
    nobody = run("models", "list", THERIAC_URL="http://127.0.0.1:9", THERIAC_API_KEY="thk_x")
    assert nobody.exit_code == 2
    assert "theriac up" in nobody.stderr


def test_a_running_job_can_be_cancelled_from_the_command_line(product: Product, theriac: Run) -> None:
    plan, _ = running_job(product, ask_as(product, product.api_key))
    assert theriac("jobs", "cancel", plan.job_id).stdout == f"{plan.job_id}  cancelling\n"


def test_keys_are_made_shown_once_and_revoked(home: Path, run: Run) -> None:
    made = parsed(run("keys", "create", "ci", "--json"))
    operator = parsed(run("keys", "create", "olga", "--operator", "--json"))
    assert made["key"].startswith("thk_") and operator["key"].startswith("tho_")
    listed = parsed(run("keys", "list", "--json"))
    assert {(row["name"], row["kind"], row["state"]) for row in listed} == {
        ("ci", "customer", "live"),
        ("olga", "operator", "live"),
    }
    assert made["key"] not in json.dumps(listed)
    assert run("keys", "revoke", made["id"]).exit_code == 0
    assert parsed(run("keys", "list", "--json"))[0]["state"] == "revoked"
    again = run("keys", "revoke", made["id"])
    assert (again.exit_code, again.stderr.startswith("error: There is no live key")) == (1, True)


def test_base_models_are_added_listed_and_retired(home: Path, run: Run, tmp_path: Path) -> None:
    folder = str(BUNDLED_ASSETS / "model")
    added = parsed(run("base-models", "add", "mine", "--path", folder, "--learning-rate", "0.001", "--json"))
    assert (added["name"], added["learning_rate"]) == ("mine", 0.001)
    assert added["pretrained_path"] is None
    before = str(BUNDLED_ASSETS / "pretrained")
    again = parsed(run("base-models", "add", "mine", "--path", folder, "--pretrained", before, "--json"))
    assert again["pretrained_path"] == before
    assert run("base-models", "add", "mine", "--path", folder, "--pretrained", folder).exit_code == 1
    assert [row["name"] for row in parsed(run("base-models", "list", "--json"))] == ["mine"]
    refused = run("base-models", "add", "empty", "--path", str(tmp_path))
    assert refused.exit_code == 1
    assert run("base-models", "add", "x").exit_code == 1
    assert run("base-models", "add", "x", "--path", folder, "--defaults", "[]").exit_code == 1
    assert run("base-models", "retire", "mine").exit_code == 0
    assert "no base models" in run("base-models", "list").stdout


def test_a_first_start_makes_everything_and_a_second_changes_nothing(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    first = setup.prepare(settings)
    assert first is not None
    assert first.api_key not in repr(first)
    assert setup.prepare(settings) is None
    app = create_app(settings)
    client = TestClient(app, base_url="http://gateway/v1", headers={"authorization": f"Bearer {first.api_key}"})
    assert [model["owned_by"] for model in client.get("/models").json()["data"]] == ["provider"]
    methods = client.get("/capabilities").json()["recovery_methods"]
    assert {"antidote", "panacea", "anchored-patch"} <= {method["method"] for method in methods}
    assert client.get("http://gateway/readyz").json() == {"status": "ok"}
    app.state.engine.dispose()
