"""Text that every database and every client can hold.

Knows: that PostgreSQL cannot store U+0000 and that half a surrogate pair is no character. Refuses to know: whose text.
"""

from __future__ import annotations

from typing import Any


def is_storable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def find_unstorable(value: Any, path: str = "") -> str | None:
    """The dotted path of the first text, key or value, that cannot be stored; None when all can."""
    if isinstance(value, str):
        return None if is_storable(value) else path
    if isinstance(value, dict):
        for key, inner in value.items():
            found = path if not is_storable(str(key)) else find_unstorable(inner, f"{path}.{key}" if path else str(key))
            if found is not None:
                return found
    if isinstance(value, list):
        for index, inner in enumerate(value):
            found = find_unstorable(inner, f"{path}.{index}")
            if found is not None:
                return found
    return None
