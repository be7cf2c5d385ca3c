"""Base models the provider registered.

Knows: where the bytes lie and the digest they had at registration, which every load is checked against; the same of
the weights before alignment, where the provider has them.
Refuses to know: how a model is loaded.
"""

from typing import Any

from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from app.tables.base import Created, Json, Table


class BaseModelRef(Created, Table):
    """`files` maps each relative path to its sha256 and size; `digest` covers all of them."""

    __tablename__ = "base_model"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    path: Mapped[str] = mapped_column(String(1024))
    hub_id: Mapped[str | None] = mapped_column(String(255))
    revision: Mapped[str | None] = mapped_column(String(64))
    digest: Mapped[str] = mapped_column(String(64))
    files: Mapped[dict[str, Any]]
    context_limit: Mapped[int]
    learning_rate: Mapped[float]
    target_modules: Mapped[list[Any]]
    defaults: Mapped[dict[str, Any]] = mapped_column(default=dict)
    pretrained_path: Mapped[str | None] = mapped_column(String(1024))
    pretrained_digest: Mapped[str | None] = mapped_column(String(64))
    pretrained_files: Mapped[dict[str, Any] | None] = mapped_column(Json)
    retired_at: Mapped[float | None]
