"""`/v1/admin`: the provider's routes, closed to everybody without an operator's key.

Knows: that the router itself demands the key, so that a new route cannot forget it, and that a customer's key finds
nothing here, as if the routes did not exist.
Refuses to know: what the figures mean.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from app.accounts.dependencies import Reading, Writing, get_operator
from app.accounts.keys import OPERATOR_PREFIX
from app.accounts.service import Operator
from app.admin import service as admin
from app.admin.schemas import JobDetail, Overview, Queue, Reason, ReleaseView, ReviewDecision
from app.errors import NotFound, Unauthorized
from app.releases import service as releases


def require_operator(request: Request) -> Operator:
    """The operator, or the answer of a service that has no such route."""
    offered = request.headers.get("authorization")
    try:
        return get_operator(request, offered)
    except Unauthorized:
        if f" {OPERATOR_PREFIX}_" in f" {(offered or '').partition(' ')[2]}":
            raise
        message = f"Invalid URL ({request.method} {request.url.path})"
        raise NotFound(message, code="unknown_url") from None


CurrentOperator = Annotated[Operator, Depends(require_operator)]
router = APIRouter(prefix="/admin", tags=["provider"], dependencies=[Depends(require_operator)])


@router.get("/overview", response_model=Overview)
def overview(session: Reading) -> Overview:
    """Jobs by stage, failures, verdicts, and harmful scores before and after recovery."""
    return admin.overview(session)


@router.get("/queue", response_model=Queue)
def queue(session: Reading) -> Queue:
    """What runs and what waits, with its place in line."""
    return admin.queue(session)


@router.get("/jobs/{job_id}", response_model=JobDetail)
def job_detail(job_id: str, session: Reading) -> JobDetail:
    """One job with its recovery trace and gate table."""
    return admin.job_detail(session, job_id)


@router.post("/jobs/{job_id}/review", response_model=JobDetail)
def review(job_id: str, decision: ReviewDecision, operator: CurrentOperator, session: Writing) -> JobDetail:
    """Approve or reject a candidate the gate wanted a person to look at. The reason is kept for ever."""
    approve = decision.decision == "approve"
    admin.review(session, job_id, approve=approve, reason=decision.reason, decided_by=operator.name)
    return admin.job_detail(session, job_id)


@router.post("/releases/{release_id}/suspend", response_model=ReleaseView)
def suspend(release_id: str, body: Reason, session: Writing) -> ReleaseView:
    """Stop downloads of a release until it is resumed."""
    return admin.release_view(releases.suspend(session, release_id, body.reason))


@router.post("/releases/{release_id}/resume", response_model=ReleaseView)
def resume(release_id: str, body: Reason, session: Writing) -> ReleaseView:
    """Allow downloads of a suspended release again."""
    return admin.release_view(releases.resume(session, release_id, body.reason))


@router.post("/releases/{release_id}/revoke", response_model=ReleaseView)
def revoke(release_id: str, body: Reason, session: Writing) -> ReleaseView:
    """Stop downloads of a release for good."""
    return admin.release_view(releases.revoke(session, release_id, body.reason))
