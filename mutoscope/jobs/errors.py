"""What the domain refuses, without a word of HTTP: each dialect maps these to its vendor's status and body.

JobsError
├── InvalidRequest       a field that cannot be taken (`field` names it in the caller's own spelling)
├── Unsupported          well-formed, but this server cannot do it; never faked
├── Unauthorized         no or unknown key
├── Forbidden            the key or the plan does not allow it
├── NotFound             no such thing for this account
├── Conflict             not in this state
├── IdempotencyMismatch  the key was used with another body
├── OutOfCredits         the balance does not cover the estimate
└── LimitExceeded        too many for now; `retry_after_s` says when
"""

from __future__ import annotations

from mutoscope.errors import MutoscopeError


class JobsError(MutoscopeError):
    """Something the caller can act on."""

    code = "error"
    exit_code = 2  # of admin commands


class InvalidRequest(JobsError):
    """A field of the request cannot be taken."""

    code = "invalid_request"

    def __init__(self, message: str, *, field: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.field = field


class Unsupported(InvalidRequest):
    """The request is well-formed, but nothing here can do it."""

    code = "unsupported"


class Unauthorized(JobsError):
    """No API key, or one that is not known."""

    code = "unauthorized"


class Forbidden(JobsError):
    """The key or the plan does not allow this."""

    code = "forbidden"


class NotFound(JobsError):
    """There is no such thing for this account."""

    code = "not_found"


class Conflict(JobsError):
    """Not possible in this state."""

    code = "conflict"


class IdempotencyMismatch(JobsError):
    """The Idempotency-Key was used before with another request."""

    code = "idempotency_mismatch"


class OutOfCredits(JobsError):
    """The balance does not cover the estimate."""

    code = "out_of_credits"


class LimitExceeded(JobsError):
    """Too many for now."""

    code = "limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s
