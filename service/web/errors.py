"""What goes wrong on the way to a page is a page, too: what happened, what to do, and the request's id."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from scheduler.errors import D2ftError
from service.errors import http_status
from service.web.render import page


class PageRoute(APIRoute):
    """A route whose errors are shown to people."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def shown(request: Request) -> Response:
            try:
                return await answer(request)
            except D2ftError as error:
                status, message, remedy = http_status(error), error.message, error.remedy
            except RequestValidationError as error:
                first = error.errors()[0]
                status, message = 422, f"{first['loc'][-1]}: {first['msg']}"
                remedy = "Correct the address, or go back."
            return page(request, "error.html", status, message=message, remedy=remedy, status=status)

        return shown
