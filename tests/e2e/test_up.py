"""`theriac up` as a real process tree, driven by the unmodified `openai` package. The trainer is a stand-in."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.conftest import alive, create_job, follow, service_environment, wait_until


@pytest.fixture
def hook() -> Any:
    """A receiver of webhooks: (its URL, what it got)."""
    received: list[tuple[dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(({k.lower(): v for k, v in self.headers.items()}, body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/", received
    server.shutdown()
    server.server_close()


def test_a_customer_goes_from_upload_to_verified_bytes_and_hears_of_it_once(start_up, hook):
    up = start_up("pass")
    client = up.client
    url, received = hook
    endpoint = client.webhooks.create(name="e2e", url=url, event_types=["fine_tuning.job.succeeded"])
    job = follow(client, create_job(client, suffix="e2e", seed=7).id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model in {model.id for model in client.models.list()}
    manifest = client.get(f"/models/{job.fine_tuned_model}/artifact", cast_to=object)
    for entry in manifest["files"]:
        path = f"/models/{job.fine_tuned_model}/artifact/{entry['path']}"
        assert hashlib.sha256(_bytes(up, path)).hexdigest() == entry["sha256"]
    assert "step,train_loss" in client.files.content(job.result_files[0]).text
    kinds = {event.type for event in client.fine_tuning.jobs.list_events(job.id)}
    assert {"message", "metrics", "moderation_checks"} <= kinds
    wait_until(lambda: received, 10, "the webhook")
    event = client.webhooks.unwrap(received[0][1], received[0][0], secret=endpoint.signing_secret)
    assert (event.type, event.data.id) == ("fine_tuning.job.succeeded", job.id)
    assert len(received) == 1

    everybody = up.children()
    assert len(everybody) >= 3
    assert up.stop() == 0
    assert alive(everybody) == set(), "Ctrl-C leaves no process"
    text = up.log.read_text()
    assert text.count(up.facts["api_key"]) == 1, "a key is shown once"
    assert "Theriac has stopped." in text
    assert not up.ready.exists()


def _bytes(up: Any, path: str) -> bytes:
    request = urllib.request.Request(
        f"{up.facts['url']}/v1{path}", headers={"authorization": f"Bearer {up.facts['api_key']}"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return bytes(response.read())


def test_ctrl_c_in_the_middle_of_a_training_and_a_restart_lose_nothing(start_up):
    first = start_up("slow")
    job = create_job(first.client)
    wait_until(lambda: first.client.fine_tuning.jobs.retrieve(job.id).to_dict().get("progress"), 30, "progress")
    everybody = first.children()
    assert first.stop() == 0
    assert alive(everybody) == set(), "not even the trainer is left"
    second = start_up("pass")
    assert second.facts["api_key"] == first.facts["api_key"]
    assert follow(second.client, job.id).status == "succeeded"


def test_a_killed_worker_is_started_again_and_its_job_finishes(start_up):
    up = start_up("slow_once")
    job = create_job(up.client)
    wait_until(lambda: up.client.fine_tuning.jobs.retrieve(job.id).to_dict().get("progress"), 30, "progress")
    [worker] = [pid for pid in up.children() if b"workers.agent" in _command(pid)]
    [trainer] = [pid for pid in up.children() if b"standin_trainer" in _command(pid)]
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not alive({trainer}), 3, "the end of the trainer")
    assert follow(up.client, job.id).status == "succeeded"
    assert "worker was started again" in up.log.read_text()


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_second_up_a_taken_port_and_a_kill_of_the_whole(start_up, tmp_path):
    up = start_up("pass")

    def refused(home: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "app.cli", "up", *arguments],
            env=service_environment(tmp_path / home, "pass"),
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
        )

    same_home = refused("home", "--port", "0")
    assert same_home.returncode == 3
    assert same_home.stderr.count("\n") == 1
    assert f"process {up.process.pid}" in same_home.stderr
    port = up.facts["url"].rsplit(":", 1)[1]
    same_port = refused("other", "--port", port)
    assert same_port.returncode == 3
    assert same_port.stderr.count("\n") == 1
    assert f"127.0.0.1:{port}" in same_port.stderr
    everybody = up.children()
    up.process.kill()
    up.process.wait()
    wait_until(lambda: not alive(everybody), 5, "the end of every child of a killed `up`")


def test_a_cancel_is_final_within_seconds_and_a_later_job_runs(start_up):
    up = start_up("slow")
    job = create_job(up.client)
    wait_until(lambda: up.client.fine_tuning.jobs.retrieve(job.id).to_dict().get("progress"), 30, "progress")
    up.client.fine_tuning.jobs.cancel(job.id)
    assert follow(up.client, job.id, 20).status == "cancelled"
    assert not [pid for pid in up.children() if b"standin_trainer" in _command(pid)]
    with pytest.raises(openai.NotFoundError):
        up.client.models.retrieve(f"ft:apothecary-1:default::{job.id[-8:]}")
