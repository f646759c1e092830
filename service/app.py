"""The API process: `create_app(settings)` builds the world, `python -m service.app` serves it.

No HTML documentation pages: those of FastAPI load scripts from a public network. `/openapi.json` is there, behind the
key.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import httpx2
import uvicorn
from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig

from scheduler.errors import UserError
from service import logs, problems
from service.auth import Door
from service.catalogue import Catalogue
from service.connections import impatient
from service.exposure import check_exposure
from service.home import ensure_key, ensure_master_secret, make_home, read_secret
from service.meters import Meters
from service.outbound import Outbound
from service.planners import Planners
from service.predictors import Predictors
from service.ray_jobs import RayJobs
from service.routes import World, routers
from service.routes.description import describe, name_of
from service.scrape import Scrape
from service.sessions import Sessions
from service.settings import Settings
from service.standing import Standings
from service.store import Store
from service.streams import Room, Streams
from service.supervisor import Supervisor
from service.telemetry import header_secrets, start_tracing
from service.thumbnails import Thumbnails
from service.watch import Watch, measure_lag
from service.web import routers as web_routers
from service.webhooks import Sender, Signer

GRACE_S = 3
# FastAPI's own would send what stands in URLs and in errors, secrets among it; `watch` makes the spans.
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
NO_RAY = "http://127.0.0.1:9"  # the discard port: nothing answers, and jobs stay queued


def create_app(
    settings: Settings, *, ray_transport: httpx2.AsyncBaseTransport | None = None, supervise: bool = True
) -> FastAPI:
    """The whole service over one home. `ray_transport` and `supervise` let tests stand in for Ray or leave it out."""
    make_home(settings.home)
    meters, tracing = Meters(), start_tracing()
    store = Store(
        settings.store_url,
        max_queued=settings.max_queued,
        max_running_each=settings.max_running_each,
        max_faults=settings.max_faults,
        meters=meters,
    )
    store.access.ensure(ensure_key(settings.home), "first")
    streams = Streams(store, Room(settings.max_streams, settings.max_streams_each))
    store.on_change(streams.ring)
    ray = RayJobs(settings.ray_address or NO_RAY, read_secret(settings.token_file), ray_transport, meters)
    standings = Standings(store, settings.max_running)
    planners = Planners(settings)
    scrape = Scrape(meters, store, streams.room, planners)
    children = Catalogue(settings), planners, scrape, Thumbnails(settings), Predictors(settings)
    secret = ensure_master_secret(settings.home)
    hooks, sessions = (Signer(secret), Outbound(settings.webhook_networks)), Sessions(secret)
    supervisor = Supervisor(settings, store, ray, meters, tracing)
    world = World(settings, store, streams, standings, ray, *children, *hooks, sessions, supervisor.nudge)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        streams.attach()
        world.catalogue.start()
        loops = [measure_lag(meters)]
        loops += [supervisor.run()] if supervise else []
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
        await world.predictors.close()
        await world.catalogue.close()
        await ray.close()
        store.close()
        await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="d2ft",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        generate_unique_id_function=name_of,
        redirect_slashes=False,  # behind a proxy with a certificate it would send clients, and their keys, to http
        telemetry=NO_TELEMETRY,
    )
    app.state.world = world
    for router, prefix, in_schema in routers():
        app.include_router(router, prefix=prefix, include_in_schema=in_schema)
    for pages in web_routers():
        app.include_router(pages, include_in_schema=False)
    app.add_middleware(Door, settings=settings, store=store, sessions=sessions)
    app.add_middleware(Watch, meters=meters, tracing=tracing)  # the one added last is the outermost
    problems.install(app)
    describe(app)
    return app


def uvicorn_options(settings: Settings) -> dict[str, Any]:
    """How the server runs: no header says what it is, and open streams do not hold up its end."""
    return {
        "host": settings.host,
        "port": settings.port,
        "server_header": False,
        "timeout_graceful_shutdown": GRACE_S,
        "log_config": None,  # its lines go where ours go
        "log_level": settings.log_level,
        "access_log": False,
        "ws": "none",
        "http": impatient(settings.body_timeout_s),
        "ssl_certfile": settings.tls_cert,
        "ssl_keyfile": settings.tls_key,
    }


def known_secrets(settings: Settings) -> list[str | None]:
    """What the log must never show, made where it is not there yet; keys that come later are known by their looks."""
    make_home(settings.home)
    ours = ensure_key(settings.home), ensure_master_secret(settings.home), read_secret(settings.token_file)
    return [*ours, urlsplit(settings.store_url).password, *header_secrets()]


def main() -> None:
    """Serve with the settings of the environment."""
    os.umask(0o077)
    settings = Settings()
    try:
        check_exposure(settings)
    except UserError as error:
        sys.exit(f"{error.message} {error.remedy}")
    logs.configure(settings.log_level, known_secrets(settings))
    uvicorn.run(create_app(settings), **uvicorn_options(settings))


if __name__ == "__main__":
    main()
