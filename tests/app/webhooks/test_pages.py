"""Pages of webhook endpoints while endpoints come and go."""

from __future__ import annotations

import pytest

from app.database import read_session, unit_of_work
from app.errors import InvalidRequest
from app.tables.webhooks import WebhookEndpoint
from app.webhooks import service
from tests.app.product import Product


def make(product: Product, project_id: str, count: int) -> list[str]:
    """Newest first, as a page shows them."""
    ids = []
    for number in range(count):
        with unit_of_work(product.engine) as session:
            made = service.create(session, project_id, name=str(number), url="https://example.org/", event_types=[])
            made.created_at = 1000.0 + number
            ids.append(made.id)
    return ids[::-1]


def page(product: Product, after: str) -> list[str]:
    with read_session(product.engine) as session:
        rows: list[WebhookEndpoint] = list(
            service.list_(session, product.principal.project_id, after=after, limit=10).data
        )
        return [row.id for row in rows]


def test_a_page_goes_on_behind_an_endpoint_that_was_deleted_meanwhile(product: Product) -> None:
    ids = make(product, product.principal.project_id, 4)
    with unit_of_work(product.engine) as session:
        service.delete(session, product.principal.project_id, ids[1])
    assert page(product, ids[1]) == ids[2:]
    assert page(product, ids[0]) == ids[2:]


def test_a_foreign_cursor_is_refused(product: Product) -> None:
    [foreign] = make(product, product.other.project_id, 1)
    for after in (foreign, "whe_unknown"):
        with pytest.raises(InvalidRequest):
            page(product, after)
