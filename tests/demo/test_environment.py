"""What a demo starts, it starts on its own folder and database, whatever the reader's shell has exported."""

from __future__ import annotations

import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from demo import cluster, service

EXPORTED = {
    "THERIAC_HOME": "/srv/theriac",
    "THERIAC_DATABASE_URL": "postgresql://production/theriac",
    "THERIAC_REDIS_URL": "redis://production/0",
    "THERIAC_STORAGE__BUCKET": "production",
    "THERIAC_WORKER__TRAINER_COMMAND": '["rm"]',
}


class Started(Exception):
    """Stands in for the process; carries the environment it would have had."""

    def __init__(self, environment: dict[str, str]) -> None:
        super().__init__()
        self.environment = environment


@pytest.fixture
def production_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is started: the first process is caught with the environment it was to get."""

    def catch(*_: Any, env: dict[str, str], **__: Any) -> None:
        raise Started(env)

    for name, value in EXPORTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "Popen", catch)


def settings_of(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("THERIAC_")}


@pytest.mark.usefixtures("production_exported")
def test_the_embedded_demo_hands_on_none_of_the_readers_settings() -> None:
    with pytest.raises(Started) as started, service.embedded_service():
        pass
    [(name, home)] = settings_of(started.value.environment).items()
    assert (name, home in EXPORTED.values()) == ("THERIAC_HOME", False)
    assert "PATH" in started.value.environment


@pytest.mark.usefixtures("production_exported")
def test_the_cluster_demo_hands_on_none_of_the_readers_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster.local_servers, "postgres", lambda: nullcontext("postgresql:///private"))
    monkeypatch.setattr(cluster.local_servers, "redis", lambda: nullcontext("redis://127.0.0.1/0"))
    with pytest.raises(Started) as started, cluster.running_cluster(Console(quiet=True), tmp_path):
        pass
    settings = settings_of(started.value.environment)
    assert not set(settings.values()) & set(EXPORTED.values())
    assert settings["THERIAC_DATABASE_URL"] == "postgresql:///private"
    assert "THERIAC_STORAGE__BUCKET" not in settings
