"""The API process: `create_app(settings)` builds the world, `python -m service.app` serves it.

No HTML documentation pages: those of FastAPI load scripts from a public network. `/openapi.json` is there, behind the
key.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx2
import uvicorn
from fastapi import FastAPI

from service import problems
from service.auth import Door
from service.catalogue import Catalogue
from service.home import ensure_key, ensure_master_secret, make_home, read_secret
from service.outbound import Outbound
from service.planners import Planners
from service.ray_jobs import RayJobs
from service.routes import World, routers
from service.settings import Settings
from service.standing import Standings
from service.store import Store
from service.streams import Room, Streams
from service.supervisor import Supervisor
from service.thumbnails import Thumbnails
from service.webhooks import Sender, Signer

GRACE_S = 3
NO_RAY = "http://127.0.0.1:9"  # the discard port: nothing answers, and jobs stay queued


def create_app(
    settings: Settings, *, ray_transport: httpx2.AsyncBaseTransport | None = None, supervise: bool = True
) -> FastAPI:
    """The whole service over one home. `ray_transport` and `supervise` let tests stand in for Ray or leave it out."""
    make_home(settings.home)
    store = Store(settings.store_url, max_queued=settings.max_queued, max_running_each=settings.max_running_each)
    store.access.ensure(ensure_key(settings.home), "first")
    streams = Streams(store, Room(settings.max_streams, settings.max_streams_each))
    store.on_change(streams.ring)
    ray = RayJobs(settings.ray_address or NO_RAY, read_secret(settings.token_file), ray_transport)
    standings = Standings(store, settings.max_running)
    children = Catalogue(settings), Planners(settings), Thumbnails(settings)
    hooks = Signer(ensure_master_secret(settings.home)), Outbound(settings.webhook_networks)
    world = World(settings, store, streams, standings, ray, *children, *hooks)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        streams.attach()
        world.catalogue.start()
        loops = [Supervisor(settings, store, ray).run()] if supervise else []
        loops += [Sender(store, *hooks).run()] if settings.webhooks else []
        running = [asyncio.create_task(loop) for loop in loops]
        yield
        for task in running:
            task.cancel()
        for task in running:
            with suppress(asyncio.CancelledError):
                await task
        world.outbound.close()
        await world.planners.close()
        await world.catalogue.close()
        await ray.close()
        store.close()

    app = FastAPI(
        title="d2ft", version="1", lifespan=lifespan, docs_url=None, redoc_url=None, swagger_ui_oauth2_redirect_url=None
    )
    app.state.world = world
    for router, prefix, in_schema in routers():
        app.include_router(router, prefix=prefix, include_in_schema=in_schema)
    app.add_middleware(Door, settings=settings, store=store)
    problems.install(app)
    return app


def uvicorn_options(settings: Settings) -> dict[str, Any]:
    """How the server runs: no header says what it is, and open streams do not hold up its end."""
    return {
        "host": settings.host,
        "port": settings.port,
        "server_header": False,
        "timeout_graceful_shutdown": GRACE_S,
        "log_level": "info",
        "access_log": False,
    }


def main() -> None:
    """Serve with the settings of the environment."""
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    settings = Settings()
    uvicorn.run(create_app(settings), **uvicorn_options(settings))


if __name__ == "__main__":
    main()
