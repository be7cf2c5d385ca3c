"""Every way the library can fail, as one tree.

Knows: what went wrong in terms of models, rows and numbers, and what the caller can do about it.
Refuses to know: HTTP status codes, job states, retries (the bridge maps `code` to those).

    LibraryError
    ├── UserError              the customer's data or settings; trying again will not help
    │   ├── InvalidRow         a row that cannot be read or encoded
    │   │   └── RowTooLong     longer than the model's context
    │   ├── InvalidSetting     a knob out of range, or a method that cannot run as asked
    │   └── UnsupportedAdapter DoRA and other forms whose map from factors to weights is not ours
    ├── MissingInput           a declared need (data set, checkpoint) was not supplied
    ├── IntegrityError         bytes are not what their digest says
    │   └── BaseModelChanged
    ├── NumericError           NaN, Inf, a zero gradient, a tensor that matched nothing
    ├── OutOfMemory            the device is full; a smaller micro-step may fit
    └── Cancelled              the caller asked us to stop

Every class is picklable and carries `code` (stable, snake case) and `param` (the setting or file at fault).
"""


class LibraryError(Exception):
    """Root of the tree; `code` never changes between versions, the message may."""

    code = "library_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class UserError(LibraryError, ValueError):
    code = "user_error"


class InvalidRow(UserError):
    code = "user_invalid_row"

    def __init__(self, message: str, line: int | None = None, param: str | None = None) -> None:
        super().__init__(message, param)
        self.args = (message, line, param)
        self.line = line


class RowTooLong(InvalidRow):
    code = "user_row_too_long"


class InvalidSetting(UserError):
    code = "user_invalid_setting"


class UnsupportedAdapter(UserError):
    code = "user_unsupported_adapter"


class MissingInput(LibraryError, LookupError):
    code = "system_missing_input"


class IntegrityError(LibraryError, OSError):
    code = "system_integrity_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        LibraryError.__init__(self, message, param)


class BaseModelChanged(IntegrityError):
    code = "system_base_model_changed"


class NumericError(LibraryError, ArithmeticError):
    code = "system_numeric_error"


class OutOfMemory(LibraryError, MemoryError):
    code = "system_out_of_memory"


class Cancelled(LibraryError):
    code = "cancelled"
