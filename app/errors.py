"""Every refusal the service gives, as one tree with code, status and what to do.

Knows: stable codes, HTTP-like status numbers, the parameter at fault.
Refuses to know: fastapi. One handler in `app.main` renders these in OpenAI's envelope.

    ServiceError
    ├── InvalidRequest 400      ├── PayloadTooLarge 413
    ├── Unauthorized 401        ├── TooManyRequests 429
    ├── Forbidden 403           ├── StorageFull 507
    ├── NotFound 404            ├── RequestTimeout 408
    ├── IdempotencyMismatch 422 ├── RangeNotSatisfiable 416
    └── Conflict 409            └── Unavailable 503
        ├── IllegalTransition
        └── InProgress
"""


class ServiceError(Exception):
    """`code` is stable and machine-readable, `message` says what to do, `param` names the input at fault."""

    status = 500
    code = "server_error"
    type = "server_error"
    retryable = False

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(ServiceError):
    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class Unauthorized(ServiceError):
    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class Forbidden(ServiceError):
    status = 403
    code = "forbidden"
    type = "permission_error"


class NotFound(ServiceError):
    status = 404
    code = "not_found"
    type = "invalid_request_error"


class Conflict(ServiceError):
    status = 409
    code = "conflict"
    type = "invalid_request_error"


class IllegalTransition(Conflict):
    code = "illegal_transition"


class InProgress(Conflict):
    """The same request is being carried out right now; its answer can be had in a moment."""

    code = "in_progress"
    retryable = True


class IdempotencyMismatch(ServiceError):
    status = 422
    code = "idempotency_mismatch"
    type = "invalid_request_error"


class RequestTimeout(ServiceError):
    status = 408
    code = "request_timeout"
    type = "invalid_request_error"
    retryable = True


class PayloadTooLarge(ServiceError):
    status = 413
    code = "payload_too_large"
    type = "invalid_request_error"


class RangeNotSatisfiable(ServiceError):
    status = 416
    code = "range_not_satisfiable"
    type = "invalid_request_error"


class TooManyRequests(ServiceError):
    status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"
    retryable = True


class Unavailable(ServiceError):
    status = 503
    code = "unavailable"
    retryable = True


class StorageFull(ServiceError):
    status = 507
    code = "storage_full"
    retryable = True
