"""The JSON of files: OpenAI's shape with every field always present, and the validation report.

Knows: names and units on the wire. Refuses to know: how a file got there.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from app.tables.files import File


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class Sample(BaseModel):
    """One place where a rule was broken. It says what kind of thing stood there, never the content."""

    line: int | None
    byte_offset: int | None
    pointer: str
    expected: str
    found: str
    detail: str


class BrokenRule(BaseModel):
    id: str
    severity: Literal["error", "warning"]
    count: int
    samples: list[Sample]


class FileValidation(BaseModel):
    """Everything the validator found; `verdict` is null until it has looked."""

    object: Literal["file.validation"] = "file.validation"
    file_id: str
    verdict: Literal["accept", "reject"] | None
    format: str | None = None
    rows: int | None = None
    lines: int | None = None
    messages: int | None = None
    bytes: int | None = None
    longest_line_bytes: int | None = None
    sha256: str | None = None
    rules: list[BrokenRule] = []


def file_object(file: File) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_at),
        expires_at=None if file.expires_at is None else int(file.expires_at),
        filename=file.filename,
        purpose=file.purpose,
        status=file.status.value,
        status_details=file.status_details,
    )


def file_validation(file: File) -> FileValidation:
    report = file.report or {"verdict": None}
    return FileValidation.model_validate({**report, "file_id": file.id})
