"""`/v1/files`: upload, list, look, download, delete.

Knows: verbs, paths, headers. Refuses to know: rules of files (`service`) and of forms (`upload`).
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from app.accounts.dependencies import Caller, CurrentSettings, Database, ObjectStore, Reading
from app.database import unit_of_work
from app.errors import InvalidRequest
from app.files import service as files
from app.files import upload as uploads
from app.files.schemas import FileDeleted, FileList, FileObject, FileValidation, file_object, file_validation
from app.kit.pagination import Order

router = APIRouter(prefix="/files", tags=["files"])

UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(files.PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                }
            }
        },
    }
}


@router.post("", response_model=FileObject, openapi_extra=UPLOAD_BODY)
async def create(
    request: Request, caller: Caller, storage: ObjectStore, engine: Database, settings: CurrentSettings
) -> FileObject:
    """Upload a file. It is validated in the background: poll it until `status` is `processed` or `error`."""
    limit = settings.gateway.max_file_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit + uploads.FORM_OVERHEAD_BYTES:
        raise uploads.too_large(limit)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise InvalidRequest("Send the file uncompressed.", code="unsupported_encoding", param="file")
    content_type = request.headers.get("content-type", "")
    upload = await uploads.receive(
        request.stream(), content_type, storage, project_id=caller.project_id, max_bytes=limit
    )

    def record() -> FileObject:
        committing = False
        try:
            with unit_of_work(engine) as session:
                answer = file_object(files.create(session, caller.project_id, upload.new, upload.stored))
                committing = True
        except BaseException:
            # Without its row the object belongs to nobody. Once the commit was sent, though, only the database knows
            # whether there is a row; if there is none, the sweep removes the object.
            if not committing:
                storage.discard(upload.stored.key)
            raise
        return answer

    return await run_in_threadpool(record)


@router.get("", response_model=FileList)
def list_files(
    caller: Caller,
    session: Reading,
    purpose: Annotated[str | None, Query(max_length=32)] = None,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Order = "desc",
) -> FileList:
    """List the project's files."""
    page = files.list_page(session, caller.project_id, purpose=purpose, after=after, limit=limit, order=order)
    data = [file_object(file) for file in page.data]
    return FileList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


@router.get("/{file_id}", response_model=FileObject)
def retrieve(file_id: str, caller: Caller, session: Reading) -> FileObject:
    """Look at one file."""
    return file_object(files.get(session, caller.project_id, file_id))


@router.get("/{file_id}/validation", response_model=FileValidation)
def retrieve_validation(file_id: str, caller: Caller, session: Reading) -> FileValidation:
    """Read which rules a dataset breaks, where, and what was expected there."""
    return file_validation(files.get(session, caller.project_id, file_id))


@router.get("/{file_id}/content", response_class=StreamingResponse)
def retrieve_content(file_id: str, caller: Caller, session: Reading, storage: ObjectStore) -> StreamingResponse:
    """Download the file's bytes."""
    file = files.get(session, caller.project_id, file_id)
    headers = {"content-length": str(file.bytes), "content-disposition": f'attachment; filename="{file.id}"'}
    return StreamingResponse(storage.open(file.storage_key), media_type="application/octet-stream", headers=headers)


@router.delete("/{file_id}", response_model=FileDeleted)
def delete(file_id: str, caller: Caller, engine: Database, storage: ObjectStore) -> FileDeleted:
    """Delete a file that no unfinished job needs."""
    with unit_of_work(engine) as session:
        key = files.delete(session, caller.project_id, file_id)
    storage.discard(key)
    return FileDeleted(id=file_id)
