"""What every table shares.

Knows: names of constraints (so that migrations can drop them), and that time is Unix seconds in a double:
the wire speaks Unix seconds, and lease arithmetic is then the same SQL on both databases.
Refuses to know: any table.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, CheckConstraint, Double, Enum, MetaData
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app.kit.clock import now

NAMING = {
    "ix": "ix_%(column_0_N_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
Json = JSON().with_variant(JSONB(), "postgresql")


class Table(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {float: Double(), dict[str, Any]: Json, list[Any]: Json}


class Created:
    """Adds `created_at`, Unix seconds."""

    created_at: Mapped[float] = mapped_column(default=now)


def one_of(column: str, values: Iterable[StrEnum]) -> CheckConstraint:
    """A CHECK that repeats an enum's value set in the database."""
    listed = ", ".join(f"'{value.value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_known")


def enum_text(values: type[StrEnum], length: int = 32) -> Enum:
    """A text column that reads back as the enum's member; the CHECK of `one_of` guards the other way."""
    return Enum(
        values,
        native_enum=False,
        create_constraint=False,
        length=length,
        values_callable=lambda members: [member.value for member in members],
    )
