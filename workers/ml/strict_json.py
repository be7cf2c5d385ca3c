"""One line of JSONL as an object, more strictly than `json` reads it.

Knows: bad UTF-8, keys given twice, NaN and infinities, nesting without end; and that no message of its quotes the line.
Refuses to know: what the object's keys mean.
"""

from __future__ import annotations

import json
import math
from typing import Any


def parse_object(raw: bytes) -> dict[str, Any]:
    """The line's object; a ValueError says what is wrong and in which column, never what stands there."""
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite
        )
    except UnicodeDecodeError as error:
        # The error object carries the whole line; only its place is passed on.
        raise ValueError(f"not valid UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg.lower()} in column {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - one kind of error for one kind of caller
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # With a key given twice, two readers could see different values.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number
