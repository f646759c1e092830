"""The devices that jobs have measured, and the planner's question about them or about an invented fleet.

The scheduler actor keeps its book of devices as a file; it is read anew for every request, so that the API needs
neither Ray nor a running cluster to know them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scheduler.book import book_ids, read_book
from scheduler.devices import DeviceRecord
from service.errors import ConflictError
from service.schemas import Device, DeviceList, PreviewBody
from workers.precision import step_shape
from workers.shapes import Entry, resized, shape_of, trained

STALE_S = 6 * 3600  # other jobs, heat and drivers change a device within hours


def read_devices(path: Path, plans: Mapping[str, dict[str, Any]]) -> DeviceList:
    """The devices of the book; `plans` are those of the jobs that hold the cluster."""
    users = _users(plans)
    now = time.time()
    data = [_device(record, users.get(record.id, []), now) for record in read_book(path)]
    return DeviceList(data=data, note=None if data else _why_none(path))


def read_live(path: Path) -> tuple[list[DeviceRecord], list[str]]:
    """The records to plan with, and what to be wary of. Raises ConflictError where nothing has been measured."""
    records = list(read_book(path))
    if not records:
        remedy = "Run a job first, or invent a fleet: 'devices': ['2x fast:24GB']."
        raise ConflictError(_why_none(path), code="no_devices", param="devices", remedy=remedy)
    now = time.time()
    ages = {record.id: now - record.measured_at for record in records}
    old = [f"{name} was measured {age / 3600:.0f} h ago" for name, age in ages.items() if age > STALE_S]
    return records, ["; ".join(old) + ": it may be another device by now."] if old else []


def question(body: PreviewBody, entry: Entry, live: Sequence[DeviceRecord]) -> dict[str, Any]:
    """What `scheduler.whatif` is asked. Raises UserError where the model cannot be built so."""
    shape = trained(shape_of(resized(entry, body.model_args, body.img_size), body.num_classes), body.method)
    method, trains_embedding = body.method.to_plan(), body.train_embed and not body.method.freezes_embedding
    precision = body.precision
    step = asdict(step_shape(body.micro_batches, body.micro_batch_size, precision, bf16=precision.compute == "bf16"))
    if precision.compute == "auto":
        del step["compute_itemsize"]  # the devices', which the planner knows
    fleet: dict[str, Any] = {"records": [{**record.to_dict(), "history": ()} for record in live]}
    if body.devices != "live":
        fleet = {"devices": [_spec(device) for device in body.devices]}
    link = body.link if body.link is None or isinstance(body.link, str) else body.link.model_dump()
    return {
        "shape": asdict(shape),
        "step": step,
        "plan": {**method, "placement": body.placement, "embed_grad": trains_embedding, "seed": body.seed},
        **fleet,
        "link": link,
        "links": [pair.model_dump() for pair in body.links],
        "gantt": body.gantt,
    }


def _why_none(path: Path) -> str:
    if path.exists():
        return f"The device book {path} cannot be read; the next job that starts begins a new one."
    return "No device has been measured yet: the first job's workers measure theirs when it starts."


def _spec(device: Any) -> Any:
    """A device as the planner reads it: a rate is a kind there."""
    if isinstance(device, str):
        return device
    kind = device.kind or f"{device.tflops:.12g}TFLOPS"
    return {"kind": kind, **device.model_dump(exclude={"kind", "tflops"})}


def _users(plans: Mapping[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Device → the jobs that use it: a job's plan says by `devices` which one each rank has."""
    users: dict[str, list[str]] = {}
    for job_id, plan in plans.items():
        told = plan.get("devices")
        named = [str(each.get("name")) for each in told if isinstance(each, dict)] if isinstance(told, list) else []
        for device_id in book_ids(named):
            users.setdefault(device_id, []).append(job_id)
    return users


def _device(record: DeviceRecord, users: list[str], now: float) -> Device:
    told = record.to_dict()
    age_s = max(0.0, now - record.measured_at) if record.measured_at else None
    return Device(
        **{name: told[name] for name in ("id", "node", "device", "call_us", "memory_bytes", "links", "facts")},
        rates={name: value for name, value in told.items() if name.endswith("_per_s")},
        measured_at=record.measured_at,
        age_s=None if age_s is None else round(age_s, 1),
        samples=record.samples,
        history=list(record.history),
        stale=age_s is None or age_s > STALE_S,
        used_by=users,
    )
