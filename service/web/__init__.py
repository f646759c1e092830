"""The pages: server-rendered HTML over the same store as the API, at `/` and under `/ui`.

They ask nothing of other hosts: scripts and styles lie in `static/`, those from npm as `deploy/vendor.sh` fetched them.
"""

from fastapi import APIRouter

from service.web import devices, job, jobs, live, new_job, sign_in, static_files, sweeps, what_if

__all__ = ["routers"]


def routers() -> list[APIRouter]:
    rooms = sign_in, jobs, job, new_job, sweeps, devices, what_if, live, static_files
    return [room.router for room in rooms]
