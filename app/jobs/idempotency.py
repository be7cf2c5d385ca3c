"""One request, one job: answers given before are given again.

Knows: `Idempotency-Key` (24 hours, per project, bound to the body) and the OpenAI client's own retries, which carry
a retry count but no key and are recognised by project and body within ten minutes.
Refuses to know: what a job is. The answer is stored in the transaction that created the job, so that neither
exists without the other; of two equal requests at once, the second waits for or collides with the first.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.errors import IdempotencyMismatch, InProgress, InvalidRequest
from app.jobs import repository
from app.kit.clock import now
from app.kit.ids import new_id
from app.tables.idempotency import AnsweredRequest

ROUTE = "fine_tuning.jobs.create"
KEY_SECONDS = 24 * 3600.0
RETRY_SECONDS = 600.0
KEY_LENGTH = 255


def earlier_answer(
    session: Session, project_id: str, *, key: str | None, digest: str, is_retry: bool
) -> dict[str, Any] | None:
    """The body this request was answered with before, if it was."""
    if key is not None:
        if not 1 <= len(key) <= KEY_LENGTH:
            raise InvalidRequest(f"An Idempotency-Key has 1 to {KEY_LENGTH} characters.", param="Idempotency-Key")
        found = repository.find_answer(session, project_id, ROUTE, key)
        if found is None:
            return None
        if now() - found.created_at > KEY_SECONDS:
            session.delete(found)
            session.flush()
            return None
        if found.digest != digest:
            raise IdempotencyMismatch("This Idempotency-Key was used with another request body.")
        return found.body
    if is_retry:
        recent = repository.find_recent_answer(session, project_id, ROUTE, digest, now() - RETRY_SECONDS)
        return recent.body if recent else None
    return None


def remember(session: Session, project_id: str, *, key: str | None, digest: str, body: dict[str, Any]) -> None:
    """Keeps the answer; raises InProgress when a request with the same key is being answered right now."""
    session.add(
        AnsweredRequest(id=new_id("ans_"), project_id=project_id, route=ROUTE, key=key, digest=digest, body=body)
    )
    try:
        session.flush()
    except IntegrityError as error:
        raise InProgress(
            "A request with this Idempotency-Key is being answered.", code="idempotency_in_progress"
        ) from error
