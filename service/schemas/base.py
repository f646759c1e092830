"""What all answers share: their base, pages of lists, problems, health."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Item = TypeVar("Item")


class Wire(BaseModel):
    """Base of the answers."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Page(Wire, Generic[Item]):
    """A page of a list; ask for the next with `after` = last_id."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


class Health(Wire):
    """Whether a part answers."""

    status: Literal["ok", "degraded"]
    checks: dict[str, str] = Field(default_factory=dict)


class FieldProblem(Wire):
    """One wrong field: a JSON pointer into the body, and what is wrong."""

    pointer: str
    message: str


class Problem(Wire):
    """An error, after RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str | None = None
    code: str
    param: str | None = None
    errors: list[FieldProblem] = Field(default_factory=list)
    request_id: str | None = None
