"""What the control plane refuses, as branches of the one error tree, with the HTTP status of each.

D2ftError
├── UserError                  422
│   ├── InvalidRequestError    422   one or more fields are wrong; `issues` names each
│   ├── NotFoundError          404
│   ├── ConflictError          409   the thing is in a state that does not allow this
│   ├── UnauthorisedError      401
│   ├── ForbiddenError         403   a foreign host or origin
│   ├── SlowBodyError          408
│   ├── TooLargeError          413
│   ├── UnsupportedMediaError  415
│   ├── RangeError             416
│   └── TooManyError           429
├── CapacityError              503
│   └── UnavailableError       503   a part we need is down or not ready; try again
└── SystemFault                500
    └── LostAttemptError       500   a write by an attempt that no longer owns its job; stand down
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from scheduler.errors import CapacityError, D2ftError, SystemFault, UserError


class Issue(NamedTuple):
    """One wrong field: its dotted name (or "" for the whole body), what is wrong, and a word for it.

    `pointer` is where in the body that is, where the dotted name does not say so: a name may have dots of its own.
    """

    field: str
    message: str
    code: str = "invalid"
    pointer: str = ""


class InvalidRequestError(UserError):
    """Fields of the request are wrong; the first issue speaks for all."""

    def __init__(self, issues: Sequence[Issue]) -> None:
        super().__init__(issues[0].message, code=issues[0].code, param=issues[0].field or None)
        self.issues = tuple(issues)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.issues,)


class NotFoundError(UserError):
    """There is no such thing, or not yet."""


class ConflictError(UserError):
    """The thing exists in a state that does not allow this."""


class UnauthorisedError(UserError):
    """No valid key came with the request."""


class ForbiddenError(UserError):
    """The request comes from, or names, a host that is not ours; or the key may not do this."""


class SlowBodyError(UserError):
    """The body did not arrive in time."""


class TooLargeError(UserError):
    """The body is larger than the limit."""


class UnsupportedMediaError(UserError):
    """The body is of a type that is not taken here."""


class RangeError(UserError):
    """The part of a file that was asked for lies outside of it."""


class TooManyError(UserError):
    """A limit on things open at once is reached."""


class UnavailableError(CapacityError):
    """A part that is needed is down or not ready yet."""


class LostAttemptError(SystemFault):
    """The attempt no longer owns its job: another took over, or the job has ended."""


STATUS_OF: tuple[tuple[type[D2ftError], int], ...] = (
    (NotFoundError, 404),
    (ConflictError, 409),
    (UnauthorisedError, 401),
    (ForbiddenError, 403),
    (SlowBodyError, 408),
    (TooLargeError, 413),
    (UnsupportedMediaError, 415),
    (RangeError, 416),
    (TooManyError, 429),
    (UserError, 422),
    (CapacityError, 503),
    (D2ftError, 500),
)


def http_status(error: D2ftError) -> int:
    """The HTTP status of an error: that of the first kind in the table which it is."""
    return next(status for kind, status in STATUS_OF if isinstance(error, kind))
