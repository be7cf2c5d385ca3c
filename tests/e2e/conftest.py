"""Real processes: `theriac up` and its children, started as a person would, ended by their pids."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

ROOT = Path(__file__).resolve().parents[2]
STANDIN = ROOT / "tests" / "workers" / "standin_trainer.py"
TERMINAL = {"succeeded", "failed", "cancelled"}
ROWS = "".join(
    json.dumps({"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}) + "\n"
    for n in range(20)
)


def service_environment(home: Path, behaviour: str, **more: str) -> dict[str, str]:
    """Settings for drills: a stand-in trainer and a lease of seconds."""
    quick = {
        "THERIAC_HOME": str(home),
        "THERIAC_WORKER__TRAINER_COMMAND": json.dumps([sys.executable, str(STANDIN), behaviour]),
        "THERIAC_WORKER__LEASE_SECONDS": "6",
        "THERIAC_WORKER__HEARTBEAT_SECONDS": "0.5",
        "THERIAC_WORKER__SELF_FENCE_SECONDS": "5",
        "THERIAC_WORKER__BACKOFF_SECONDS": "0",
        "THERIAC_WORKER__POLL_SECONDS": "0.2",
        "THERIAC_WEBHOOKS__ALLOW_PRIVATE": "true",
        "THERIAC_WEBHOOKS__ALLOW_HTTP": "true",
        "THERIAC_WEBHOOKS__POLL_SECONDS": "0.2",
    }
    return {**os.environ, "PYTHONPATH": str(ROOT), **quick, **more}


def children_of(pid: int) -> set[int]:
    """All descendants, by the kernel's own parent links."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, frontier = set(), {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier} - found
        found |= frontier
    return found


def alive(pids: set[int]) -> set[int]:
    living = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            living.add(pid)
    return living


def wait_until(condition: Callable[[], Any], seconds: float = 30.0, what: str = "the condition") -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what} did not come true within {seconds:g} s")


def follow(client: openai.OpenAI, job_id: str, seconds: float = 60.0) -> Any:
    """The job, when it has ended."""

    def ended() -> Any:
        job = client.fine_tuning.jobs.retrieve(job_id)
        return job if job.status in TERMINAL else None

    return wait_until(ended, seconds, f"the end of {job_id}")


def create_job(client: openai.OpenAI, **more: Any) -> Any:
    file = client.files.create(file=("train.jsonl", ROWS.encode()), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model="apothecary-1", training_file=file.id, **more)


@dataclass
class Up:
    """One running `theriac up`."""

    process: subprocess.Popen[bytes]
    ready: Path
    log: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.facts["url"] + "/v1", api_key=self.facts["api_key"], max_retries=0)

    def children(self) -> set[int]:
        return children_of(self.process.pid)

    def stop(self, number: signal.Signals = signal.SIGINT, seconds: float = 30.0) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)


@pytest.fixture
def start_up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Starts `theriac up` on a free port and waits until it answers. Keys of the first start are kept for later ones."""
    started: list[Up] = []
    keys: dict[str, Any] = {}

    def start(behaviour: str = "pass", *arguments: str, **more: str) -> Up:
        number = len(started)
        ready, log = tmp_path / f"ready-{number}.json", tmp_path / f"up-{number}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "up", "--port", "0", "--ready-file", str(ready), *arguments],
                env=service_environment(tmp_path / "home", behaviour, **more),
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=tmp_path,
            )
        one = Up(process, ready, log)
        started.append(one)
        wait_until(lambda: ready.exists() or process.poll() is not None, 60, "theriac up")
        assert process.poll() is None, log.read_text()
        one.facts = json.loads(ready.read_text())
        keys.update({name: value for name, value in one.facts.items() if name.endswith("_key") and value})
        one.facts.update(keys)
        return one

    yield start
    for one in started:
        left = one.children()
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
        for pid in alive(left):
            os.kill(pid, signal.SIGKILL)
