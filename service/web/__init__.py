"""The pages: server-rendered HTML over the same store as the API, at `/` and under `/ui`.

They ask nothing of other hosts: scripts and styles lie in `static/`, those from npm as `deploy/vendor.sh` fetched them.
"""

from fastapi import APIRouter
from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from service.web import devices, job, jobs, live, new_job, sign_in, sweeps, what_if
from service.web.render import STATIC

__all__ = ["routers", "statics"]


def routers() -> list[APIRouter]:
    rooms = sign_in, jobs, job, new_job, sweeps, devices, what_if, live
    return [room.router for room in rooms]


def statics() -> ASGIApp:
    """Scripts and styles, compressed; browsers ask each time whether theirs is still the newest."""
    return GZipMiddleware(StaticFiles(directory=STATIC), minimum_size=500)
