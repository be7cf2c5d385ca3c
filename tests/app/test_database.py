"""What leaves the database besides rows: nothing of a row that could not be stored."""

from __future__ import annotations

import traceback

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError

from app.database import unit_of_work
from app.tables.webhooks import WebhookEndpoint


@pytest.mark.parametrize("fault", [{"name": None}, {"project_id": "proj_unknown"}])
def test_a_row_that_cannot_be_stored_is_not_quoted(engine: Engine, fault: dict[str, str | None]) -> None:
    row = {"id": "whe_1", "project_id": "proj_unknown", "name": "ci", "url": "https://x.example/", "event_types": []}
    with pytest.raises(IntegrityError) as failed, unit_of_work(engine) as session:
        session.add(WebhookEndpoint(**{**row, **fault}, secret="whsec_canary"))
    shown = "".join(traceback.format_exception(failed.value))
    assert "INSERT INTO webhook_endpoint" in shown
    assert "canary" not in shown
    assert "proj_unknown" not in shown
