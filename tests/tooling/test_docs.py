"""What the pages point to is there: files, make targets, markers, decisions."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", MAKEFILE, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_make_command_of_a_page_is_a_target(page: Path) -> None:
    commands = re.findall(r"(?:`|^)make ([a-z][a-z0-9-]*)", page.read_text(), re.MULTILINE)
    assert set(commands) - TARGETS == set()


def test_every_target_that_is_documented_is_phony() -> None:
    [phony] = re.findall(r"^\.PHONY: (.*?)\n\n", MAKEFILE.replace("\\\n", ""), re.MULTILINE | re.DOTALL)
    assert TARGETS - set(phony.split()) == set()


def test_decisions_are_numbered_without_gaps_and_name_their_alternatives() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    assert [page.name for page in pages if "## Alternatives considered" not in page.read_text()] == []


def test_the_makefile_starts_only_modules_that_are_there() -> None:
    modules = re.findall(r"\$\(PY\) -m ([a-z_.0-9]+)", MAKEFILE)
    missing = [
        module
        for module in modules
        if module != "pytest"
        and not (ROOT / (module.replace(".", "/") + ".py")).exists()
        and not (ROOT / module.replace(".", "/") / "__main__.py").exists()
    ]
    assert missing == []
