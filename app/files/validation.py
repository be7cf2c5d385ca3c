"""Validates a JSONL dataset: streamed, in bounded memory, with every broken rule counted and located.

Knows: how bytes become lines (only ``\\n`` ends a row; U+2028 does not), caps, and the report's form.
Refuses to know: the database and the store. The side process runs it as a child with limits:
    python -m app.files.validation <path> <report.json>
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from app.files.rows import CHAT, check_row, count_messages_of_plain_row, parse_line
from app.files.rules import Finding, Findings

REPORT_VERSION = 1
CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 20
MAX_ROWS = 5_000_000
MIN_ROWS = 10
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """`content` is None for a line that was too long to keep."""

    number: int
    offset: int
    content: bytes | None
    bytes: int


@dataclass(slots=True)
class Tally:
    """What is counted while the file passes by."""

    rows: int = 0
    lines: int = 0
    bytes: int = 0
    messages: int = 0
    longest_line_bytes: int = 0
    format: str | None = None
    hasher: Any = field(default_factory=hashlib.sha256)


def validate(path: Path) -> dict[str, Any]:
    """The report of one file; `verdict` is "accept" or "reject"."""
    findings, tally = Findings(), Tally()
    with path.open("rb") as stream:
        for line in _lines(stream, tally):
            tally.lines = line.number
            tally.longest_line_bytes = max(tally.longest_line_bytes, line.bytes)
            for finding in _check_line(line, tally):
                findings.add(finding, line=line.number, byte_offset=line.offset)
            if tally.rows > MAX_ROWS:
                findings.add(Finding("too_many_rows"), line=line.number, byte_offset=line.offset)
                break
        _count_rest(stream, tally)
    if tally.rows == 0 and findings.accepted:
        findings.add(Finding("empty_file", found=f"{tally.bytes} bytes and no row"), line=None, byte_offset=None)
    elif tally.rows < MIN_ROWS:
        findings.add(Finding("too_few_rows", found=f"{tally.rows}"), line=None, byte_offset=None)
    return _report(findings, tally)


def failure_report(reason: str) -> dict[str, Any]:
    """The report of a file on which the validator itself died: refused, with what is known."""
    detail = f"the file could not be read within the limits: {reason}"
    sample = {"line": None, "byte_offset": None, "pointer": "", "expected": "", "found": "", "detail": detail}
    rule = {"id": "validator_stopped", "severity": "error", "count": 1, "samples": [sample]}
    return {"version": REPORT_VERSION, "verdict": "reject", "rows": None, "rules": [rule]}


def write_report(report: dict[str, Any], target: Path) -> None:
    """Whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    partial.write_text(json.dumps(report), encoding="utf-8")
    partial.replace(target)


def _check_line(line: Line, tally: Tally) -> Iterator[Finding]:
    if line.content is None:
        tally.rows += 1
        yield Finding("line_too_long", found=f"{line.bytes} bytes")
        return
    content = line.content
    if line.number == 1:
        content = content.removeprefix(BOM)
    if not content.strip():
        yield Finding("blank_line")
        return
    tally.rows += 1
    plain = count_messages_of_plain_row(content) if tally.format in {None, CHAT} else None
    if plain is not None:
        tally.format = CHAT
        tally.messages += plain
        return
    row, found = parse_line(content)
    yield from found
    if row is None:
        return
    row_format, broken = check_row(row)
    yield from broken
    if row_format is None:
        return
    if tally.format not in {None, row_format}:
        yield Finding("mixed_formats", found=f"a {row_format} row in a {tally.format} file")
    tally.format = tally.format or row_format
    messages = row.get("messages")
    tally.messages += len(messages) if isinstance(messages, list) else 2


def _lines(stream: BinaryIO, tally: Tally) -> Iterator[Line]:
    """Lines without their end; a long one is counted to its end but never held."""
    number, offset, length, kept = 1, 0, 0, bytearray()
    while chunk := stream.read(CHUNK_BYTES):
        tally.hasher.update(chunk)
        tally.bytes += len(chunk)
        position = 0
        while (end := chunk.find(b"\n", position)) >= 0:
            length += end - position
            if length <= MAX_LINE_BYTES:
                kept += chunk[position:end]
            yield Line(number, offset, bytes(kept) if length <= MAX_LINE_BYTES else None, length)
            number, offset, length, position = number + 1, offset + length + 1, 0, end + 1
            kept.clear()
        length += len(chunk) - position
        if length <= MAX_LINE_BYTES:
            kept += chunk[position:]
        else:
            kept.clear()
    if length:
        yield Line(number, offset, bytes(kept) if length <= MAX_LINE_BYTES else None, length)


def _count_rest(stream: BinaryIO, tally: Tally) -> None:
    """Bytes and digest speak of the whole file, also where its rows were read no further."""
    while chunk := stream.read(CHUNK_BYTES):
        tally.hasher.update(chunk)
        tally.bytes += len(chunk)


def _report(findings: Findings, tally: Tally) -> dict[str, Any]:
    return {
        "version": REPORT_VERSION,
        "verdict": "accept" if findings.accepted else "reject",
        "format": tally.format,
        "rows": tally.rows,
        "lines": tally.lines,
        "messages": tally.messages,
        "bytes": tally.bytes,
        "longest_line_bytes": tally.longest_line_bytes,
        "sha256": tally.hasher.hexdigest(),
        "rules": findings.as_json(),
    }


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m app.files.validation <path> <report.json>\n")
        return os.EX_USAGE
    path, target = map(Path, arguments)
    write_report(validate(path), target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
