"""Multipart bodies written out by hand, so that a test can break them, and a look at what became of them."""

from __future__ import annotations

from typing import Any

from fastapi.testclient import TestClient

from tests.app.product import Product

BOUNDARY = "frontier"


def form(*parts: tuple[str, bytes], end: bool = True) -> bytes:
    """A multipart body with its parts in the order given; a name with a slash carries a file name."""
    body = b""
    for name, content in parts:
        field, _, filename = name.partition("/")
        disposition = f'form-data; name="{field}"' + (f'; filename="{filename}"' if filename else "")
        body += f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"
    return body + (f"--{BOUNDARY}--\r\n".encode() if end else b"")


def post(client: TestClient, body: bytes, **headers: str) -> Any:
    content_type = f"multipart/form-data; boundary={BOUNDARY}"
    return client.post("/files", content=body, headers={"content-type": content_type, **headers})


def stored_objects(product: Product) -> list[str]:
    return sorted(product.storage.list("files"))
