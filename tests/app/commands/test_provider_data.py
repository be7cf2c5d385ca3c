"""`theriac sets` and `theriac policies` on the provider's own machine."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from app.cli import cli
from app.safety.schemas import SetRole
from app.settings import Settings, get_settings
from app.storage import open_storage
from tests.app.safety.sets import jsonl, row, rows

Run = Callable[..., Result]
HARMFUL = jsonl(rows(SetRole.HARMFUL))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("THERIAC_HOME", str(tmp_path / "theriac"))
    get_settings.cache_clear()
    yield tmp_path / "theriac"
    get_settings.cache_clear()


@pytest.fixture
def run(home: Path) -> Run:
    return lambda *arguments: CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(HARMFUL)
    return path


def parsed(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_sets_are_imported_listed_and_shown_without_rows(run: Run, file: Path) -> None:
    assert "no provider sets" in run("sets", "list").stdout
    made = parsed(run("sets", "import", "mine", "--role", "harmful", file, "--json"))
    assert (made["name"], made["version"], made["rows"], made["split"]) == ("mine", 1, 3, "recovery")
    again = run("sets", "import", "mine", "--role", "harmful", file)
    assert again.stdout.startswith(f"{made['id']}  mine@1  harmful (for recovery)")
    file.write_bytes(jsonl(rows(SetRole.HARMFUL, 5)))
    run("sets", "import", "mine", "--role", "harmful", file)
    assert [one["version"] for one in parsed(run("sets", "list", "--role", "harmful", "--json"))] == [2, 1]
    assert parsed(run("sets", "list", "--role", "retention", "--json")) == []
    assert parsed(run("sets", "show", "mine", "--role", "harmful", "--json"))["rows"] == 5
    shown = run("sets", "show", "mine", "--role", "harmful", "--version", "1").stdout
    assert made["sha256"] in shown and "by command line" in shown
    assert "placeholder" not in shown + run("sets", "list").stdout + again.stdout
    unknown = run("sets", "show", "mine", "--role", "refusals")
    assert (unknown.exit_code, "no provider set 'mine'" in unknown.stderr) == (1, True)


def test_a_file_that_is_no_set_is_explained_without_quoting_it(run: Run, file: Path) -> None:
    file.write_bytes(jsonl([row(SetRole.HARMFUL, 0, answer="")]))
    refused = run("sets", "import", "mine", "--role", "harmful", file)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: Line 1 of the data set 'harmful' ('harmful-0'): 'answer' is text")
    assert "placeholder" not in refused.output
    assert run("sets", "import", "a b", "--role", "harmful", file).exit_code == 1
    assert run("sets", "import", "mine", "--role", "poison", file).exit_code == 2


def test_an_export_is_the_import_byte_for_byte_and_for_its_owner_alone(run: Run, file: Path, tmp_path: Path) -> None:
    run("sets", "import", "mine", "--role", "harmful", file)
    out = tmp_path / "out.jsonl"
    result = run("sets", "export", "mine", "--role", "harmful", "--out", out)
    assert (result.exit_code, out.read_bytes()) == (0, HARMFUL)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert "placeholder" not in result.output
    taken = run("sets", "export", "mine", "--role", "harmful", "--out", out)
    assert (taken.exit_code, "cannot be made" in taken.stderr) == (1, True)
    assert run("sets", "export", "mine", "--role", "harmful", "--version", "2", "--out", tmp_path / "x").exit_code == 1


def test_an_altered_set_is_not_exported(run: Run, file: Path, home: Path, tmp_path: Path) -> None:
    made = parsed(run("sets", "import", "mine", "--role", "harmful", file, "--json"))
    open_storage(Settings(home=home)).put_bytes(f"provider/sets/{made['sha256']}.jsonl", b"{}")
    refused = run("sets", "export", "mine", "--role", "harmful", "--out", tmp_path / "out.jsonl")
    assert (refused.exit_code, "provider_set_altered" in refused.stderr) == (1, True)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_policy_is_published_from_a_file_and_listed(run: Run, file: Path, tmp_path: Path) -> None:
    for role in SetRole:
        file.write_bytes(jsonl(rows(role)))
        run("sets", "import", "mine", "--role", role.value, file)
    policy = tmp_path / "policy.json"
    draft: dict[str, Any] = {"name": "strict", "sets": {role.value: "mine" for role in SetRole}}
    policy.write_text(json.dumps(draft))
    assert "no policies" in run("policies", "list").stdout
    first = parsed(run("policies", "publish", policy, "--json"))
    assert (first["name"], first["version"], first["published_by"]) == ("strict", 1, "command line")
    policy.write_text(json.dumps({**draft, "max_answer_tokens": 99}))
    assert "strict@2" in run("policies", "publish", policy).stdout
    assert [one["version"] for one in parsed(run("policies", "list", "--json"))] == [2, 1]
    assert "strict" in run("policies", "list").stdout


def test_a_policy_that_cannot_be_is_refused_in_a_line(run: Run, file: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    for text, reason in (
        ("{", "is not a policy: the file"),
        ('{"name": "strict"}', "is not a policy: sets"),
        ('{"name": "strict", "sets": {}}', "names none for 'harmful'. (missing_required_parameter)"),
        ('{"name": "strict", "sets": {}, "base_model": "x"}', "no base model 'x'"),
    ):
        policy.write_text(text)
        refused = run("policies", "publish", policy)
        assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
        assert reason in refused.stderr
    for role in SetRole:
        file.write_bytes(jsonl([row(role, 0, messages=[{"role": "user", "content": "The same placeholder."}])]))
        assert run("sets", "import", "same", "--role", role.value, file).exit_code == 0
    policy.write_text(json.dumps({"name": "strict", "sets": {role.value: "same" for role in SetRole}}))
    refused = run("policies", "publish", policy)
    assert "'harm_selection-0' and 'harmful-0' (equal prompt)" in refused.stderr
    assert "provider_sets_overlap" in refused.stderr and "placeholder" not in refused.output
