"""Exit codes, and which error is which.

| code | means |
|---|---|
| 0 | done; the job succeeded |
| 1 | the job failed or was cancelled, or a part of the service failed |
| 2 | the command or the request is wrong |
| 3 | no such job, artifact, plan, user, … |
| 4 | the key is missing or wrong |
| 5 | the service cannot be reached or is not ready |
| 6 | conflict: the port is taken, the job has ended, a limit is reached |
| 7 | the time given ran out |
| 130 | interrupted; the job goes on |
"""

from __future__ import annotations

import enum

from scheduler.errors import D2ftError, UserError
from service.client import (
    ApiAuthError,
    ApiBusyError,
    ApiConflictError,
    ApiInvalidError,
    ApiNotFoundError,
    ApiTimeoutError,
    ApiUnreachableError,
)
from service.errors import ConflictError, NotFoundError


class Exit(enum.IntEnum):
    """What the shell is told."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    AUTH = 4
    UNREACHABLE = 5
    CONFLICT = 6
    TIMEOUT = 7
    INTERRUPTED = 130


_CODES: tuple[tuple[type[D2ftError], Exit], ...] = (
    (ApiNotFoundError, Exit.NOT_FOUND),
    (ApiAuthError, Exit.AUTH),
    (ApiUnreachableError, Exit.UNREACHABLE),
    (ApiTimeoutError, Exit.TIMEOUT),
    (ApiConflictError, Exit.CONFLICT),
    (ApiInvalidError, Exit.USAGE),
    (ConflictError, Exit.CONFLICT),
    (NotFoundError, Exit.NOT_FOUND),
    (UserError, Exit.USAGE),
)


def exit_code(error: D2ftError) -> Exit:
    """The code of an error; a limit that is reached is a conflict, a part that is not ready is out of reach."""
    if isinstance(error, ApiBusyError):
        return Exit.CONFLICT if error.status == 429 else Exit.UNREACHABLE
    return next((code for kind, code in _CODES if isinstance(error, kind)), Exit.FAILED)
