"""Word laws: some words may be said in one room only (architecture, section 6).

Knows: the syntax tree of one file and the room it stands in.
Refuses to know: types, other files, style. Where a law has to be broken, the line says so and why:

    os.environ["PATH"]  # room: environ the child inherits the caller's search path

An escape without a reason, with an unknown code, or that excuses nothing is a finding itself, so that the
list of exceptions stays true.

    python scripts/room_linter.py app workers
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

FIRST_PARTY = {"app", "workers", "migrations"}
SQL_VERBS = {"select", "insert", "update", "delete"}
ESCAPE = re.compile(r"#\s*room:\s*(?P<code>[\w-]*)\s*(?P<reason>.*)")


@dataclass(frozen=True)
class Law:
    """`rooms`: patterns (of pathlib's `full_match` kind, ** included) of the files that may say the word."""

    code: str
    rooms: tuple[str, ...]
    story: str

    def allows(self, path: str) -> bool:
        return any(_matches(path, room) for room in self.rooms)


LAWS = {
    law.code: law
    for law in (
        Law("commit", ("app/database.py",), "a commit in the middle of a unit of work publishes half of it"),
        Law("query", ("**/repository.py", "migrations/**"), "SQL outside a repository cannot be found or reused"),
        Law("environ", ("app/settings.py",), "a setting read elsewhere is in no table and cannot be passed in a test"),
        Law("clock", ("app/kit/clock.py",), "time read directly cannot be frozen, and naive times mix with aware ones"),
        Law("doorbell", ("app/doorbell.py",), "a message sent before the commit can arrive before the row it is about"),
        Law(
            "http-exception",
            ("app/main.py",),
            "a service that raises HTTP errors cannot serve a worker; raise a ServiceError",
        ),
        Law("print", ("**/__main__.py", "app/cli.py", "app/cli/**"), "a child's stdout is its protocol; log instead"),
        Law("status", (), "a status written by hand skips the transition table, the lease and the outbox"),
        Law("import-module", ("workers/ml/recovery/run.py", "workers/ml/evals/**"), "strings that import hide arrows"),
        Law("lazy-import", ("app/cli.py", "app/cli/**"), "an import inside a function hides an arrow and its cost"),
    )
}


@dataclass(frozen=True, order=True)
class Finding:
    path: str
    line: int
    code: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.code}: {self.text}"


@dataclass(frozen=True)
class Said:
    """A word of some law, on the lines `first` to `last`."""

    code: str
    first: int
    last: int
    what: str
    function: str = ""


class Listener(ast.NodeVisitor):
    """Collects the words of every law; where they stand is judged later."""

    def __init__(self) -> None:
        self.said: list[Said] = []
        self.functions: list[str] = []
        self.sql_names: set[str] = set()
        self.sql_modules: set[str] = set()
        self.aliases: dict[str, str] = {}

    def hear(self, code: str, node: ast.stmt | ast.expr, what: str) -> None:
        self.said.append(Said(code, node.lineno, node.end_lineno or node.lineno, what, *self.functions[-1:]))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            name = alias.asname or alias.name.split(".")[0]
            if alias.name.split(".")[0] == "sqlalchemy":
                self.sql_modules.add(name)
            self.aliases[name] = alias.name if alias.asname else name
            self._hear_lazy(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = "." * node.level + (node.module or "")
        for alias in node.names:
            name = alias.asname or alias.name
            self.aliases[name] = f"{module}.{alias.name}"
            if module.split(".")[0] == "sqlalchemy" and alias.name in SQL_VERBS:
                self.sql_names.add(name)
            if alias.name == "HTTPException":
                self.hear("http-exception", node, f"imports HTTPException from {module}")
            if f"{module}.{alias.name}" in {"os.environ", "os.getenv"}:
                self.hear("environ", node, f"imports {module}.{alias.name}")
        self._hear_lazy(node, module)

    def _hear_lazy(self, node: ast.stmt, module: str) -> None:
        if self.functions and (module.startswith(".") or module.split(".", maxsplit=1)[0] in FIRST_PARTY):
            self.hear("lazy-import", node, f"imports {module} inside a function")

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.functions.append(node.name)
        self.generic_visit(node)
        self.functions.pop()

    visit_FunctionDef = _visit_function  # noqa: N815 the name is ast's
    visit_AsyncFunctionDef = _visit_function  # noqa: N815

    def visit_Call(self, node: ast.Call) -> None:
        match node.func:
            case ast.Name(id=name):
                self._hear_name_called(node, name)
            case ast.Attribute(value=owner, attr=name):
                self._hear_method_called(node, owner, name)
        self.generic_visit(node)

    def _hear_name_called(self, node: ast.Call, name: str) -> None:
        if name == "print":
            self.hear("print", node, "print()")
        elif name in self.sql_names:
            self.hear("query", node, f"{name}()")
        elif name == "setattr" and len(node.args) > 1 and _constant(node.args[1]) == "status":
            self.hear("status", node, "setattr(…, 'status', …)")
        elif name == "__import__" or self.aliases.get(name) == "importlib.import_module":
            self.hear("import-module", node, f"{name}()")

    def _hear_method_called(self, node: ast.Call, owner: ast.expr, name: str) -> None:
        owner_name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
        if name == "commit":
            self.hear("commit", node, f"{owner_name}.commit()")
        elif name in SQL_VERBS and owner_name in self.sql_modules:
            self.hear("query", node, f"{owner_name}.{name}()")
        elif name == "query" and owner_name.endswith("session"):
            self.hear("query", node, f"{owner_name}.query()")
        elif name in {"now", "utcnow", "today"} and owner_name in {"datetime", "date"}:
            self.hear("clock", node, f"{owner_name}.{name}()")
        elif name in {"send_task", "apply_async"}:
            self.hear("doorbell", node, f"{owner_name}.{name}()")
        elif name == "import_module":
            self.hear("import-module", node, "import_module()")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        of_os = isinstance(node.value, ast.Name) and self.aliases.get(node.value.id) == "os"
        if of_os and node.attr in {"environ", "getenv", "putenv"}:
            self.hear("environ", node, f"os.{node.attr}")
        if node.attr == "HTTPException":
            self.hear("http-exception", node, "HTTPException")
        if node.attr == "status" and isinstance(node.ctx, ast.Store):
            self.hear("status", node, f"{ast.unparse(node)} = …")
        self.generic_visit(node)


def _constant(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def _matches(path: str, pattern: str) -> bool:
    """Path.full_match of Python 3.13, for the two wildcards used here."""
    parts = re.split(r"(\*\*/|\*\*|\*)", pattern)
    kinds = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*"}
    return re.fullmatch("".join(kinds.get(part, re.escape(part)) for part in parts), path) is not None


def _comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def lint(source: str, path: str) -> list[Finding]:
    """Every broken law of one file. `path` is relative to the repository, with forward slashes."""
    listener, tree = Listener(), ast.parse(source)
    listener.visit(tree)
    program = any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree.body)
    escapes = {line: m for line, text in _comments(source) if (m := ESCAPE.search(text))}
    findings, used = [], set()
    for said in listener.said:
        law = LAWS[said.code]
        if law.allows(path) or (program and said.code == "print" and _shows(said.function)):
            continue
        excuse = next(
            (n for n in range(said.first, said.last + 1) if n in escapes and escapes[n]["code"] == said.code), None
        )
        if excuse is None:
            where = f"belongs in {', '.join(law.rooms)}" if law.rooms else "belongs nowhere"
            findings.append(Finding(path, said.first, said.code, f"{said.what} {where}: {law.story}"))
        else:
            used.add(excuse)
    return sorted(findings + _judge_escapes(escapes, used, path))


def _shows(function: str) -> bool:
    """In a module that is started as a program, `main` and what it names `_print…` speak to a person."""
    return function == "main" or function.startswith("_print")


def _judge_escapes(escapes: dict[int, re.Match[str]], used: set[int], path: str) -> list[Finding]:
    findings = []
    for line, escape in escapes.items():
        code = escape["code"]
        if code not in LAWS:
            findings.append(Finding(path, line, "escape", f"unknown code {code!r}; known: {', '.join(LAWS)}"))
        elif not escape["reason"].strip():
            findings.append(Finding(path, line, "escape", f"`room: {code}` needs a reason"))
        elif line not in used:
            findings.append(Finding(path, line, "escape", f"`room: {code}` excuses nothing here"))
    return findings


def lint_tree(root: Path, folders: list[str]) -> list[Finding]:
    files = sorted(file for folder in folders for file in (root / folder).rglob("*.py"))
    return [found for file in files for found in lint(file.read_text(), file.relative_to(root).as_posix())]


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the word laws of architecture section 6.")
    parser.add_argument("folders", nargs="*", default=["app", "workers"])
    findings = lint_tree(Path(__file__).resolve().parent.parent, parser.parse_args().folders)
    for found in findings:
        sys.stdout.write(f"{found}\n")
    sys.stdout.write(f"room linter: {len(findings)} finding(s)\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
