"""The rules a dataset must keep: one id each, what was expected, and how findings are counted.

Knows: stable ids and sentences that help without repeating a row's content.
Refuses to know: how a row is read (`rows`) and where the file lies (`validation`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

SAMPLES_PER_RULE = 100
# Of all rules together; beyond it a rule still shows its first place.
SAMPLES_PER_REPORT = 500


class Severity(StrEnum):
    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Rule:
    id: str
    expected: str
    severity: Severity = Severity.ERROR


RULES = {
    rule.id: rule
    for rule in (
        Rule("empty_file", "a file with at least one row"),
        Rule("too_many_rows", "at most 5,000,000 rows"),
        Rule("line_too_long", "lines of at most 1 MiB"),
        Rule("invalid_utf8", "UTF-8 text"),
        Rule("misplaced_bom", "a byte-order mark at the start of the file only"),
        Rule("invalid_json", "one JSON value per line"),
        Rule("not_an_object", "a JSON object on every line"),
        Rule("duplicate_key", "every key once per object"),
        Rule("not_finite", "numbers that are finite"),
        Rule("lone_surrogate", "complete Unicode characters"),
        Rule("nul_character", "text without U+0000"),
        Rule("nested_too_deep", "at most 16 levels of nesting"),
        Rule("unknown_format", "the key 'messages', or the keys 'prompt' and 'completion'"),
        Rule("mixed_formats", "one row format in the whole file"),
        Rule("unknown_key", "only the keys of the row format"),
        Rule("tools_not_supported", "conversations without tool calls"),
        Rule("messages_not_a_list", "a list of messages"),
        Rule("no_messages", "at least one message"),
        Rule("too_many_messages", "at most 2,000 messages in a row"),
        Rule("message_not_an_object", "an object with 'role' and 'content'"),
        Rule("missing_role", "a 'role' in every message"),
        Rule("unknown_role", "role 'system', 'user' or 'assistant'"),
        Rule("missing_content", "a 'content' in every message"),
        Rule("content_not_text", "content as a string"),
        Rule("invalid_weight", "weight 0 or 1"),
        Rule("weight_not_on_assistant", "a weight on assistant messages only"),
        Rule("missing_assistant_message", "at least one assistant message"),
        Rule("nothing_to_learn", "at least one assistant message of weight 1 that is not empty"),
        Rule("too_few_rows", "at least 10 rows"),
        Rule("empty_prompt", "a prompt that is not empty", Severity.WARNING),
        Rule("blank_line", "no blank lines between rows", Severity.WARNING),
    )
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken rule at a place in a row: a JSON pointer, and what stood there by kind, never by content."""

    rule: str
    pointer: str = ""
    found: str = ""
    hint: str = ""


@dataclass(slots=True)
class RuleCount:
    count: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)


class Findings:
    """Counts every finding and keeps the first samples of each rule."""

    def __init__(self) -> None:
        self._by_rule: dict[str, RuleCount] = {}
        self._samples = 0

    def add(self, finding: Finding, *, line: int | None, byte_offset: int | None) -> None:
        rule = RULES[finding.rule]
        counted = self._by_rule.setdefault(finding.rule, RuleCount())
        counted.count += 1
        room = len(counted.samples) < SAMPLES_PER_RULE and self._samples < SAMPLES_PER_REPORT
        if room or not counted.samples:
            self._samples += 1
            counted.samples.append(
                {
                    "line": line,
                    "byte_offset": byte_offset,
                    "pointer": finding.pointer,
                    "expected": rule.expected,
                    "found": finding.found,
                    "detail": describe(rule, finding),
                }
            )

    @property
    def accepted(self) -> bool:
        return not any(RULES[rule].severity is Severity.ERROR for rule in self._by_rule)

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {"id": rule, "severity": RULES[rule].severity.value, "count": counted.count, "samples": counted.samples}
            for rule, counted in sorted(self._by_rule.items(), key=lambda item: _order(item[0]))
        ]


def describe(rule: Rule, finding: Finding) -> str:
    place = f" at {finding.pointer}" if finding.pointer else ""
    found = f", found {finding.found}" if finding.found else ""
    hint = f" ({finding.hint})" if finding.hint else ""
    return f"expected {rule.expected}{place}{found}{hint}"


def kind_of(value: object) -> str:
    """The JSON type in a reader's words."""
    names: list[tuple[type | tuple[type, ...], str]] = [
        (bool, "true or false"),
        (str, "a string"),
        ((int, float), "a number"),
        (list, "a list"),
        (dict, "an object"),
    ]
    return next((name for types, name in names if isinstance(value, types)), "null")


def _order(rule: str) -> tuple[int, int]:
    position = list(RULES).index(rule)
    return (0 if RULES[rule].severity is Severity.ERROR else 1, position)
