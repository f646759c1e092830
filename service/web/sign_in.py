"""Signing in with an API key, and out again."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import RedirectResponse, Response

from service.routes.world import InWorld
from service.sessions import AGE_S, COOKIE
from service.web.render import page

router = APIRouter(include_in_schema=False)
HOME = "/"
Next = Annotated[str, Query(alias="next", max_length=2000)]


@router.get("/ui/sign-in")
def ask_for_key(request: Request, to: Next = HOME) -> Response:
    return page(request, "sign_in.html", to=_ours(to), wrong=False)


@router.post("/ui/sign-in")
def sign_in(
    request: Request,
    world: InWorld,
    key: Annotated[str, Form(max_length=500)] = "",
    to: Annotated[str, Form(alias="next", max_length=2000)] = HOME,
) -> Response:
    caller = world.store.access.caller(key.strip()) if key.strip() else None
    if caller is None:
        return page(request, "sign_in.html", 401, to=_ours(to), wrong=True)
    answer = RedirectResponse(_ours(to), 303)
    answer.set_cookie(
        COOKIE,
        world.sessions.cookie_of(caller.key_id),
        max_age=AGE_S,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https" or (world.settings.public_url or "").startswith("https:"),
    )
    return answer


@router.post("/ui/sign-out")
def sign_out() -> Response:
    answer = RedirectResponse("/ui/sign-in", 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer


def _ours(to: str) -> str:
    """Where to go on: a path of this service, or its first page."""
    return to if to.startswith("/") and not to.startswith(("//", "/\\")) and to.isprintable() else HOME
