"""Organizations, projects and the two kinds of keys.

Knows: that a secret is stored as sha256 only, and that customers' and operators' keys live apart.
Refuses to know: the keys' text form (`app.accounts.keys`).
"""

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from app.tables.base import Created, Table


class Organization(Created, Table):
    __tablename__ = "organization"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), unique=True)


class Project(Created, Table):
    __tablename__ = "project"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organization.id"), index=True)
    name: Mapped[str] = mapped_column(String(128))
    archived_at: Mapped[float | None]


class ApiKey(Created, Table):
    """A customer's key. `key_id` is the public part it is looked up by; `digest` is sha256 of the secret part."""

    __tablename__ = "api_key"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"), index=True)
    name: Mapped[str] = mapped_column(String(128))
    key_id: Mapped[str] = mapped_column(String(32), unique=True)
    digest: Mapped[str] = mapped_column(String(64))
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    last_used_at: Mapped[float | None]


class OperatorKey(Created, Table):
    """A provider's key: another prefix, another table, another router."""

    __tablename__ = "operator_key"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    key_id: Mapped[str] = mapped_column(String(32), unique=True)
    digest: Mapped[str] = mapped_column(String(64))
    revoked_at: Mapped[float | None]
    last_used_at: Mapped[float | None]
