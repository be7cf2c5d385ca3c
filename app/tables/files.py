"""Uploaded bytes and what validation found in them.

Knows: where the object is and its digest; the report of the validator.
Refuses to know: the content.
"""

from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from app.tables.base import Created, Table, enum_text, one_of


class FileStatus(StrEnum):
    """OpenAI's three words."""

    UPLOADED = "uploaded"
    PROCESSED = "processed"
    ERROR = "error"


class File(Created, Table):
    """`report` may hold hundreds of samples and is read only by who asks for it."""

    __tablename__ = "file"
    __table_args__ = (one_of("status", FileStatus), Index("ix_file_project_created", "project_id", "created_at", "id"))

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"))
    filename: Mapped[str] = mapped_column(String(255))
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    storage_key: Mapped[str] = mapped_column(String(255))
    status: Mapped[FileStatus] = mapped_column(enum_text(FileStatus), default=FileStatus.UPLOADED)
    status_details: Mapped[str | None] = mapped_column(String(2000))
    report: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    rows: Mapped[int | None]
    expires_at: Mapped[float | None]
    deleted_at: Mapped[float | None]
