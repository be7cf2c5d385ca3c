"""What of a client's file name may be shown again.

Knows: that a name is display text only: no path, no control or direction-changing characters, 255 characters.
Refuses to know: where the bytes lie; stored names are ours.
"""

from __future__ import annotations

import unicodedata

MAX_LENGTH = 255
# Controls, formats (bidi overrides among them), surrogates, private use, unassigned, line and paragraph ends.
HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
FALLBACK = "upload"


def display_name(offered: str) -> str:
    last = offered.replace("\\", "/").rpartition("/")[2]
    shown = "".join(character for character in last if unicodedata.category(character) not in HIDDEN_CATEGORIES)
    shown = shown.strip().strip(".") if set(shown.strip()) <= {"."} else shown.strip()
    return shown[:MAX_LENGTH] or FALLBACK
