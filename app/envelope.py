"""OpenAI's error envelope: how a refusal looks on the wire.

Knows: the four keys, the headers that tell a client whether to try again, and a parameter's name as the customer
wrote it.
Refuses to know: which handler calls it and why something was refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from app.errors import InvalidRequest, ServiceError

RETRY_AFTER_SECONDS = 5
MAX_NAME_LENGTH = 64  # a longer name is the customer's invention, not a parameter


def render(error: ServiceError, status_code: int | None = None) -> JSONResponse:
    """OpenAI's envelope: all four keys, always."""
    # A message may quote what a client sent; half a surrogate pair in it could not be encoded.
    message = error.message.encode("utf-8", "replace").decode()
    body = {"error": {"message": message, "type": error.type, "param": error.param, "code": error.code}}
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if error.retryable:
        headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(body, status_code=status_code or error.status, headers=headers)


def unexpected() -> ServiceError:
    """What is said about a fault of ours: nothing that could help an attacker, and the request id beside it."""
    return ServiceError("The server had an error while processing your request.")


def describe_validation_error(errors: Sequence[Mapping[str, Any]], body: Any) -> InvalidRequest:
    """The first parameter at fault and everything that was said about it, without repeating what was sent."""
    if not errors:
        return InvalidRequest("The request could not be read.", code="malformed_request")
    first = errors[0]
    if first["type"] == "json_invalid":
        return InvalidRequest("The body is not valid JSON.", code="invalid_json")
    param = public_param(first["loc"], body)
    if first["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        param = f"{param}.method" if param else "method"
    sentences = [
        _sentence(error) for error in errors if public_param(error["loc"], body) == public_param(first["loc"], body)
    ]
    message = f"Invalid {f'{param!r}' if param else 'request'}: {'; or '.join(dict.fromkeys(sentences))}."
    return InvalidRequest(message, code=_code(first["type"], param), param=param or None)


def public_param(location: Sequence[Any], body: Any) -> str:
    """The path of a parameter as the customer wrote it: Pydantic's names of union members are taken out."""
    place, *path = location
    if place != "body":
        return str(path[0]) if path else ""
    shown, current = [], body
    for index, part in enumerate(path):
        if len(str(part)) > MAX_NAME_LENGTH:
            break
        inside = (isinstance(current, dict) and part in current) or (
            isinstance(current, list) and isinstance(part, int) and part < len(current)
        )
        if inside:
            current = current[part]
            shown.append(str(part))
        elif index == len(path) - 1 and isinstance(current, dict):
            shown.append(str(part))
    return ".".join(shown)


def _sentence(error: Mapping[str, Any]) -> str:
    if error["type"] == "missing":
        return "it is required"
    if error["type"] == "extra_forbidden":
        return "this parameter is not known"
    if error["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        expected = (error.get("ctx") or {}).get("expected_tags")
        return f"expected one of {expected}" if expected else "name a recovery method"
    return str(error["msg"]).removeprefix("Value error, ").removesuffix(".")


def _code(kind: str, param: str) -> str:
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        return "unknown_recovery_method" if param == "recovery.method" else "invalid_value"
    return {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}.get(kind, "invalid_value")
