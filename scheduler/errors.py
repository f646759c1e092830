"""Everything that can go wrong, as one tree; every error pickles and names its remedy.

D2ftError                code, fault, param, remedy as attributes; str() is the message
├── UserError            the request is wrong; trying again unchanged fails again   (fault "user")
│   └── InfeasibleError  no plan meets the constraints; names the tight one          (fault "user")
├── CapacityError        the cluster is too small or too slow to start now           (fault "capacity")
└── SystemFault          ours, or the machine's; trying again may help               (fault "system")
    └── DeadlockError    a program waits for a message that nobody will send
"""

from __future__ import annotations

from typing import Any


class D2ftError(Exception):
    """Base of the tree.

    `code` is a stable snake_case word for programs, `param` the field at fault ("method.ratios"),
    `remedy` one sentence that says what to do.
    """

    fault = "system"

    def __init__(
        self, message: str, *, code: str = "internal", param: str | None = None, remedy: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.code, self.param, self.remedy)

    def to_dict(self) -> dict[str, str | None]:
        """The job's `error` object: code, fault, message (with the remedy), param."""
        message = f"{self.message} {self.remedy}" if self.remedy else self.message
        return {"code": self.code, "fault": self.fault, "message": message, "param": self.param}


class UserError(D2ftError):
    """The request cannot be served as it stands."""

    fault = "user"


class InfeasibleError(UserError):
    """No plan meets the constraints; the message names the tight one and the nearest that can be met."""


class CapacityError(D2ftError):
    """The cluster cannot start what was asked for within its time."""

    fault = "capacity"


class SystemFault(D2ftError):
    """A fault of the product or the machine."""


class DeadlockError(SystemFault):
    """A program waits for a message that no worker sends."""


def from_dict(data: dict[str, str | None]) -> D2ftError:
    """The error behind a `to_dict`; its class follows the fault."""
    kinds: dict[str | None, type[D2ftError]] = {"user": UserError, "capacity": CapacityError}
    kind = kinds.get(data.get("fault"), SystemFault)
    return kind(str(data["message"]), code=data["code"] or "internal", param=data["param"])


def _rebuild(kind: type[D2ftError], message: str, code: str, param: str | None, remedy: str | None) -> D2ftError:
    return kind(message, code=code, param=param, remedy=remedy)
