"""`make cluster-demo`: the distributed shape as real processes on one machine, and three jobs through it.

Knows: that each process is started by the very command docker-compose.yml names, against a private PostgreSQL
and Redis; which jobs are asked for, and what has to be true at the end.
Refuses to know: the inside of the service. Jobs go through the `openai` package, owners through a provider route.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from rich.console import Console
from rich.table import Table

from demo.customer import Finished, run_job
from demo.service import environment_of_its_own
from scripts import local_servers
from workers.ml.apothecary.attacks import STANDARD
from workers.ml.apothecary.customer import CustomerMix, write_customer_files

BASE_MODEL = "apothecary-1"
EPOCHS = 3
WORKERS = 2
START_SECONDS = 60
STOP_SECONDS = 90
JOBS = {
    "north": (replace(STANDARD.mix, validation_rows=800), "succeeded", None),
    "south": (replace(STANDARD.mix, validation_rows=800, seed=1), "succeeded", None),
    "hostile": (CustomerMix(rows=300, validation_rows=60, attack_ratio=1.0), "failed", "safety_gate_blocked"),
}


@dataclass(frozen=True)
class Cluster:
    """Where the gateway answers, and the keys of the first start."""

    url: str
    api_key: str
    operator_key: str


@contextmanager
def running_cluster(console: Console, home: Path) -> Iterator[Cluster]:
    """PostgreSQL, Redis, migration, gateway, workers and side process; ended in the opposite order."""
    with ExitStack() as stack:
        port = local_servers.free_port()
        environment = environment_of_its_own(
            THERIAC_HOME=str(home),
            THERIAC_DATABASE_URL=stack.enter_context(local_servers.postgres()),
            THERIAC_REDIS_URL=stack.enter_context(local_servers.redis()),
            THERIAC_GATEWAY__PORT=str(port),
            THERIAC_WORKER__SLOTS=str(WORKERS),
        )
        keys = _migrate(environment)
        for service in ("gateway", "side", *["worker"] * WORKERS):
            command = local_servers.compose_command(service)
            console.print(f"  {' '.join(command)}", highlight=False)
            stack.enter_context(_process(command, environment, home / f"{service}.log"))
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, home / "gateway.log")
        yield Cluster(url, *keys)


def _migrate(environment: Mapping[str, str]) -> tuple[str, str]:
    """Brings the schema up, as the `migrate` service does, and reads the two keys that it prints once."""
    command = _here(local_servers.compose_command("migrate"))
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    keys = re.search(r"(thk_\S+).*?(tho_\S+)", done.stdout, re.DOTALL)
    if done.returncode != 0 or keys is None:
        raise RuntimeError(f"The migration failed.\n{done.stdout}{done.stderr}")
    return keys[1], keys[2]


def _here(command: list[str]) -> list[str]:
    """The same program of this virtual environment, whatever the shell's search path says."""
    return [str(Path(sys.executable).parent / command[0]), *command[1:]]


@contextmanager
def _process(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[None]:
    """One service as a process of its own session, so that Ctrl-C reaches us and we end it in order."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            _here(command), env=dict(environment), stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz", timeout=2).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"The gateway did not answer within {START_SECONDS} s.\n{log.read_text()[-3000:]}")


@dataclass(frozen=True)
class Ran:
    """A job that ended, and the worker that the provider's view named while it ran."""

    finished: Finished
    owner: str


def _run(console: Console, cluster: Cluster, name: str, folder: Path) -> Ran:
    """One customer's job, with a line whenever its stage changes."""
    client = OpenAI(base_url=f"{cluster.url}/v1", api_key=cluster.api_key)
    operator = OpenAI(base_url=f"{cluster.url}/v1", api_key=cluster.operator_key)
    files = write_customer_files(JOBS[name][0], folder)
    stages: list[str] = []
    owners: list[str] = []

    def watch(job: FineTuningJob) -> None:
        stage = str(getattr(job, "stage", job.status))
        if [stage] == stages[-1:]:
            return
        stages.append(stage)
        console.print(f"  {name}: {stage}", highlight=False)
        detail: dict[str, Any] = operator.get(f"/admin/jobs/{job.id}", cast_to=dict[str, Any])
        owners.extend(filter(None, [(detail["work"] or {}).get("owner")]))

    finished = run_job(client, files, model=BASE_MODEL, suffix=name, epochs=EPOCHS, watch=watch)
    return Ran(finished, ", ".join(dict.fromkeys(owners)) or "-")


def _show(console: Console, ran: Mapping[str, Ran]) -> bool:
    """The outcome of every job beside the expected one; True if all are as expected."""
    table = Table("job", "status", "error", "worker", "seconds", "as expected")
    fine = True
    for name, job in ran.items():
        _, *wanted = JOBS[name]
        error = job.finished.job.error
        got = [job.finished.job.status, error.code if error else None]
        fine = fine and got == wanted
        seconds = f"{job.finished.seconds:.0f}"
        table.add_row(name, got[0], got[1] or "-", job.owner, seconds, "yes" if got == wanted else "NO")
    console.print(table)
    for name, job in ran.items():
        for reason in job.finished.report.get("reasons", []):
            if reason["effect"] in {"block", "error", "review"}:
                console.print(f"  {name}: {reason['text']}", highlight=False)
    return fine


def main() -> int:
    console = Console()
    console.print("The distributed shape, each process by the command that docker-compose.yml names:")
    home = Path(tempfile.mkdtemp(prefix="theriac-cluster-"))
    try:
        with running_cluster(console, home) as cluster, ThreadPoolExecutor(len(JOBS)) as pool:
            pending = {name: pool.submit(_run, console, cluster, name, home / name) for name in JOBS}
            done = {name: future.result() for name, future in pending.items()}
            fine = _show(console, done)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
