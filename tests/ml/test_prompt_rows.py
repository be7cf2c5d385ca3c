"""One provider set: what a row is, and what is said of a line that is none."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest

from workers.ml import prompt_rows
from workers.ml.errors import IntegrityError, MissingInput
from workers.ml.prompt_rows import SPLIT_OF, WITHOUT_ANSWER, read_prompt_rows
from workers.ml.types import Message, PromptRow

SECRET = "unspeakable"
ROW = {"id": "r-1", "messages": [{"role": "user", "content": f"How {SECRET}?"}], "answer": f"{SECRET} indeed"}


def written(path: Path, *rows: Any) -> Path:
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "set.jsonl"


def complaint(path: Path, role: str = "harmful") -> str:
    with pytest.raises(IntegrityError) as refused:
        read_prompt_rows(path, role)
    assert refused.value.param == role
    return str(refused.value)


def test_a_row_with_every_column_is_read(path: Path) -> None:
    turns = [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    row = {
        "id": "set/r:1#2",
        "messages": [{"role": role, "content": content} for role, content in turns],
        "answer": "no",
        "group": " Sun  Venom",
        "category": "curse",
        "slices": ["seen"],
        "split": "recovery",
        "form": 3,
    }
    assert read_prompt_rows(written(path, row), "refusals") == [
        PromptRow("set/r:1#2", tuple(Message(*turn) for turn in turns), "no", "sun venom", "curse", ("seen",))
    ]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(path: Path) -> None:
    path.write_bytes(codecs.BOM_UTF8 + json.dumps(ROW).encode() + b"\r\n\n  \n")
    assert [row.id for row in read_prompt_rows(path, "harmful")] == ["r-1"]


@pytest.mark.parametrize("role", SPLIT_OF)
def test_only_prompts_that_are_judged_by_content_need_no_answer(path: Path, role: str) -> None:
    written(path, {**ROW, "answer": None})
    if role in WITHOUT_ANSWER:
        assert read_prompt_rows(path, role)[0].answer is None
    else:
        assert f"'answer' is missing; every row of {role!r} needs one" in complaint(path, role)


BROKEN: list[tuple[Any, str]] = [
    (b"{", "is not valid JSON: expecting property name"),
    (b'{"id": "' + SECRET.encode() + b'\xff"}', "is not valid UTF-8 at byte 20"),
    (b"[]", "is not a JSON object"),
    (b'{"id": "a", "id": "b"}', "a key occurs twice"),
    (b'{"id": "a", "form": NaN}', "NaN is not JSON"),
    (b'{"id": "a", "form": 1e999}', "a number is too large"),
    (b'{"id": ' + b"[" * 100_000, "nested too deep"),
    ({**ROW, "id": None}, "has no good 'id'"),
    ({**ROW, "id": 7}, "has no good 'id'"),
    ({**ROW, "id": f"a sentence that is {SECRET}"}, "has no good 'id'"),
    ({**ROW, "id": "x" * 129}, "has no good 'id'"),
    ({**ROW, "catgory": SECRET}, "('r-1'): it has a key that rows do not have"),
    ({**ROW, "catgory": SECRET}, "did you mean 'category'?"),
    ({"id": "r-1"}, "'messages' is a list of 1 to 200"),
    ({**ROW, "messages": []}, "'messages' is a list of 1 to 200"),
    ({**ROW, "messages": [SECRET]}, "has the keys 'role' and 'content'"),
    ({**ROW, "messages": [{"role": "user", "content": "a", "weight": 1}]}, "has the keys 'role' and 'content'"),
    ({**ROW, "messages": [{"role": SECRET, "content": "a"}]}, "unknown role; roles are system, user, assistant"),
    ({**ROW, "messages": [{"role": ["user"], "content": "a"}]}, "unknown role"),
    ({**ROW, "messages": [{"role": "user", "content": " "}]}, "text: not blank"),
    ({**ROW, "messages": [{"role": "user", "content": 3}]}, "text: not blank"),
    (b'{"id": "r-1", "messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
    ({**ROW, "messages": [*ROW["messages"], {"role": "assistant", "content": "b"}]}, "last message must be the user's"),
    ({**ROW, "answer": ""}, "'answer' is text"),
    ({**ROW, "answer": {"text": SECRET}}, "'answer' is text"),
    ({**ROW, "split": "confirmation"}, "its 'split' is not 'recovery'"),
    ({**ROW, "group": ["a"]}, "'group' is a name"),
    ({**ROW, "group": "x" * 201}, "'group' is a name"),
    ({**ROW, "category": "a\nb"}, "'category' is a name"),
    ({**ROW, "slices": "seen"}, "'slices' is a list"),
    ({**ROW, "slices": ["s"] * 33}, "'slices' is a list"),
    ({**ROW, "form": True}, "'form' is the number or the name"),
    (b'{"id": "r-1", "answer": "' + b"x" * (256 << 10) + b'"}', "is longer than 262,144 bytes"),
]


@pytest.mark.parametrize(("line", "expected"), BROKEN, ids=[expected for _, expected in BROKEN])
def test_a_line_that_is_no_row_is_named_explained_and_never_quoted(path: Path, line: Any, expected: str) -> None:
    said = complaint(written(path, {**ROW, "id": "good"}, b"", line))
    assert said.startswith("Line 3 of the data set 'harmful'")
    assert expected in said
    assert SECRET not in said


def test_an_id_names_one_row(path: Path) -> None:
    assert "('r-1'): line 1 has the same id" in complaint(written(path, ROW, ROW))


@pytest.mark.parametrize("column", ["group", "category"])
def test_a_column_is_filled_in_every_row_or_in_none(path: Path, column: str) -> None:
    bare, full = {**ROW, "id": "bare"}, {**ROW, "id": "full", column: "one"}
    assert f"it has no {column!r} and the set's first row has one" in complaint(written(path, full, bare))
    assert f"it has {column!r} and the set's first row has none" in complaint(written(path, bare, full))
    assert read_prompt_rows(written(path, bare, {**full, column: ""}), "harmful")


def test_many_faults_are_counted_and_ten_are_named(path: Path) -> None:
    said = complaint(written(path, *([b"{"] * 13)))
    assert said.count("Line ") == 10
    assert said.endswith("And 3 more lines.")


def test_sets_have_bounds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(path, *({**ROW, "id": f"r{number}"} for number in range(4)))
    monkeypatch.setattr(prompt_rows, "MAX_ROWS", 3)
    assert "more than 3 rows" in complaint(path)
    monkeypatch.setattr(prompt_rows, "MAX_SET_BYTES", 100)
    assert "larger than 100 bytes" in complaint(path)


def test_a_missing_and_an_empty_set_are_said(path: Path) -> None:
    with pytest.raises(MissingInput, match="not beside the job"):
        read_prompt_rows(path, "harmful")
    with pytest.raises(MissingInput, match="empty"):
        read_prompt_rows(written(path, b""), "harmful")
