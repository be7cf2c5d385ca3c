"""The dependency law holds in the tree, and every one of its contracts would notice being broken."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]

# One violation per contract, each in a file of its own.
PLANTED = {
    1: ("app/domain/planted.py", "from app import outbox"),
    2: ("app/outbox/planted.py", "import torch"),
    3: ("workers/ml/planted.py", "import sqlalchemy"),
    4: ("workers/planted.py", "import fastapi"),
    5: ("app/domain/planted_too.py", "import pydantic"),
    6: ("workers/ml/recovery/methods/noise.py", "from workers.ml.recovery.methods import antidote"),
    7: ("app/jobs/planted.py", "from workers.ml import gate"),
    8: ("workers/ml/evals/judges/planted_a.py", "from workers.ml.evals.judges import planted_b"),
    9: ("workers/agent/planted.py", "import torch"),
}
PLANTED_BESIDE = {"workers/ml/evals/judges/planted_b.py": "from workers.ml.evals.judges import planted_a"}


def run_import_linter(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    return subprocess.run(
        command, cwd=tree, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ".", "COLUMNS": "200"}
    )


@pytest.fixture(scope="module")
def broken_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the product's modules with one violation of each contract planted in it."""
    tree = tmp_path_factory.mktemp("broken")
    shutil.copy(ROOT / "pyproject.toml", tree)
    for package in ("app", "workers"):
        for file in (ROOT / package).rglob("*.py"):
            copy = tree / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    for path, line in [*PLANTED.values(), *PLANTED_BESIDE.items()]:
        file = tree / path
        if not file.parent.exists():  # the parent is a module there: make it a package of the same content
            file.parent.mkdir()
            file.parent.with_suffix(".py").rename(file.parent / "__init__.py")
        file.write_text((file.read_text() if file.exists() else "") + line + "\n")
    return tree


def test_the_tree_keeps_every_contract() -> None:
    done = run_import_linter(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def broken_report(broken_tree: Path) -> str:
    return run_import_linter(broken_tree).stdout


@pytest.mark.parametrize("number", sorted(PLANTED))
def test_a_planted_violation_breaks_its_contract(broken_report: str, number: int) -> None:
    [verdict] = re.findall(rf"^{number}\. .*\b(KEPT|BROKEN)", broken_report, re.MULTILINE)
    assert verdict == "BROKEN"


def test_there_are_the_nine_contracts_of_the_architecture() -> None:
    assert [contract["name"].split(".")[0] for contract in CONTRACTS] == [str(n) for n in range(1, 10)]


def rooms_of(package: str) -> set[str]:
    return {
        f"{package}.{entry.stem}"
        for entry in (ROOT / package).iterdir()
        if (entry.suffix == ".py" or (entry.is_dir() and any(entry.glob("*.py")))) and not entry.stem.startswith("__")
    }


@pytest.mark.parametrize("package", ["app", "workers"])
def test_every_room_has_its_place_in_the_stack(package: str) -> None:
    named = set(re.findall(r"[\w.]+", " ".join(CONTRACTS[0]["layers"])))
    assert rooms_of(package) - named == set(), "a room outside contract 1 may import anything; give it a layer"


def test_every_process_but_the_library_is_kept_from_torch() -> None:
    assert rooms_of("workers") - {"workers.ml"} - set(CONTRACTS[8]["source_modules"]) == set()
