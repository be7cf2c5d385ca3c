"""Whether one line is a training row.

Knows: JSON more strictly than `json` does (duplicate keys, NaN, half surrogates, NUL), and the two row formats.
Refuses to know: files, lines before and after, tokens. What the trainer would refuse must be refused here, with a
place and a reason.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection, Iterator
from typing import Any, NoReturn

import orjson

from app.files.rules import Finding, kind_of

CHAT, COMPLETION = "chat", "prompt_completion"
ROLES = ("system", "user", "assistant")
MESSAGE_KEYS = ("role", "content", "weight")
TOOL_KEYS = frozenset({"tools", "tool_calls", "functions", "function_call", "parallel_tool_calls", "tool_call_id"})
KNOWN_KEYS = ("messages", "prompt", "completion", *MESSAGE_KEYS)
MAX_MESSAGES = 2000
MAX_DEPTH = 16


_KEY_END = re.compile(rb'"\s*:')


class _Refused(ValueError):
    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.rule)
        self.finding = finding


def count_messages_of_plain_row(raw: bytes) -> int | None:
    """The fast path: the number of messages of a chat row that is surely right, None for any that needs a closer look.

    Four times as fast as the strict decoder. It may leave a good row to the closer look, never pass a bad one: orjson
    refuses NaN, bad UTF-8 and raw control characters; rows with ``\\u`` escapes are left out; and a duplicate key shows
    as more key endings in the text than keys in the object.
    """
    if b"\\u" in raw:
        return None
    try:
        row = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(row, dict) or len(row) != 1:
        return None
    messages = row.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        return None
    keys, learned = 1, 0
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return None
        content, size = message.get("content"), len(message)
        if type(content) is not str or (size != 2 and not _has_good_weight(message)):
            return None
        keys += size
        learned += bool(message["role"] == "assistant" and content and message.get("weight", 1))
    return len(messages) if learned and len(_KEY_END.findall(raw)) == keys else None


def _has_good_weight(message: dict[str, Any]) -> bool:
    weight = message.get("weight")
    return len(message) == 3 and message["role"] == "assistant" and type(weight) in {int, float} and weight in {0, 1}


def parse_line(raw: bytes) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The line's object, or why there is none."""
    try:
        value = _decode(raw)
    except _Refused as refused:
        return None, [refused.finding]
    if not isinstance(value, dict):
        return None, [Finding("not_an_object", found=kind_of(value))]
    return value, list(_check_text(value, raw))


def check_row(row: dict[str, Any]) -> tuple[str | None, list[Finding]]:
    """The row's format (None when it has none) and everything wrong with it."""
    if "messages" in row:
        return CHAT, [*_check_keys(row, ("messages",), ""), *_check_messages(row["messages"])]
    if "prompt" in row and "completion" in row:
        return COMPLETION, [*_check_keys(row, ("prompt", "completion"), ""), *_check_completion(row)]
    return None, [Finding("unknown_format", hint=_near_key(row, KNOWN_KEYS))]


def _decode(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "the file looks like UTF-16" if raw[:2] in {b"\xff\xfe", b"\xfe\xff"} or raw[1:2] == b"\0" else ""
        raise _Refused(
            Finding("invalid_utf8", found=f"a bad byte at offset {error.start} of the line", hint=hint)
        ) from error
    if text.startswith("\ufeff"):
        raise _Refused(Finding("misplaced_bom"))
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError as error:
        raise _Refused(Finding("nested_too_deep")) from error
    except json.JSONDecodeError as error:
        hint = "a row may not span several lines" if error.pos >= len(text.rstrip()) else ""
        # The decoder's message names a kind of mistake and a column; it never quotes the row.
        raise _Refused(
            Finding("invalid_json", found=f"{error.msg.lower()} in column {error.pos + 1}", hint=hint)
        ) from error
    except ValueError as error:
        if isinstance(error, _Refused):
            raise
        # A number of more than 4,300 digits is the one other thing the decoder refuses.
        raise _Refused(Finding("invalid_json", found="a number that is too long")) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next((key for key in KNOWN_KEYS if keys.count(key) > 1), None)
        raise _Refused(Finding("duplicate_key", found=f"'{twice}' twice" if twice else "a key twice"))
    return found


def _no_constant(name: str) -> NoReturn:
    raise _Refused(Finding("not_finite", found=name))


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _Refused(Finding("not_finite", found="a number too large to hold"))
    return number


def _check_text(value: dict[str, Any], raw: bytes) -> Iterator[Finding]:
    """Escapes can smuggle in what UTF-8 itself cannot carry; lines without escapes need no look."""
    escaped = b"\\u" in raw
    deep = raw.count(b"{") + raw.count(b"[") > MAX_DEPTH
    if not escaped and not deep:
        return
    for path, text in _walk(value):
        if len(path) > MAX_DEPTH:
            yield Finding("nested_too_deep", _shown(path))
            return
        if "\0" in text:
            yield Finding("nul_character", _shown(path))
        if any("\ud800" <= character <= "\udfff" for character in text):
            yield Finding("lone_surrogate", _shown(path))


def _walk(value: Any) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every value with its path, and its text if it is one; keys count as text of their object. Iterative, because
    depth is what is being checked."""
    stack: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while stack:
        path, item = stack.pop()
        yield path, item if isinstance(item, str) else ""
        if isinstance(item, dict):
            for key, inner in item.items():
                yield path, key
                stack.append(((*path, key), inner))
        elif isinstance(item, list):
            stack.extend(((*path, index), inner) for index, inner in enumerate(item))


def _shown(path: tuple[str | int, ...]) -> str:
    """A JSON pointer that stops before the first key that is not ours: such a key is the row's content."""
    parts = []
    for part in path:
        if isinstance(part, str) and part not in KNOWN_KEYS:
            break
        parts.append(f"/{part}")
    return "".join(parts)


def _check_keys(found: dict[str, Any], allowed: Collection[str], pointer: str) -> Iterator[Finding]:
    extra = [key for key in found if key not in allowed]
    if any(key in TOOL_KEYS for key in extra):
        yield Finding("tools_not_supported", pointer)
    unknown = [key for key in extra if key not in TOOL_KEYS]
    if unknown:
        others = f"{len(unknown)} other key" + ("s" if len(unknown) > 1 else "")
        yield Finding("unknown_key", pointer, others, _near_key(unknown, allowed))


def _near_key(found: Collection[str], known: Collection[str]) -> str:
    """A likely misspelling, named by the right spelling only."""
    near = {match for key in found for match in difflib.get_close_matches(key[:32], known, n=1, cutoff=0.75)}
    return f"is {min(near)!r} misspelt?" if near else ""


def _check_messages(messages: Any) -> Iterator[Finding]:
    if not isinstance(messages, list):
        yield Finding("messages_not_a_list", "/messages", kind_of(messages))
        return
    if not messages:
        yield Finding("no_messages", "/messages")
        return
    if len(messages) > MAX_MESSAGES:
        yield Finding("too_many_messages", "/messages", f"{len(messages)}")
        return
    answers, learned = 0, 0
    for index, message in enumerate(messages):
        pointer = f"/messages/{index}"
        if not isinstance(message, dict):
            yield Finding("message_not_an_object", pointer, kind_of(message))
            continue
        yield from _check_message(message, pointer)
        if message.get("role") == "assistant":
            answers += 1
            learned += bool(message.get("weight", 1) and message.get("content"))
    if not answers:
        yield Finding("missing_assistant_message", "/messages")
    elif not learned:
        yield Finding("nothing_to_learn", "/messages")


def _check_message(message: dict[str, Any], pointer: str) -> Iterator[Finding]:
    yield from _check_keys(message, MESSAGE_KEYS, pointer)
    role = message.get("role")
    if "role" not in message:
        yield Finding("missing_role", pointer)
    elif role not in ROLES:
        known = " a role that this service does not train on" if isinstance(role, str) else kind_of(role)
        yield Finding("unknown_role", f"{pointer}/role", known.strip())
    if "content" not in message:
        yield Finding("missing_content", pointer)
    elif not isinstance(message["content"], str):
        yield Finding("content_not_text", f"{pointer}/content", kind_of(message["content"]))
    if "weight" in message:
        weight = message["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in {0, 1}:
            yield Finding("invalid_weight", f"{pointer}/weight", kind_of(weight))
        if role != "assistant":
            yield Finding("weight_not_on_assistant", f"{pointer}/weight")


def _check_completion(row: dict[str, Any]) -> Iterator[Finding]:
    for key in ("prompt", "completion"):
        if not isinstance(row[key], str):
            yield Finding("content_not_text", f"/{key}", kind_of(row[key]))
    if row["completion"] == "":
        yield Finding("nothing_to_learn", "/completion")
    if row["prompt"] == "":
        yield Finding("empty_prompt", "/prompt")
