"""How the command line reaches the service: over HTTP, as any customer does.

Knows: address and key (options or environment), timeouts, and how a refusal is told to a person.
Refuses to know: the service's code and database.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import httpx
import typer

from app.commands.output import fail

DEFAULT_URL = "http://127.0.0.1:8080"
# Reading an answer may take as long as an upload is being stored; connecting may not.
TIMEOUT = httpx.Timeout(600.0, connect=5.0)

Url = Annotated[str, typer.Option(envvar="THERIAC_URL", help="where the service answers")]
Key = Annotated[str, typer.Option(envvar="THERIAC_API_KEY", help="an API key (thk_…)", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


@dataclass(frozen=True, slots=True)
class Service:
    """A connection to `/v1` that turns refusals into one line on stderr and exit code 1."""

    http: httpx.Client

    def get(self, path: str, **params: Any) -> Any:
        return self._answer("GET", path, params={name: value for name, value in params.items() if value is not None})

    def post(self, path: str, **options: Any) -> Any:
        return self._answer("POST", path, **options)

    def delete(self, path: str) -> Any:
        return self._answer("DELETE", path)

    @contextmanager
    def stream(self, path: str) -> Iterator[httpx.Response]:
        try:
            with self.http.stream("GET", path) as response:
                if response.is_error:
                    response.read()
                    _refuse(response)
                yield response
        except httpx.HTTPError as error:
            _unreachable(self.http, error)

    def pages(self, path: str, limit: int, **params: Any) -> Iterator[Any]:
        """Items of a listing, page by page, `limit` at most."""
        after = None
        while limit > 0:
            page = self.get(path, after=after, limit=min(limit, 100), **params)
            yield from page["data"]
            limit -= len(page["data"])
            if not page["has_more"] or not page["data"]:
                return
            after = page["data"][-1]["id"]

    def _answer(self, method: str, path: str, **options: Any) -> Any:
        try:
            response = self.http.request(method, path, **options)
        except httpx.HTTPError as error:
            _unreachable(self.http, error)
        if response.is_error:
            _refuse(response)
        return response.json()


@contextmanager
def connect(url: str, key: str) -> Iterator[Service]:
    if not key:
        fail("give an API key: --key, or THERIAC_API_KEY in the environment")
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    with httpx.Client(base_url=base, headers={"authorization": f"Bearer {key}"}, timeout=TIMEOUT) as http:
        yield Service(http)


def _refuse(response: httpx.Response) -> NoReturn:
    try:
        error = response.json()["error"]
        details = ", ".join(str(error[name]) for name in ("code", "param") if error.get(name))
        fail(f"{error['message']} ({details})" if details else error["message"])
    except (ValueError, KeyError, TypeError):
        fail(f"the service answered {response.status_code} without saying why")


def _unreachable(http: httpx.Client, error: httpx.HTTPError) -> NoReturn:
    if isinstance(error, httpx.ConnectError):
        fail(f"no service answers at {http.base_url}; start one with `theriac up`, or set THERIAC_URL", code=2)
    fail(f"the connection to {http.base_url} broke: {error or type(error).__name__}", code=2)
