"""Cursor pages: `after` names the last item already seen, one item more than asked for tells whether there are more.

Knows: how to order by (time, id) and cut a page, for any table that has both columns.
Refuses to know: which rows the caller may see; the statement it is given already says that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from sqlalchemy import Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

Row = TypeVar("Row")
Order = Literal["asc", "desc"]


@dataclass(frozen=True, slots=True)
class Page(Generic[Row]):
    data: Sequence[Row]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Keyset:
    """The two columns a listing is ordered by; together they are unique."""

    moment: InstrumentedAttribute[Any]
    id: InstrumentedAttribute[Any]


def fetch_page(
    session: Session,
    statement: Select[Row],
    keyset: Keyset,
    *,
    cursor: tuple[Any, Any] | None,
    limit: int,
    order: Order = "desc",
) -> Page[Row]:
    """The page after `cursor` (the (moment, id) of the last item seen), `limit` items long at most."""
    columns = tuple_(keyset.moment, keyset.id)
    if cursor is not None:
        statement = statement.where(columns < cursor if order == "desc" else columns > cursor)
    for column in (keyset.moment, keyset.id):
        statement = statement.order_by(column.desc() if order == "desc" else column.asc())
    rows = list(session.scalars(statement.limit(limit + 1)))
    return Page(rows[:limit], has_more=len(rows) > limit)
