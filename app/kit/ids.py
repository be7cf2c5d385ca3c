"""Random identifiers with a prefix that says what they name.

Knows: enough entropy never to guess or collide (24 characters of base 62, 142 bits).
Refuses to know: what the prefixes mean.
"""

import secrets
import string

ALPHABET = string.ascii_letters + string.digits


def new_id(prefix: str, length: int = 24) -> str:
    """`prefix` carries its own separator: ``ftjob-``, ``evt_``."""
    return prefix + "".join(secrets.choice(ALPHABET) for _ in range(length))
