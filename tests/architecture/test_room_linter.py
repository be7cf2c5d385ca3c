"""Each word law is caught, each escape is honoured, and the tree obeys them."""

from pathlib import Path

import pytest

from scripts.room_linter import LAWS, lint, lint_tree

ROOT = Path(__file__).resolve().parents[2]

# (law, a line that breaks it, lines that must stand before it)
BROKEN = [
    ("commit", "session.commit()", ""),
    ("commit", "connection.commit()", ""),
    ("query", "session.execute(select(Job))", "from sqlalchemy import select"),
    ("query", "update(Job).values(a=1)", "from sqlalchemy.orm import Session\nfrom sqlalchemy import update"),
    ("query", "upsert(Job)", "from sqlalchemy.dialects.postgresql import insert as upsert"),
    ("query", "sa.delete(Job)", "import sqlalchemy as sa"),
    ("query", "self.session.query(Job)", ""),
    ("environ", "home = os.environ['HOME']", "import os"),
    ("environ", "home = os.getenv('HOME')", "import os"),
    ("environ", "from os import environ", ""),
    ("clock", "datetime.now(UTC)", "from datetime import UTC, datetime"),
    ("clock", "datetime.datetime.utcnow()", "import datetime"),
    ("clock", "date.today()", "from datetime import date"),
    ("doorbell", "celery.send_task('wake')", ""),
    ("doorbell", "wake.apply_async()", ""),
    ("http-exception", "from fastapi import HTTPException", ""),
    ("http-exception", "raise fastapi.HTTPException(404)", "import fastapi"),
    ("print", "print('hello')", ""),
    ("status", "job.status = 'failed'", ""),
    ("status", "job.status: str = 'failed'", ""),
    ("status", "setattr(job, 'status', 'failed')", ""),
    ("import-module", "importlib.import_module('app.jobs')", "import importlib"),
    ("import-module", "load('app.jobs')", "from importlib import import_module as load"),
    ("import-module", "__import__('app.jobs')", ""),
    ("lazy-import", "def f(): from app.jobs import service", ""),
    ("lazy-import", "def f(): import workers.ml.gate", ""),
    ("lazy-import", "async def f(): from . import service", ""),
]

INNOCENT = [
    "seen = set()\nseen.update([1])",
    "table.select(columns)",
    "from workers.ml.recovery import select\nselect(rows)",
    "if job.status == 'failed': ...",
    "status = 'failed'",
    "class Job:\n    status: str = 'queued'",
    "job = Job(status='queued')",
    "def f():\n    import torch",
    "from app.jobs import service",
    "path.environ = 1",
    "clock.now()",
    "log.info('print(this)')  # print() is only mentioned",
    "session.commits()",
]


@pytest.mark.parametrize(("code", "line", "before"), BROKEN)
def test_a_broken_law_is_found_on_its_line(code: str, line: str, before: str) -> None:
    source = f"{before}\n{line}\n"
    [finding] = [found for found in lint(source, "app/jobs/service.py") if found.code != "query" or code == "query"]
    assert finding.code == code
    assert finding.line == source.splitlines().index(line) + 1
    assert LAWS[code].story in finding.text


@pytest.mark.parametrize(("code", "line", "before"), BROKEN)
def test_an_escape_with_a_reason_is_honoured(code: str, line: str, before: str) -> None:
    assert lint(f"{before}\n{line}  # room: {code} a reason a reviewer can weigh\n", "app/jobs/service.py") == []


@pytest.mark.parametrize(("code", "line", "before"), BROKEN)
def test_an_escape_without_a_reason_is_a_finding(code: str, line: str, before: str) -> None:
    [finding] = lint(f"{before}\n{line}  # room: {code}\n", "app/jobs/service.py")
    assert (finding.code, "needs a reason" in finding.text) == ("escape", True)


@pytest.mark.parametrize("source", INNOCENT)
def test_a_neighbour_of_the_word_is_not_the_word(source: str) -> None:
    assert lint(source + "\n", "app/jobs/service.py") == []


@pytest.mark.parametrize("code", sorted(LAWS))
def test_every_law_is_tried(code: str) -> None:
    assert code in {tried for tried, _, _ in BROKEN}


@pytest.mark.parametrize(
    ("line", "before", "home"),
    [
        ("session.commit()", "", "app/database.py"),
        ("select(Job)", "from sqlalchemy import select", "app/jobs/repository.py"),
        ("os.environ", "import os", "app/settings.py"),
        ("datetime.now(UTC)", "from datetime import UTC, datetime", "app/kit/clock.py"),
        ("celery.send_task('wake')", "", "app/doorbell.py"),
        ("print(1)", "", "workers/ml/__main__.py"),
        ("print(1)", "", "workers/ml/apothecary/__main__.py"),
        ("import_module(name)", "from importlib import import_module", "workers/ml/recovery/run.py"),
        ("def f(): from app.main import create_app", "", "app/cli.py"),
    ],
)
def test_a_word_may_be_said_in_its_own_room(line: str, before: str, home: str) -> None:
    source = f"{before}\n{line}\n"
    assert lint(source, home) == []
    assert lint(source, "app/jobs/service.py") != []


def test_a_program_may_print_in_main_and_nowhere_else() -> None:
    program = "def main():\n    print(1)\n\ndef work():\n    print(2)\n\nif __name__ == '__main__':\n    main()\n"
    assert [found.line for found in lint(program, "workers/ml/apothecary/build.py")] == [5]
    library = program.split("if __name__", maxsplit=1)[0]
    assert [found.line for found in lint(library, "workers/ml/apothecary/build.py")] == [2, 5]


def test_an_escape_may_stand_on_any_line_of_the_statement() -> None:
    source = "import os\nenvironment = dict(\n    os.environ,  # room: environ children need the caller's PATH\n)\n"
    assert lint(source, "workers/supervisor.py") == []


def test_an_escape_that_excuses_nothing_is_a_finding() -> None:
    [finding] = lint("x = 1  # room: print once there was a print here\n", "app/jobs/service.py")
    assert (finding.line, finding.text) == (1, "`room: print` excuses nothing here")


def test_an_escape_with_an_unknown_code_is_a_finding() -> None:
    findings = lint("print(1)  # room: printing because\n", "app/jobs/service.py")
    assert sorted(found.code for found in findings) == ["escape", "print"]


def test_an_escape_excuses_only_its_own_law() -> None:
    source = "import os\nprint(os.environ)  # room: environ shown to the operator on demand\n"
    assert [found.code for found in lint(source, "app/jobs/service.py")] == ["print"]


def test_the_tree_obeys_the_word_laws() -> None:
    assert [str(found) for found in lint_tree(ROOT, ["app", "workers"])] == []
