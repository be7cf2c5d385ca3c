"""Nothing in the repository belongs to one machine, one network or one afternoon."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", ".jsonl", ".ini", ".mako", ".sh", ""}

# Spelled in pieces, so that this file is not its own finding.
MACHINE_PATHS = re.compile(
    r"(?<![\w./-])/(?:" + "|".join(("wo" + "rk", "ro" + "ot", "far" + "m", "opt/" + "pypi")) + r")/"
)
REGISTRY_HOSTS = re.compile(
    "|".join(("py" + r"pi\.org", r"python" + r"hosted\.org", r"npm" + r"js\.org", r"debian\." + "org"))
)
CPU_INDEX = "download." + "pytorch.org"
UNFINISHED = re.compile(r"\b(?:TO" + "DO|FIX" + "ME|XX" + r"X|HA" + r"CK)\b|raise NotImplemented" + "Error")


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


FILES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in tracked_files() if path.suffix in TEXT}


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name}:{number}"
        for name, text in FILES.items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_the_search_sees_the_repository() -> None:
    assert len(FILES) > 100
    assert len(lines_with(re.compile(r"^requires-python"))) == 1


def test_no_file_names_a_path_of_one_machine() -> None:
    assert lines_with(MACHINE_PATHS) == []


def test_no_file_names_a_package_registry() -> None:
    assert lines_with(REGISTRY_HOSTS) == []


def test_only_setup_knows_the_public_cpu_index_of_torch() -> None:
    assert {line.split(":")[0] for line in lines_with(re.compile(re.escape(CPU_INDEX)))} == {"scripts/setup.py"}


def test_nothing_is_left_unfinished() -> None:
    assert lines_with(UNFINISHED) == []


def test_no_large_file_is_tracked() -> None:
    # The bundled base model is the one large thing that ships; its own bound is 8 MB.
    assert {str(path): path.stat().st_size for path in tracked_files() if path.stat().st_size > 9_000_000} == {}


@pytest.mark.parametrize("room", ["app", "workers", "demo", "bench", "scripts"])
def test_no_exception_is_swallowed(room: str) -> None:
    swallowed = [
        f"{name}:{node.lineno}"
        for name, text in FILES.items()
        if name.startswith(room + "/") and name.endswith(".py")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ExceptHandler) and all(isinstance(inner, ast.Pass) for inner in node.body)
    ]
    assert swallowed == []


@pytest.mark.parametrize("room", ["app", "workers", "demo", "bench", "scripts", "tests"])
def test_every_module_says_what_it_is(room: str) -> None:
    silent = [
        name
        for name, text in FILES.items()
        if name.startswith(room + "/") and name.endswith(".py") and text.strip()
        if not ast.get_docstring(ast.parse(text))
    ]
    assert silent == []


def test_every_test_asserts_something() -> None:
    empty = []
    for name, text in FILES.items():
        if not (name.startswith("tests/") and name.endswith(".py")):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not _asserts(node):
                empty.append(f"{name}:{node.lineno} {node.name}")
    assert empty == []


def _asserts(test: ast.FunctionDef) -> bool:
    """An assert, pytest.raises or warns, or a call of a helper that says it checks."""
    for node in ast.walk(test):
        if isinstance(node, ast.Assert):
            return True
        called = node.func if isinstance(node, ast.Call) else None
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if re.match(r"assert_|_?assert|raises$|warns$|_?check|_?expect", name):
            return True
    return False
