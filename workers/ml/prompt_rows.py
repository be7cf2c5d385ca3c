"""The rows of one provider set: a strict reader whose every complaint names a line and says what to do.

Knows: the JSONL form of `PromptRow`, what each role's rows must carry, and bounds.
Refuses to know: other sets (`provider_sets`), and any reason to quote a row: sets hold what nobody should meet in a
log, so that a complaint gives the line and the row's id, never its text. Standard library only.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from workers.ml.errors import IntegrityError, MissingInput
from workers.ml.prompts import group_key
from workers.ml.strict_json import parse_object
from workers.ml.types import Message, PromptRow

RECOVERY, SELECTION, CONFIRMATION = "recovery", "selection", "confirmation"
# Every role and the part of a job that sees its rows.
SPLIT_OF: Mapping[str, str] = {
    "harmful": RECOVERY,
    "refusals": RECOVERY,
    "retention": RECOVERY,
    "harm_selection": SELECTION,
    "harm_confirmation": CONFIRMATION,
    "harmless_selection": SELECTION,
    "harmless_confirmation": CONFIRMATION,
}
# What a model answers to these is judged by what it says, not by comparison with an answer.
WITHOUT_ANSWER = frozenset({"harm_selection", "harm_confirmation"})

MAX_SET_BYTES = 64 << 20
MAX_ROWS = 100_000
MAX_LINE_BYTES = 256 << 10
MAX_MESSAGES = 200
MAX_NAME = 200
MAX_SLICES = 32
NAMED_FAULTS = 10  # lines named in one complaint; the number of faulty lines is always given

KEYS = ("id", "messages", "answer", "group", "category", "split", "slices", "form")
MESSAGE_ROLES = ("system", "user", "assistant")
# An id is shown in complaints and reports, so it must be a name and not a sentence.
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/#-]{0,127}")


class _Fault(Exception):
    """What is wrong with one row, and what to do."""


@dataclass(slots=True)
class _Seen:
    """What the rows before have settled for the set."""

    ids: dict[str, int] = field(default_factory=dict)
    first: PromptRow | None = None


def read_prompt_rows(path: Path, role: str) -> list[PromptRow]:
    """The rows of one set, in the order of the file.

    A missing or empty file is a MissingInput, anything that is not a row of this role an IntegrityError that names
    the lines at fault.
    """
    if not path.is_file():
        raise MissingInput(f"The policy's data set {role!r} is not beside the job.", role)
    if path.stat().st_size > MAX_SET_BYTES:
        raise IntegrityError(f"The data set {role!r} is larger than {MAX_SET_BYTES:,} bytes; divide it.", role)
    rows: list[PromptRow] = []
    faults: list[str] = []
    seen = _Seen()
    for line, raw in _lines(path):
        if len(rows) + len(faults) == MAX_ROWS:
            raise IntegrityError(f"The data set {role!r} has more than {MAX_ROWS:,} rows; divide it.", role)
        try:
            rows.append(_read_row(raw, role, line, seen))
        except _Fault as fault:
            faults.append(f"Line {line} of the data set {role!r}{fault}")
    if faults:
        more = f" And {len(faults) - NAMED_FAULTS} more lines." if len(faults) > NAMED_FAULTS else ""
        raise IntegrityError(" ".join(faults[:NAMED_FAULTS]) + more, role)
    if not rows:
        raise MissingInput(f"The policy's data set {role!r} is empty.", role)
    return rows


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, by their number from 1."""
    with path.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            if line == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if raw.strip():
                yield line, raw


def _read_row(raw: bytes, role: str, line: int, seen: _Seen) -> PromptRow:
    if len(raw) > MAX_LINE_BYTES:
        raise _Fault(f" is longer than {MAX_LINE_BYTES:,} bytes; shorten or remove it.")
    try:
        values = parse_object(raw)
    except ValueError as error:
        raise _Fault(f" is {error}; write one JSON object a line.") from None
    row_id = values.get("id")
    if not isinstance(row_id, str) or not ID.fullmatch(row_id):
        raise _Fault(" has no good 'id'; give it 1 to 128 letters, digits and . _ : / # -, a letter or digit first.")
    try:
        row = _parse(values, role)
        _agree(row, seen, line)
    except _Fault as fault:
        raise _Fault(f" ({row_id!r}): {fault}") from None
    return row


def _parse(values: Mapping[str, Any], role: str) -> PromptRow:
    for key in values:
        if key not in KEYS:
            near = get_close_matches(key, KEYS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise _Fault(f"it has a key that rows do not have; they have {', '.join(KEYS)}{hint}")
    _check_split(values.get("split"), role)
    form = values.get("form")
    if form is not None and (isinstance(form, bool) or not isinstance(form, int | str)):
        raise _Fault("'form' is the number or the name of a phrasing.")
    return PromptRow(
        id=values["id"],
        messages=_messages(values.get("messages")),
        answer=_answer(values.get("answer"), role),
        group=group_key(_name(values.get("group"), "group")),
        category=_name(values.get("category"), "category"),
        slices=_slices(values.get("slices")),
    )


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        raise _Fault(f"'messages' is a list of 1 to {MAX_MESSAGES} messages.")
    messages = []
    for message in value:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise _Fault("a message has the keys 'role' and 'content' and no other.")
        if message["role"] not in MESSAGE_ROLES:
            raise _Fault(f"a message has an unknown role; roles are {', '.join(MESSAGE_ROLES)}.")
        if not _is_text(message["content"]):
            raise _Fault("the content of a message is text: not blank, and without half a surrogate pair.")
        messages.append(Message(message["role"], message["content"]))
    if messages[-1].role != "user":
        raise _Fault("the last message must be the user's; what the model should say to it goes into 'answer'.")
    return tuple(messages)


def _answer(value: Any, role: str) -> str | None:
    if value is None:
        if role not in WITHOUT_ANSWER:
            raise _Fault(f"'answer' is missing; every row of {role!r} needs one.")
        return None
    if not _is_text(value):
        raise _Fault("'answer' is text: not blank, and without half a surrogate pair.")
    return str(value)


def _check_split(value: Any, role: str) -> None:
    if value is not None and value != SPLIT_OF[role]:
        raise _Fault(
            f"its 'split' is not {SPLIT_OF[role]!r}, which is what {role!r} rows are for; import it under the role it "
            "was made for, or correct the column."
        )


def _slices(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_SLICES or not all(_is_text(name) for name in value):
        raise _Fault(f"'slices' is a list of at most {MAX_SLICES} names.")
    return tuple(_name(name, "slices") for name in value)


def _name(value: Any, key: str) -> str:
    """A group's, category's or slice's name; absent and null are ""."""
    if value is None or value == "":
        return ""
    if not _is_text(value) or len(value) > MAX_NAME or not value.isprintable():
        raise _Fault(f"{key!r} is a name of at most {MAX_NAME} printable characters.")
    return str(value)


def _is_text(value: Any) -> bool:
    # Half a surrogate pair can be neither encoded nor tokenized.
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def _agree(row: PromptRow, seen: _Seen, line: int) -> None:
    """With the rows before: no id twice, and a column that one row fills is filled by all."""
    known = seen.ids.setdefault(row.id, line)
    if known != line:
        raise _Fault(f"line {known} has the same id; an id names one row.")
    seen.first = seen.first or row
    for key, has in _COLUMNS.items():
        if has(row) != has(seen.first):
            does, should = ("has", "has none") if has(row) else ("has no", "has one")
            raise _Fault(f"it {does} {key!r} and the set's first row {should}; give one to every row, or to none.")


_COLUMNS: Mapping[str, Callable[[PromptRow], bool]] = {
    "group": lambda row: bool(row.group),
    "category": lambda row: bool(row.category),
}
