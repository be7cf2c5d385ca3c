"""`/v1/admin`: the provider's routes, closed to everybody without an operator's key.

Knows: that the router itself demands the key, so that a new route cannot forget it, and that a customer's key finds
nothing here, as if the routes did not exist.
Refuses to know: what the figures mean.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.concurrency import run_in_threadpool

from app.accounts.dependencies import Database, ObjectStore, Reading, Writing, get_operator
from app.accounts.keys import OPERATOR_PREFIX
from app.accounts.service import Operator
from app.admin import provider_data
from app.admin import service as admin
from app.admin.receiving import received
from app.admin.schemas import (
    JobDetail,
    Overview,
    PolicyList,
    PolicyObject,
    ProviderSetList,
    ProviderSetObject,
    Queue,
    Reason,
    ReleaseView,
    ReviewDecision,
)
from app.errors import NotFound, Unauthorized
from app.releases import service as releases
from app.safety.library import MAX_SET_BYTES
from app.safety.provider_sets import NewSet
from app.safety.schemas import NAME, PolicyDraft, SetRole


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
After = Annotated[str | None, Query(max_length=64)]
Limit = Annotated[int, Query(ge=1, le=100)]
SET_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": f"JSONL, one row a line, at most {MAX_SET_BYTES:,} bytes.",
        "content": {"application/jsonl": {"schema": {"type": "string", "format": "binary"}}},
    }
}
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


@router.post("/provider-sets", response_model=ProviderSetObject, openapi_extra=SET_BODY)
async def import_set(
    request: Request,
    operator: CurrentOperator,
    engine: Database,
    storage: ObjectStore,
    name: Annotated[str, Query(pattern=NAME, description="a name that exists in this role gets a new version")],
    role: Annotated[SetRole, Query()],
) -> ProviderSetObject:
    """Import a provider set: every row is checked before one is kept. The same bytes are the same version."""
    new = NewSet(name, role, imported_by=operator.name)
    async with received(request, max_bytes=MAX_SET_BYTES) as path:
        return await run_in_threadpool(provider_data.import_set, engine, storage, path, new)


@router.get("/provider-sets", response_model=ProviderSetList)
def list_sets(
    session: Reading, role: Annotated[SetRole | None, Query()] = None, after: After = None, limit: Limit = 20
) -> ProviderSetList:
    """List provider sets, newest first: names, versions, digests and counts, never rows."""
    return provider_data.list_sets(session, role=role, after=after, limit=limit)


@router.get("/provider-sets/{set_id}", response_model=ProviderSetObject)
def retrieve_set(set_id: str, session: Reading) -> ProviderSetObject:
    """Look at one provider set: name, version, digest and counts, never rows."""
    return provider_data.get_set(session, set_id)


@router.post("/policies", response_model=PolicyObject)
def publish_policy(
    draft: PolicyDraft, operator: CurrentOperator, engine: Database, storage: ObjectStore
) -> PolicyObject:
    """Publish a safety policy: a new version, used by jobs created from now on. Sets that overlap are refused."""
    return provider_data.publish_policy(engine, storage, draft, published_by=operator.name)


@router.get("/policies", response_model=PolicyList)
def list_policies(session: Reading, after: After = None, limit: Limit = 20) -> PolicyList:
    """List every version of every safety policy, newest first."""
    return provider_data.list_policies(session, after=after, limit=limit)
