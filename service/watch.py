"""What is seen of every request, from outside the door: a line of the log, meters, and a span where traces are on.

Pure ASGI, since it is paid by every request. The loop's own lateness is measured here, too.
"""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.logs import serving
from service.meters import Meters
from service.telemetry import Tracing

LAG_EVERY_S = 0.25
UNMATCHED = "unmatched"  # one name for all paths that lead nowhere
REFUSED = "refused"  # and one for all requests that did not get to a route
DESCRIPTION = "/openapi.json"  # the framework's own route, which it does not note on the request
MAX_PATH = 300
CLIENT_GONE = 499
log = logging.getLogger(__name__)


class Watch:
    """ASGI middleware that watches."""

    def __init__(self, app: ASGIApp, meters: Meters, tracing: Tracing) -> None:
        self._app = app
        self._meters = meters
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status, head_s = 0, 0.0

        async def noted(message: Message) -> None:
            nonlocal status, head_s
            if message["type"] == "http.response.start":
                status, head_s = message["status"], time.perf_counter() - began
            await send(message)

        parent = Headers(scope=scope).get("traceparent") if self._tracing.is_on else None
        with serving(scope), self._tracing.span("HTTP", parent, {}, serves=True) as span:
            try:
                await self._app(scope, receive, noted)
            except Exception:
                status = status or 500  # what the outermost layer will answer
                raise
            finally:
                whole_s, method = time.perf_counter() - began, scope["method"]
                status = status or CLIENT_GONE
                refused = (scope.get("state") or {}).get("refused")
                route = REFUSED if refused else route_of(scope)
                self._meters.answered(method, route, status, head_s or whole_s, refused)
                if self._tracing.is_on:
                    facts = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
                    span.describe(f"{method} {route}", facts, failed=status >= 500)
                _tell(scope, route, status, whole_s)


async def measure_lag(meters: Meters) -> None:
    """Sleep, for ever, and note how late the loop wakes one."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        meters.loop_lag.observe(max(0.0, clock() - due))


def route_of(scope: Scope) -> str:
    """The template of the route that took the request, as "/v1/jobs/{job_id}".

    A route knows its path without the prefix under which its router hangs: what its own part leaves of the path.
    """
    route, path = scope.get("route"), scope["path"]
    if route is None:
        return DESCRIPTION if path == DESCRIPTION and "endpoint" in scope else UNMATCHED
    template: str = route.path_format
    own = template.format(**scope["path_params"])
    return path.removesuffix(own) + template if path.endswith(own) else template


def _tell(scope: Scope, route: str, status: int, whole_s: float) -> None:
    method, path = scope["method"], scope["path"][:MAX_PATH]
    facts = {"method": method, "path": path, "route": route, "status": status, "duration_ms": round(whole_s * 1e3, 2)}
    log.info("%s %s %d", method, path, status, extra=facts)
