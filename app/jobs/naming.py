"""Names of tuned models: ``ft:<base>:<organization>:<suffix>:<8 characters>``.

Knows: the form OpenAI gives them, without '/' (clients put them in a path), and that one job has one name.
Refuses to know: whether the model was released.
"""

from __future__ import annotations

import re

SLUG_LENGTH = 60


def model_id(base_name: str, organization: str, suffix: str | None, job_id: str) -> str:
    """Always the same for one job, so that a retried stage cannot make a second name."""
    return ":".join(["ft", slug(base_name), slug(organization), slug(suffix or ""), job_id[-8:]])


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-")[:SLUG_LENGTH]
