"""Size budgets: what has to fit on a reader's screen (architecture, section 8).

Knows: lines of files and functions, numbers of parameters, and the named exceptions with their reasons.
Refuses to know: whether the code is any good; it only says where a reader would get lost.

A file may have 400 lines and a function 40 without a word; up to 600 and 60 it needs an entry below, and only
the entries marked `beyond` may pass that. An entry that is no longer needed is a finding.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("app", "workers", "demo", "bench", "scripts", "migrations", "tests")

FILE_LINES, FILE_LINES_HARD = 400, 600
FUNCTION_LINES, FUNCTION_LINES_HARD = 40, 60
PARAMETERS = 6


@dataclass(frozen=True)
class Allowance:
    """`limit` lines (or parameters) for one place, and why."""

    limit: int
    reason: str
    beyond: bool = False


# Path, or path::qualified.name, or path::qualified.name() for its number of parameters.
EXCEPTIONS: dict[str, Allowance] = {
    "app/outbox.py::record()": Allowance(8, "one row's columns, keyword-only after the session and the kind", True),
    "workers/ml/tuning/fused_lora.py::_FusedLora.forward()": Allowance(
        7, "autograd hands over tensors one by one", True
    ),
    "workers/ml/tuning/loop.py::train()": Allowance(7, "what is trained, on what, how, and who listens", True),
    "app/commands/base_models.py::add()": Allowance(10, "Typer makes one option of each parameter", beyond=True),
    "app/commands/jobs.py::create()": Allowance(11, "Typer makes one option of each parameter", beyond=True),
}

# Lists of fields have an order but no natural length.
LENGTH_FREE = ("schemas.py", "specs.py")
LENGTH_FREE_FOLDERS = ("app/tables/", "migrations/versions/")


@dataclass(frozen=True, order=True)
class Measure:
    """One measured place: its key in EXCEPTIONS, the kind of budget, its size and the budget."""

    key: str
    kind: str
    size: int
    budget: int
    hard: int


def measure_file(path: str, source: str) -> Iterator[Measure]:
    """Every budgeted size of one file."""
    free = path.endswith(LENGTH_FREE) or path.startswith(LENGTH_FREE_FOLDERS)
    if not free:
        yield Measure(path, "lines", source.count("\n"), FILE_LINES, FILE_LINES_HARD)
    for name, node in _functions(ast.parse(source), ""):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1 - _docstring_lines(node)
        # A migration's upgrade() lists what one version adds; its length is the schema's.
        if not path.startswith("migrations/"):
            # A test tells one story; it may take the hard limit to tell it.
            budget = FUNCTION_LINES_HARD if path.startswith("tests/") else FUNCTION_LINES
            yield Measure(f"{path}::{name}", "lines", lines, budget, FUNCTION_LINES_HARD)
        if not path.startswith("tests/"):
            yield Measure(f"{path}::{name}()", "parameters", _parameters(node), PARAMETERS, PARAMETERS)


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, child
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        else:
            yield from _functions(child, prefix)


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is None:
        return 0
    return (first.end_lineno or first.lineno) - first.lineno + 1


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([a for a in arguments if a.arg not in {"self", "cls"}])


def judge(measures: list[Measure], exceptions: dict[str, Allowance]) -> list[str]:
    """Sentences about every place over its budget, and about exceptions that are too wide or not needed."""
    sentences = []
    over = {m.key: m for m in measures if m.size > m.budget}
    for key, m in sorted(over.items()):
        exception = exceptions.get(key)
        if exception is None:
            sentences.append(f"{key}: {m.size} {m.kind}, the budget is {m.budget}")
        elif m.size > exception.limit:
            sentences.append(f"{key}: {m.size} {m.kind}, its exception allows {exception.limit}")
        elif m.size > m.hard and not exception.beyond:
            sentences.append(f"{key}: {m.size} {m.kind}, the hard limit is {m.hard}")
    sentences += [f"{key}: named as an exception and needs none" for key in sorted(set(exceptions) - set(over))]
    sentences += [f"{key}: an exception needs a reason" for key, e in sorted(exceptions.items()) if not e.reason]
    return sentences


def measure_tree(root: Path) -> list[Measure]:
    files = [file for folder in FOLDERS for file in sorted((root / folder).rglob("*.py"))]
    return [m for file in files for m in measure_file(file.relative_to(root).as_posix(), file.read_text())]


def main() -> int:
    sentences = judge(measure_tree(ROOT), EXCEPTIONS)
    for sentence in sentences:
        sys.stdout.write(f"{sentence}\n")
    sys.stdout.write(f"size budgets: {len(sentences)} finding(s)\n")
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
