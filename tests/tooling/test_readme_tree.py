"""The README's tree is written from the files, and says when it is behind."""

from pathlib import Path

from scripts import readme_tree

ROOT = Path(__file__).resolve().parents[2]


def test_a_file_is_described_by_the_first_sentence_of_its_docstring(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('"""Counts sheep, one\nby one. And goats.\n\nKnows: fences.\n"""\n')
    (tmp_path / "b.py").write_text('"""SQL of the work table."""\n')
    (tmp_path / "c.py").write_text('"""A stand-in for sheep."""\n')
    assert readme_tree.describe(tmp_path, "a.py") == "counts sheep, one by one"
    assert readme_tree.describe(tmp_path, "b.py") == "SQL of the work table"
    assert readme_tree.describe(tmp_path, "c.py") == "a stand-in for sheep"


def test_every_file_is_drawn_once_and_closed_folders_are_one_line(tmp_path: Path) -> None:
    names = ["app/__init__.py", "app/jobs/service.py", "docs/decisions/0001-a.md", "docs/decisions/0002-b.md"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    drawn = "\n".join(readme_tree.draw(tmp_path, readme_tree.build(names)))
    assert [drawn.count(word) for word in ("app/", "jobs/", "service.py", "decisions/", "0001", "__init__")] == [
        1, 1, 1, 1, 0, 0,
    ]  # fmt: skip


def test_a_long_line_is_cut_where_a_clause_ends() -> None:
    line = "x" * 100 + ", and then something that does not fit on the line any more"
    assert readme_tree.shorten(line) == "x" * 100
    assert readme_tree.shorten("word " * 40).endswith("word…")
    assert len(readme_tree.shorten("word " * 40)) <= readme_tree.WIDTH


def test_only_the_block_between_the_markers_is_replaced() -> None:
    text = f"before\n{readme_tree.BEGIN}\nold\n{readme_tree.END}\nafter\n"
    assert readme_tree.replace_block(text, "new") == "before\nnew\nafter\n"


def test_the_readme_shows_the_tree_that_is() -> None:
    text = (ROOT / "README.md").read_text()
    assert readme_tree.replace_block(text, readme_tree.render(ROOT)) == text, "run `make tree`"
