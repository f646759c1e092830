"""Devices: what jobs have measured of each, how that has changed, and who uses it."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from service.fleet import read_devices
from service.routes.plans import plans_of
from service.routes.world import ByCaller, InWorld
from service.schemas import Device
from service.web.errors import PageRoute
from service.web.render import page

WIDTH, HEIGHT, EDGE = 140.0, 32.0, 3.0  # of a sparkline, and what is left free around it

router = APIRouter(route_class=PageRoute)


@router.get("/ui/devices")
def devices(request: Request, world: InWorld, caller: ByCaller) -> Response:
    """Every measured device, the links between them, and the caller's jobs that use them."""
    found = read_devices(world.settings.devices_file, plans_of(world, caller))
    users = {job_id for device in found.data for job_id in device.used_by}
    names = {job_id: world.store.jobs.get(job_id, owner=caller.reach) for job_id in sorted(users)}
    return page(
        request,
        "devices.html",
        devices=found.data,
        note=found.note,
        jobs=names,
        linked=[device for device in found.data if device.links or any(device.id in d.links for d in found.data)],
        line=line,
        drift=drift,
        size=(WIDTH, HEIGHT),
    )


def line(history: Sequence[tuple[float, int]]) -> str:
    """A history as the points of an SVG polyline, over time; the foot of the picture is no rate at all."""
    first, last = history[0][0], history[-1][0]
    highest, span = max(rate for _, rate in history), max(last - first, 1e-9)
    points = [
        (EDGE + (WIDTH - 2 * EDGE) * (at - first) / span, HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * rate / highest)
        for at, rate in history
    ]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def drift(device: Device) -> float | None:
    """By what share of its usual rate, the median of its history, the newest lies above or below it."""
    rates = sorted(rate for _, rate in device.history)
    if len(rates) < 2:
        return None
    return device.history[-1][1] / rates[len(rates) // 2] - 1
