"""Every rule of a dataset: broken once, found at its line, told without repeating a row's content."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.files.rows import check_row, count_messages_of_plain_row, parse_line
from app.files.rules import RULES, SAMPLES_PER_REPORT, SAMPLES_PER_RULE
from app.files.validation import failure_report, main, validate
from workers.ml.data import read_rows

CANARY = "CANARY-7731"
GOOD = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
PAIR = b'{"prompt": "q", "completion": "a"}'
Validate = Callable[[bytes], dict[str, Any]]


@pytest.fixture
def check(tmp_path: Path) -> Validate:
    def run(content: bytes) -> dict[str, Any]:
        path = tmp_path / "data.jsonl"
        path.write_bytes(content)
        return validate(path)

    return run


def chat(*messages: Any) -> bytes:
    return json.dumps({"messages": list(messages)}).encode()


USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}

BROKEN_ROWS = [
    ("invalid_utf8", b'{"messages": "\xff"}', ""),
    ("invalid_utf8", '{"messages": []}'.encode("utf-16"), ""),
    ("misplaced_bom", b"\xef\xbb\xbf" + GOOD, ""),
    ("invalid_json", b"{'messages': []}", ""),
    ("invalid_json", GOOD[:-1], ""),
    ("invalid_json", b'{"messages": [\x00]}', ""),
    ("invalid_json", GOOD + GOOD, ""),
    ("not_an_object", b"[1, 2]", ""),
    ("not_an_object", b'"text"', ""),
    ("not_an_object", b"null", ""),
    ("duplicate_key", b'{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}', ""),
    ("duplicate_key", b'{"messages": [], "messages": []}', ""),
    ("not_finite", b'{"messages": [{"role": "assistant", "content": "a", "weight": NaN}]}', ""),
    ("not_finite", b'{"messages": [{"role": "assistant", "content": "a", "weight": -Infinity}]}', ""),
    ("not_finite", b'{"messages": [{"role": "assistant", "content": "a", "weight": 1e999}]}', ""),
    ("lone_surrogate", b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "/messages/0/content"),
    ("nul_character", b'{"messages": [{"role": "assistant", "content": "a\\u0000b"}]}', "/messages/0/content"),
    ("nested_too_deep", b'{"messages": ' + b"[" * 40 + b"]" * 40 + b"}", "/messages" + "/0" * 16),
    ("nested_too_deep", b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ""),
    ("unknown_format", b'{"text": "hello"}', ""),
    ("unknown_format", b'{"prompt": "only"}', ""),
    ("unknown_format", b"{}", ""),
    ("mixed_formats", PAIR, ""),
    ("unknown_key", json.dumps({"messages": [USER, ANSWER], "mood": 1}).encode(), ""),
    ("unknown_key", chat(USER, {**ANSWER, "name": "bot"}), "/messages/1"),
    ("tools_not_supported", json.dumps({"messages": [USER, ANSWER], "tools": []}).encode(), ""),
    ("tools_not_supported", chat(USER, {**ANSWER, "tool_calls": []}), "/messages/1"),
    ("messages_not_a_list", b'{"messages": {"role": "user"}}', "/messages"),
    ("no_messages", b'{"messages": []}', "/messages"),
    ("too_many_messages", chat(*[ANSWER] * 2001), "/messages"),
    ("message_not_an_object", chat("hello", ANSWER), "/messages/0"),
    ("missing_role", chat({"content": "q"}, ANSWER), "/messages/0"),
    ("unknown_role", chat({"role": "narrator", "content": "q"}, ANSWER), "/messages/0/role"),
    ("unknown_role", chat({"role": 7, "content": "q"}, ANSWER), "/messages/0/role"),
    ("unknown_role", chat({"role": ["user"], "content": "q"}, ANSWER), "/messages/0/role"),
    ("missing_content", chat({"role": "user"}, ANSWER), "/messages/0"),
    ("content_not_text", chat({"role": "user", "content": None}, ANSWER), "/messages/0/content"),
    ("content_not_text", chat({"role": "user", "content": [{"type": "text"}]}, ANSWER), "/messages/0/content"),
    ("content_not_text", b'{"prompt": 3, "completion": "a"}', "/prompt"),
    ("invalid_weight", chat(USER, {**ANSWER, "weight": 0.5}), "/messages/1/weight"),
    ("invalid_weight", chat(USER, {**ANSWER, "weight": True}), "/messages/1/weight"),
    ("invalid_weight", chat(USER, {**ANSWER, "weight": "1"}), "/messages/1/weight"),
    ("invalid_weight", chat(USER, {**ANSWER, "weight": 2**64}), "/messages/1/weight"),
    ("weight_not_on_assistant", chat({**USER, "weight": 0}, ANSWER), "/messages/0/weight"),
    ("missing_assistant_message", chat(USER), "/messages"),
    ("nothing_to_learn", chat(USER, {**ANSWER, "weight": 0}), "/messages"),
    ("nothing_to_learn", chat(USER, {"role": "assistant", "content": ""}), "/messages"),
    ("nothing_to_learn", b'{"prompt": "q", "completion": ""}', "/completion"),
]


@pytest.mark.parametrize(("rule", "row", "pointer"), BROKEN_ROWS)
def test_a_broken_row_is_found_at_its_line(check: Validate, rule: str, row: bytes, pointer: str) -> None:
    report = check(b"\n".join([GOOD] * 5 + [row] + [GOOD] * 9))
    assert report["verdict"] == "reject"
    found = {broken["id"]: broken for broken in report["rules"]}
    assert rule in found
    sample = found[rule]["samples"][0]
    assert (sample["line"], sample["byte_offset"]) == (6, 5 * (len(GOOD) + 1))
    assert sample["pointer"] == pointer
    assert sample["expected"] == RULES[rule].expected
    assert sample["expected"] in sample["detail"]


def test_every_rule_has_a_test() -> None:
    tested = {rule for rule, _, _ in BROKEN_ROWS}
    elsewhere = {"empty_file", "too_few_rows", "too_many_rows", "line_too_long", "blank_line", "empty_prompt"}
    assert tested | elsewhere == set(RULES)


GOOD_ROWS = [
    GOOD,
    PAIR,
    b"  " + GOOD + b"\r",
    chat({"role": "system", "content": "s"}, USER, ANSWER),
    chat(USER, ANSWER, USER, ANSWER),
    chat(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}),
    chat(USER, {**ANSWER, "weight": 1.0}),
    '{"messages": [{"role": "user", "content": "snow \u2028 man ☃ \U0001f600"}, '
    '{"role": "assistant", "content": "ok"}]}'.encode(),
    b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00 \\u00e9"}, {"role": "assistant", "content": "a"}]}',
    b'{"messages": [{"role": "user", "content": "say \\"role\\": \\\\u0000"}, {"role":"assistant","content":"a"}]}',
]


@pytest.mark.parametrize("row", GOOD_ROWS)
def test_a_good_row_is_accepted(check: Validate, row: bytes) -> None:
    report = check(b"\n".join([row] * 10))
    assert (report["verdict"], report["rules"], report["rows"]) == ("accept", [], 10)


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_what_the_validator_accepts_the_trainer_reads(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(start + b"\r\n".join([row.strip() for row in GOOD_ROWS if row is not PAIR] * 2) + b"\n\n")
    report = validate(path)
    assert report["verdict"] == "accept"
    assert len(read_rows(path)) == report["rows"]


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_and_both_line_ends_are_accepted(check: Validate, ending: bytes, start: bytes) -> None:
    report = check(start + ending.join([GOOD] * 10) + ending)
    assert (report["verdict"], report["rows"], report["format"]) == ("accept", 10, "chat")


@pytest.mark.parametrize("content", [b"", b"\n\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused_as_such(check: Validate, content: bytes) -> None:
    report = check(content)
    assert report["verdict"] == "reject"
    assert "empty_file" in [rule["id"] for rule in report["rules"]]


def test_nine_rows_are_too_few_and_ten_are_enough(check: Validate) -> None:
    assert [rule["id"] for rule in check(b"\n".join([GOOD] * 9))["rules"]] == ["too_few_rows"]
    assert check(b"\n".join([GOOD] * 10))["verdict"] == "accept"


def test_blank_lines_and_empty_prompts_are_warned_of_and_accepted(check: Validate) -> None:
    blank = check(b"\n".join([GOOD] * 5 + [b" "] + [GOOD] * 5))
    assert (blank["verdict"], [rule["id"] for rule in blank["rules"]]) == ("accept", ["blank_line"])
    assert blank["rules"][0]["severity"] == "warning"
    empty = check(b"\n".join([PAIR] * 9 + [b'{"prompt": "", "completion": "a"}']))
    assert (empty["verdict"], [rule["id"] for rule in empty["rules"]]) == ("accept", ["empty_prompt"])


def test_a_line_of_exactly_one_mebibyte_passes_and_one_byte_more_does_not(check: Validate) -> None:
    filler = (1 << 20) - len(chat({"role": "user", "content": ""}, ANSWER))
    full = chat({"role": "user", "content": "x" * filler}, ANSWER)
    assert len(full) == 1 << 20
    assert check(b"\n".join([full] + [GOOD] * 9))["verdict"] == "accept"
    longer = chat({"role": "user", "content": "x" * (filler + 1)}, ANSWER)
    report = check(b"\n".join([GOOD, longer] + [GOOD] * 9))
    assert [rule["id"] for rule in report["rules"]] == ["line_too_long"]
    assert report["rules"][0]["samples"][0]["line"] == 2
    assert report["rows"] == 11


def test_lines_after_a_long_one_keep_their_numbers_and_offsets(check: Validate) -> None:
    report = check(b"x" * (3 << 20) + b"\n" + GOOD + b"\nbad\n" + b"\n".join([GOOD] * 9))
    by_rule = {rule["id"]: rule["samples"][0] for rule in report["rules"]}
    assert by_rule["line_too_long"]["line"] == 1
    assert by_rule["invalid_json"]["line"] == 3
    assert by_rule["invalid_json"]["byte_offset"] == (3 << 20) + 1 + len(GOOD) + 1


def test_a_line_of_a_gigabyte_is_refused_without_being_read_into_memory(tmp_path: Path) -> None:
    path, target = tmp_path / "huge.jsonl", tmp_path / "report.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 30)  # a sparse gigabyte without a line end
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20));"
        "from app.files.validation import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", limited, path, target], capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(target.read_text())
    assert report["rules"][0]["id"] == "line_too_long"
    assert report["rules"][0]["samples"][0]["found"] == f"{1 << 30} bytes"


def test_every_bad_row_is_counted_and_the_first_hundred_are_located(check: Validate) -> None:
    report = check(b"\n".join([b"bad"] * 250 + [GOOD] * 10))
    (rule,) = report["rules"]
    assert (rule["id"], rule["count"]) == ("invalid_json", 250)
    assert [sample["line"] for sample in rule["samples"]] == list(range(1, SAMPLES_PER_RULE + 1))


def test_a_report_has_room_for_the_first_place_of_every_rule_and_not_for_all_places(check: Validate) -> None:
    rows = {rule: row for rule, row, _ in BROKEN_ROWS if rule != "mixed_formats"}
    report = check(b"\n".join(row for row in rows.values() for _ in range(SAMPLES_PER_RULE)))
    samples = [sample for rule in report["rules"] for sample in rule["samples"]]
    assert len(report["rules"]) >= len(rows) - 1
    assert all(rule["samples"] and rule["count"] >= SAMPLES_PER_RULE for rule in report["rules"])
    assert SAMPLES_PER_REPORT <= len(samples) <= SAMPLES_PER_REPORT + len(RULES)


def test_of_a_file_with_too_many_rows_every_byte_is_digested(check: Validate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is compared with the upload's: one of half the file would look like other bytes."""
    monkeypatch.setattr("app.files.validation.MAX_ROWS", 20)
    content = b"\n".join([GOOD] * 40_000)
    assert len(content) > 3 << 20
    report = check(content)
    assert [rule["id"] for rule in report["rules"]] == ["too_many_rows"]
    assert report["rules"][0]["samples"][0]["line"] == 21
    assert (report["bytes"], report["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(("rule", "row", "_pointer"), BROKEN_ROWS)
def test_a_report_never_repeats_a_row(check: Validate, rule: str, row: bytes, _pointer: str) -> None:
    marked = row.replace(b'"q"', f'"{CANARY}"'.encode()).replace(b'"a"', f'"{CANARY}"'.encode())
    marked = (
        marked.replace(b"narrator", CANARY.encode()).replace(b"mood", CANARY.encode()).replace(b"text", CANARY.encode())
    )
    assert CANARY not in json.dumps(check(b"\n".join([marked] * 10)))


def test_a_misspelt_key_is_named_by_its_right_spelling(check: Validate) -> None:
    row = json.dumps({"mesages": [USER, ANSWER]}).encode()
    (rule, *_) = check(b"\n".join([row] * 10))["rules"]
    assert rule["id"] == "unknown_format"
    assert "'messages' misspelt" in rule["samples"][0]["detail"]
    assert "mesages" not in json.dumps(rule)


@pytest.mark.parametrize(("rule", "row", "_pointer"), [case for case in BROKEN_ROWS if case[0] != "mixed_formats"])
def test_the_fast_path_passes_no_row_that_the_strict_one_refuses(rule: str, row: bytes, _pointer: str) -> None:
    assert count_messages_of_plain_row(row) is None


def test_the_fast_path_takes_ordinary_rows_and_agrees_with_the_strict_one() -> None:
    assert count_messages_of_plain_row(GOOD) == 2
    tricky = chat({"role": "user", "content": 'x": y'}, ANSWER)
    value, findings = parse_line(tricky)
    assert value is not None and not findings
    assert check_row(value) == ("chat", [])


PIECES = [
    b'"',
    b":",
    b",",
    b"{",
    b"}",
    b"[",
    b"]",
    b" ",
    b"\\",
    b'"role":',
    b'"role": "user"',
    b'"weight": 0,',
    b"0",
    b"\xff",
]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_fast_path_never_disagrees_with_the_strict_one_on_mangled_rows(data: st.DataObject) -> None:
    row = bytearray(data.draw(st.sampled_from(GOOD_ROWS)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(row)))
        row[place : place + data.draw(st.integers(0, 12))] = data.draw(st.sampled_from([b"", *PIECES]))
    if count_messages_of_plain_row(bytes(row)) is not None:
        value, findings = parse_line(bytes(row))
        assert value is not None
        assert findings == []
        assert check_row(value) == ("chat", [])


def test_the_command_writes_a_report_whole(tmp_path: Path) -> None:
    data, target = tmp_path / "d.jsonl", tmp_path / "r.json"
    data.write_bytes(b"\n".join([GOOD] * 10))
    assert main([str(data), str(target)]) == 0
    assert json.loads(target.read_text())["verdict"] == "accept"
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl", "r.json"] or len(list(tmp_path.iterdir())) == 2
    assert main(["one"]) != 0


def test_a_validator_that_died_refuses_the_file() -> None:
    report = failure_report("memory")
    assert report["verdict"] == "reject"
    assert "memory" in report["rules"][0]["samples"][0]["detail"]
