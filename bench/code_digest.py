"""What code a measured figure depends on: a digest over a module and everything of ours that it imports.

Knows: imports, read from the source without running it; that comments, docstrings and layout change no figure.
Refuses to know: what is measured.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from workers import ml

ROOT = Path(ml.__file__).parent.parent.parent
OURS = ("workers.ml.", "bench.")
# Specs are data of a figure's own key, and pictures and reports show figures that exist.
LEFT_OUT = frozenset({"workers.ml.recovery.specs", "workers.ml.types", "workers.ml.errors"})


def code_digest(modules: Iterable[str]) -> str:
    """sha256 over the code of these modules and of all they import from the library, directly or not, and over the
    versions of what computes."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in found and name not in LEFT_OUT:
            found.add(name)
            waiting += _imports(name)
    parts = [f"{name}:{_code(name)}" for name in sorted(found)]
    parts += [f"{name}=={metadata.version(name)}" for name in ("torch", "transformers", "peft")]
    return sha256("\n".join(parts).encode()).hexdigest()


def _path(name: str) -> Path:
    return ROOT.joinpath(*name.split(".")).with_suffix(".py")


@cache
def _tree(name: str) -> ast.Module:
    return ast.parse(_path(name).read_text(encoding="utf-8"))


@cache
def _imports(name: str) -> tuple[str, ...]:
    return tuple(sorted({module for node in ast.walk(_tree(name)) for module in _named(node)}))


def _named(node: ast.AST) -> Iterator[str]:
    names = []
    if isinstance(node, ast.ImportFrom) and node.module:
        names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    return (name for name in names if name.startswith(OURS) and _path(name).is_file())


@cache
def _code(name: str) -> str:
    tree = ast.parse(ast.unparse(_tree(name)))  # drops comments and layout
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return sha256(ast.dump(tree).encode()).hexdigest()
