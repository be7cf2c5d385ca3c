"""`theriac jobs`: create, follow, cancel. Knows: arguments and columns. Refuses to know: how a job is done."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.console import Console

from app.commands.client import DEFAULT_URL, AsJson, Key, Service, Url, connect
from app.commands.output import moment, show_json, show_table

commands = typer.Typer(no_args_is_help=True, help="Fine-tuning jobs.")

ENDED = {"succeeded", "failed", "cancelled"}
POLL_SECONDS = 1.0


@commands.command()
def create(
    model: Annotated[str, typer.Option(help="base model")],
    training_file: Annotated[str, typer.Option(help="id of a file")],
    validation_file: Annotated[str | None, typer.Option(help="id of a file")] = None,
    suffix: Annotated[str | None, typer.Option(help="goes into the tuned model's name")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, max=50, help="default: chosen from the data")] = None,
    recovery: Annotated[str, typer.Option(help="auto, none, or a recovery method")] = "auto",
    policy: Annotated[str, typer.Option(help="safety policy, name or name@version")] = "default",
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Create a job: train, recover, gate, release."""
    body: dict[str, Any] = {
        "model": model,
        "training_file": training_file,
        "validation_file": validation_file,
        "suffix": suffix,
        "seed": seed,
        "recovery": {"method": recovery},
        "safety": {"policy": policy},
    }
    if epochs is not None:
        body["method"] = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs}}}
    with connect(url, key) as service:
        job = service.post("/fine_tuning/jobs", json={name: value for name, value in body.items() if value is not None})
    if as_json:
        show_json(job)
    else:
        typer.echo(f"{job['id']}  {job['status']}  (follow it: theriac jobs watch {job['id']})")


@commands.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 20,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """List the project's jobs, newest first."""
    with connect(url, key) as service:
        jobs = list(service.pages("/fine_tuning/jobs", limit))
    if as_json:
        show_json(jobs)
        return
    rows = [
        [j["id"], j["model"], j["status"], j["stage"], j["fine_tuned_model"], moment(j["created_at"])] for j in jobs
    ]
    show_table(("id", "model", "status", "stage", "tuned model", "created"), rows, empty="no jobs")


@commands.command()
def watch(job_id: str, url: Url = DEFAULT_URL, key: Key = "", as_json: AsJson = False) -> None:
    """Follow a job to its end. Exit code 0 only if it succeeded; 3 if it waits for the provider's review."""
    with connect(url, key) as service:
        job = _follow(service, job_id, quiet=as_json)
    if as_json:
        show_json(job)
    else:
        typer.echo(_last_line(job))
    if job["status"] != "succeeded":
        raise typer.Exit(3 if job["status"] == "paused" else 1)


@commands.command()
def cancel(job_id: str, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Cancel a job."""
    with connect(url, key) as service:
        job = service.post(f"/fine_tuning/jobs/{job_id}/cancel")
    typer.echo(f"{job_id}  {'cancelling' if job['cancel_requested'] else job['status']}")


@commands.command()
def events(
    job_id: str,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 50,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Show a job's timeline, oldest first."""
    with connect(url, key) as service:
        listed = list(service.pages(f"/fine_tuning/jobs/{job_id}/events", limit))[::-1]
    if as_json:
        show_json(listed)
        return
    rows = [[moment(e["created_at"]), e["level"], e["type"], e["message"]] for e in listed]
    show_table(("when", "level", "type", "message"), rows, empty="no events")


@commands.command()
def report(job_id: str, url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Print a job's safety report as JSON."""
    with connect(url, key) as service:
        show_json(service.get(f"/fine_tuning/jobs/{job_id}/safety_report"))


def _follow(service: Service, job_id: str, *, quiet: bool) -> dict[str, Any]:
    """Polls until the job ends or waits for a person; the current line is kept up to date, milestones stay."""
    console = Console(stderr=True, quiet=quiet)
    last_event = None
    with console.status("…") as status:
        while True:
            job: dict[str, Any] = service.get(f"/fine_tuning/jobs/{job_id}")
            last_event = _print_new_messages(service, job_id, last_event, console)
            if job["status"] in ENDED or job["stage"] == "awaiting_review":
                return job
            status.update(progress_line(job))
            time.sleep(POLL_SECONDS)


def _print_new_messages(service: Service, job_id: str, seen: str | None, console: Console) -> str | None:
    fresh = []
    for event in service.get(f"/fine_tuning/jobs/{job_id}/events", limit=100)["data"]:
        if event["id"] == seen:
            break
        fresh.append(event)
    for event in reversed(fresh):
        if event["type"] != "metrics":
            console.print(f"{moment(event['created_at'])}  {event['message']}", markup=False, highlight=False)
    return fresh[0]["id"] if fresh else seen


def progress_line(job: dict[str, Any]) -> str:
    """Stage, step, loss and remaining time, as far as they are known."""
    progress = job["progress"] or {}
    parts = [job["stage"]]
    if progress.get("total_steps"):
        parts.append(f"step {progress.get('step', 0)}/{progress['total_steps']}")
    if isinstance(progress.get("train_loss"), int | float):
        parts.append(f"loss {progress['train_loss']:.4f}")
    if isinstance(progress.get("eta_seconds"), int | float):
        parts.append(f"{progress['eta_seconds']:.0f} s left")
    if job["queue"]:
        parts.append(f"place {job['queue']['position']} in the queue")
    return "  ".join(parts)


def _last_line(job: dict[str, Any]) -> str:
    if job["status"] == "succeeded":
        return f"succeeded: {job['fine_tuned_model']}"
    if job["error"]:
        return f"{job['status']}: {job['error']['message']} ({job['error']['code']})"
    return f"{job['status']} ({job['stage']})"
