"""Keep the README's tree equal to the real one: a line per file, in the file's own words.

Knows: which files the repository holds (git's list, or the folder's where there is no git), the first sentence
of each module's docstring, and a short table of words for files that cannot speak for themselves.
Refuses to know: anything else of the README; it writes between two markers.

    python scripts/readme_tree.py            writes
    python scripts/readme_tree.py --check    fails with a diff if the README is behind
"""

from __future__ import annotations

import argparse
import ast
import difflib
import subprocess
import sys
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- tree:begin -->", "<!-- tree:end -->"
WIDTH = 118

Tree: TypeAlias = dict[str, "Tree"]


# Folders shown as one line: their files are data, or say by their names what they are.
CLOSED = {
    ".ci": "what CI runs: the README's test command and `make check`",
    "docs/decisions": "why it is built this way: one page per decision, with the alternatives",
    "migrations/versions": "one file per schema version",
    "workers/ml/apothecary/assets": "the bundled base model, its weights before alignment, and its provider sets",
    "tests/tooling/plans": "recorded answers of pip",
    "tests/tooling/schemas": "the Compose file's JSON schema",
}
WORDS = {
    "CHANGELOG.md": "what changed between versions, and what to migrate",
    "CONTRIBUTING.md": "how to work here",
    "Dockerfile": "two images: gateway without torch, worker with it",
    "LICENSE": "Apache License 2.0",
    "Makefile": "every command; `make` alone lists them",
    "README.md": "this page",
    "SECURITY.md": "what is promised, what is not, how to report",
    "alembic.ini": "where Alembic finds the migrations",
    "constraints.txt": "the exact versions everything is tested with",
    "docker-compose.yml": "the distributed shape: postgres, redis, migrate, gateway, worker, side",
    "docs/LOG.md": "dated experiments, negatives included",
    "docs/benchmarks.md": "measured figures and how to measure them again",
    "docs/openapi.json": "the API's schema, generated from the code",
    "pyproject.toml": "one distribution, its extras, and the settings of every checking tool",
    "migrations/script.py.mako": "template of a new migration",
}
FOLDERS = {
    "app": "THE PRODUCT: HTTP, accounts, files, jobs, safety policy, releases; never imports torch",
    "bench": "measurements behind docs/benchmarks.md",
    "demo": "the product shown on the bundled world",
    "docs": "decisions, log, figures, schema",
    "migrations": "Alembic",
    "scripts": "setup and the machine-checked house rules",
    "tests": "mirrors the tree; `tests/architecture` holds the house rules",
    "workers": "THE PROCESSES that claim work, and the library they drive",
    "workers/ml": "THE LIBRARY: folder in, folder out; knows no product, database, queue or network",
}


def listed_files(root: Path) -> list[str]:
    """Files of the repository, relative, sorted; what git ignores is not part of it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if answer.returncode == 0:
        names = [name for name in answer.stdout.splitlines() if (root / name).is_file()]
    else:
        names = [
            p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts
        ]
    return sorted(names)


def describe(root: Path, name: str) -> str:
    """What one file says of itself, as a phrase without a full stop."""
    if name in WORDS:
        return WORDS[name]
    if not name.endswith(".py"):
        return ""
    docstring = ast.get_docstring(ast.parse((root / name).read_text())) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = paragraph.split(". ")[0].rstrip(".")
    # "Engine and sessions" starts small in a list; "SQL of the work table" and "GSM8K's rows" do not.
    return sentence[:1].lower() + sentence[1:] if sentence[1:2].islower() or sentence[:2] == "A " else sentence


def build(names: list[str]) -> Tree:
    """Nested folders; a closed folder and an empty package marker have no entries of their own."""
    tree: Tree = {}
    for name in names:
        closed = next((folder for folder in CLOSED if name.startswith(folder + "/")), None)
        if name.endswith("__init__.py") or name.startswith("."):
            continue
        here = tree
        for part in (closed or name).split("/")[: None if closed else -1]:
            here = here.setdefault(part + "/", {})
        if not closed:
            here[name.rsplit("/", 1)[-1]] = {}
    return tree


def shorten(line: str) -> str:
    """A line that fits: cut where a clause ends if that leaves most of it, else between two words."""
    if len(line) <= WIDTH:
        return line
    clause = max(line.rfind(mark, 0, WIDTH) for mark in (", ", ": ", "; "))
    return line[:clause] if clause > WIDTH * 0.65 else line[: WIDTH - 1].rsplit(" ", 1)[0] + "…"


def draw(root: Path, tree: Tree, prefix: str = "", path: str = "") -> list[str]:
    """One line per entry, folders after files."""
    lines = []
    entries = sorted(tree, key=lambda entry: (entry.endswith("/"), entry))
    for position, entry in enumerate(entries):
        last = position == len(entries) - 1
        full = path + entry
        folder = full.rstrip("/")
        words = CLOSED.get(folder) or FOLDERS.get(folder, "") if entry.endswith("/") else describe(root, full)
        line = f"{prefix}{'└── ' if last else '├── '}{entry}"
        if words:
            line = f"{line.ljust(38)} {words}"
        lines.append(shorten(line))
        lines += draw(root, tree[entry], prefix + ("    " if last else "│   "), full)
    return lines


def render(root: Path) -> str:
    lines = draw(root, build(listed_files(root)))
    return "\n".join([BEGIN, "```", ".", *lines, "```", END])


def replace_block(text: str, block: str) -> str:
    """`text` with what stands between the markers (markers included) replaced."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"README.md lacks the markers {BEGIN} and {END}")
    return before + block + after


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the README's tree from the files.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is behind")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = replace_block(old, render(ROOT))
    if not check:
        readme.write_text(new)
        return 0
    diff = list(difflib.unified_diff(old.splitlines(), new.splitlines(), "README.md", "the tree", lineterm="", n=1))
    sys.stdout.write("\n".join([*diff, "README tree: " + ("behind; run `make tree`" if diff else "current"), ""]))
    return 1 if diff else 0


if __name__ == "__main__":
    sys.exit(main())
