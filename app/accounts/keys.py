"""The text form of keys: ``thk_<key id>_<secret>_<checksum>``.

Knows: how a key is made, split and recognised offline (prefix and CRC-32, so that a secret scanner can tell a real
key from a look-alike without asking us), and that only sha256 of the secret is kept.
Refuses to know: whose key it is. The secret has 190 bits, so a slow hash would protect nothing and cost a lever for
denial of service.
"""

from __future__ import annotations

import hashlib
import hmac
import string
import zlib
from dataclasses import dataclass

from app.kit.ids import new_id

CUSTOMER_PREFIX = "thk"
OPERATOR_PREFIX = "tho"
KEY_ID_LENGTH = 12
SECRET_LENGTH = 32
CHECKSUM_LENGTH = 6
DIGITS = string.digits + string.ascii_letters


@dataclass(frozen=True, slots=True)
class KeyText:
    """A key taken apart. `repr` hides the secret, so that a traceback or a log line cannot leak it."""

    prefix: str
    key_id: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyText({self.prefix}_{self.key_id}_…)"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.secret.encode("ascii")).hexdigest()

    @property
    def text(self) -> str:
        body = f"{self.prefix}_{self.key_id}_{self.secret}"
        return f"{body}_{checksum(body)}"


def new_key(prefix: str) -> KeyText:
    return KeyText(prefix, new_id("", KEY_ID_LENGTH), new_id("", SECRET_LENGTH))


def parse(text: str, prefix: str) -> KeyText | None:
    """The key's parts, or None for anything that cannot be a key of this kind."""
    parts = text.split("_")
    if len(parts) != 4 or parts[0] != prefix or not text.isascii():
        return None
    _, key_id, secret, check = parts
    if (len(key_id), len(secret)) != (KEY_ID_LENGTH, SECRET_LENGTH) or check != checksum(text.rpartition("_")[0]):
        return None
    return KeyText(prefix, key_id, secret)


def matches(key: KeyText, digest: str) -> bool:
    return hmac.compare_digest(key.digest, digest)


def checksum(body: str) -> str:
    number, digits = zlib.crc32(body.encode("ascii")), ""
    for _ in range(CHECKSUM_LENGTH):
        number, rest = divmod(number, len(DIGITS))
        digits = DIGITS[rest] + digits
    return digits
