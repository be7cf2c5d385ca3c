"""The gateway: the only place where routers, error handlers and middleware meet.

Knows: how every failure becomes OpenAI's error envelope, and that every answer carries a request id.
Refuses to know: what any route does.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from sqlalchemy.exc import DataError, DBAPIError, OperationalError
from starlette.exceptions import HTTPException

from app import telemetry
from app.admin.endpoints import router as admin
from app.api import router as api
from app.database import open_engine
from app.envelope import describe_validation_error, render, unexpected
from app.errors import (
    InvalidRequest,
    NotFound,
    ServiceError,
    StorageFull,
    Unavailable,
)
from app.health import router as health
from app.middleware import BodyLimit, RequestScope
from app.settings import Settings, get_settings
from app.storage import open_storage

VERSION = "0.1.0"
# SQLite says "database or disk is full", PostgreSQL "No space left on device".
DISK_FULL = re.compile(r"disk is full|no space left", re.IGNORECASE)
log = telemetry.get_logger(__name__)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application. Opens no connection: the engine connects at the first query."""
    settings = settings or get_settings()
    app = FastAPI(
        title="Theriac",
        version=VERSION,
        summary="Fine-tuning that repairs and proves the safety of every model before it releases it.",
        docs_url="/docs" if settings.gateway.docs else None,
        redoc_url=None,
        openapi_url="/openapi.json" if settings.gateway.docs else None,
        lifespan=_lifespan,
        redirect_slashes=False,
        # The OpenAI package sends POSTs without a body or type, and plain HTTP clients forget the type.
        strict_content_type=False,
    )
    app.state.settings = settings
    app.state.engine = open_engine(settings.resolved_database_url)
    app.state.storage = open_storage(settings)
    app.include_router(health)
    app.include_router(api)
    app.include_router(admin, prefix="/v1")
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(DBAPIError, _database_error)
    streamed = {("POST", "/v1/files"), ("POST", "/v1/admin/provider-sets")}  # they have limits of their own
    app.add_middleware(BodyLimit, max_bytes=settings.gateway.max_body_bytes, exempt=streamed)
    app.add_middleware(RequestScope)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.engine.dispose()


async def _service_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    if error.status >= 500:
        log.error("service_error", code=error.code, error_message=error.message)
    return render(error)


async def _validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return render(describe_validation_error(error.errors(), error.body))


async def _http_exception(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown routes and methods, bodies that cannot be read."""
    assert isinstance(error, HTTPException)
    where = f"({request.method} {request.url.path})"
    if error.status_code == 404:
        return render(NotFound(f"Invalid URL {where}", code="unknown_url"))
    if error.status_code == 405:
        refusal = InvalidRequest(f"Not allowed {where}", code="method_not_allowed")
    else:
        refusal = InvalidRequest("The request could not be read.", code="malformed_request")
    refusal.status = error.status_code  # room: status an HTTP status, no state machine's
    return render(refusal)


async def _database_error(_request: Request, error: Exception) -> Response:
    if isinstance(error, DataError):
        return render(InvalidRequest("A value of the request cannot be stored.", code="invalid_value"))
    log.error("database_error", exc_info=error)
    if isinstance(error, DBAPIError) and DISK_FULL.search(str(error.orig)):
        return render(StorageFull("The service's database has no room left. Try again later."))
    if isinstance(error, OperationalError):
        return render(Unavailable("The database cannot be reached or is busy; try again."))
    return render(unexpected())
