"""Text that every database and every client can hold.

Knows: that PostgreSQL cannot store U+0000, that half a surrogate pair is no character, and that encoders fail on what
is nested deeper than anybody means it. Refuses to know: whose text.
"""

from __future__ import annotations

from typing import Any

DEPTH_LIMIT = 32


def is_storable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def find_unstorable(value: Any, path: str = "", depth: int = 0) -> str | None:
    """The dotted path of the first text, key or value, that cannot be stored; None when all can.

    Of what is nested too deeply it is the outermost member: a path of a thousand names helps nobody.
    """
    if depth > DEPTH_LIMIT:
        return path.partition(".")[0]
    if isinstance(value, str):
        return None if is_storable(value) else path
    if isinstance(value, dict):
        for key, inner in value.items():
            if not is_storable(str(key)):
                return path
            found = find_unstorable(inner, f"{path}.{key}" if path else str(key), depth + 1)
            if found is not None:
                return found
    if isinstance(value, list):
        for index, inner in enumerate(value):
            found = find_unstorable(inner, f"{path}.{index}", depth + 1)
            if found is not None:
                return found
    return None
