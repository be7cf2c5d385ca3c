"""The Compose file is valid by the specification's schema, and keeps the promises the architecture makes.

No Docker engine is needed, and none was at hand: images are not built here.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from app.cli import cli
from app.settings import Settings
from scripts.settings_table import walk

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "compose-spec.json").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
OURS = ("migrate", "gateway", "worker", "side")
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("name", ["docker-compose.yml", "docker-compose.gpu.yml"])
def test_the_compose_file_is_valid_by_the_specification(name: str) -> None:
    validator = jsonschema.Draft201909Validator(SCHEMA)
    assert [error.message for error in validator.iter_errors(yaml.safe_load((ROOT / name).read_text()))] == []


def test_the_schema_would_notice_a_mistake() -> None:
    wrong = {**COMPOSE, "services": {**COMPOSE["services"], "gateway": {"comand": ["theriac"]}}}
    assert not jsonschema.Draft201909Validator(SCHEMA).is_valid(wrong)


def test_the_services_are_the_ones_of_the_distributed_shape() -> None:
    assert set(COMPOSE["services"]) == {"postgres", "redis", *OURS}


@pytest.mark.parametrize("name", OURS)
def test_every_named_target_stands_in_the_dockerfile(name: str) -> None:
    target = COMPOSE["services"][name]["build"]["target"]
    assert re.search(rf"^FROM source AS {target}$", DOCKERFILE, re.MULTILINE)


@pytest.mark.parametrize(("target", "service"), [("gateway", "gateway"), ("worker", "worker")])
def test_an_image_starts_the_same_command_as_its_service(target: str, service: str) -> None:
    stage = DOCKERFILE.split(f"FROM source AS {target}")[1].split("FROM ")[0]
    [command] = re.findall(r"^CMD (\[.*\])$", stage, re.MULTILINE)
    assert json.loads(command) == COMPOSE["services"][service]["command"]


def test_redis_keeps_what_it_is_told_and_evicts_nothing() -> None:
    command = shlex.join(COMPOSE["services"]["redis"]["command"])
    for setting in ("--appendonly yes", "--maxmemory-policy noeviction", "--requirepass"):
        assert setting in command


def test_only_the_gateway_is_published_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in COMPOSE["services"].items() if "ports" in service}
    assert list(published) == ["gateway"]
    assert all(port.startswith("127.0.0.1:") for port in published["gateway"])


def test_workers_have_no_route_out() -> None:
    assert COMPOSE["services"]["worker"]["networks"] == ["back"]
    assert COMPOSE["networks"]["back"] == {"internal": True}


def test_nothing_of_ours_starts_before_the_schema_is_there() -> None:
    for name in ("gateway", "worker", "side"):
        depends: dict[str, Any] = COMPOSE["services"][name]["depends_on"]
        assert depends["migrate"] == {"condition": "service_completed_successfully"}


def test_a_worker_is_given_the_time_a_drain_takes() -> None:
    assert int(COMPOSE["services"]["worker"]["stop_grace_period"].removesuffix("s")) >= 75


def test_no_secret_has_a_default() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    secrets = re.findall(r"\$\{(\w*PASSWORD)(.*?)\}", text)
    assert secrets
    assert all(rest.startswith(":?") for _, rest in secrets)


@pytest.mark.parametrize("name", OURS)
def test_a_services_command_exists(name: str) -> None:
    """`theriac X` is a command, `python -m X` and `celery -A X` are modules that can be started."""
    match COMPOSE["services"][name]["command"]:
        case ["theriac", command]:
            known = {c.name or c.callback.__name__ for c in cli.registered_commands if c.callback}
            assert command in known
        case ["python", "-m", module]:
            source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
            assert 'if __name__ == "__main__":' in source
        case ["celery", "-A", module, "worker", "-Q", queue, *_]:
            assert (ROOT / (module.replace(".", "/") + ".py")).exists()
            assert queue == Settings().worker.queue
        case other:
            pytest.fail(f"unknown kind of command: {other}")


def test_every_variable_of_ours_in_the_compose_file_is_a_setting() -> None:
    known = {variable for variable, _ in walk(Settings, "THERIAC_")}
    used = set(re.findall(r"THERIAC_\w+", (ROOT / "docker-compose.yml").read_text() + DOCKERFILE))
    assert used
    assert used - known == set()
