"""Device records: what is known of a device whatever the job, so that plans can be made before anybody measures.

A profile holds µs on one job's subnet shapes; a record holds the rates behind them:

    k heads of a part, forward     call + k · FLOPs / forward rate
    k heads of a part, backward    2 · call + k · 2 · FLOPs / backward rate; with `recompute` a forward pass more
    attention                      its FLOPs take `attn_slowdown` times as long as the MLP's
    residual update                bytes of the residual stream in memory / its rate
    send, recv                     bytes of the residual stream on the wire / their rates

`record_of` fits these rates to a measured profile, `profiles_of` turns records into the profiles of another job.
Curves that are not straight lines come back as the nearest straight ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from scheduler.cost import residual_bytes, stream_bytes
from scheduler.domain import DeviceProfile, FloatArray, LinkProfile, ModelShape, StepShape
from scheduler.errors import UserError

NODE_LINK = LinkProfile(10, 10_000_000_000)  # two devices of one machine
NETWORK_LINK = LinkProfile(100, 1_250_000_000)  # 10 Gbit/s
BACKWARD_WORK = 2  # FLOPs and calls of a backward pass, in forward passes
MOST_PER_S = 10**18  # no device computes or moves more
MOST_US = 10**9
MOST_BYTES = 1 << 50
NOISE = 0.01  # of a curve, relative: timings of one piece repeat to about a percent
RATES = ("forward_flops_per_s", "backward_flops_per_s", "trunk_flops_per_s", "sum_bytes_per_s", "update_params_per_s")


@dataclass(frozen=True)
class DeviceRecord:
    """Rates and sizes of one device; `links` by the peer's id.

    `call_us` is the fixed time of one part's forward pass. `trunk_flops_per_s` is for the embedding and the classifier,
    `update_params_per_s` for the optimiser. `history` has what the training rate was: (when measured, FLOPs/s), oldest
    first, kept by the device book. `send_bytes_per_s`/`recv_bytes_per_s` say how fast the transport takes and
    hands out messages while the worker waits (0: in no time); `unit_us` is the time to pack or add one trunk unit's
    gradients, `end_us` that of a step's end whatever was trained. `samples` counts the measurements behind the rates;
    an invented device has none and was measured at 0.
    """

    id: str
    node: str
    device: str
    call_us: int
    forward_flops_per_s: int
    backward_flops_per_s: int
    sum_bytes_per_s: int
    memory_bytes: int
    trunk_flops_per_s: int
    update_params_per_s: int
    send_bytes_per_s: int = 0
    recv_bytes_per_s: int = 0
    unit_us: int = 0
    end_us: int = 0
    attn_slowdown: float = 1.0
    links: Mapping[str, LinkProfile] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    measured_at: float = 0.0
    samples: int = 0
    history: tuple[tuple[float, int], ...] = ()

    @property
    def training_flops_per_s(self) -> int:
        """The rate at which one forward and its backward pass run, their fixed times apart."""
        seconds_per_flop = 1 / self.forward_flops_per_s + BACKWARD_WORK / self.backward_flops_per_s
        return round((1 + BACKWARD_WORK) / seconds_per_flop)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(replace(self, links=dict(self.links)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], param: str = "records") -> DeviceRecord:
        """Inverse of `to_dict`; a UserError names the field below `param` that is missing or absurd."""
        for f in fields(cls):
            if f.name not in data and f.default is MISSING and f.default_factory is MISSING:
                raise _bad(f"{param}.{f.name}", "is missing")
        if unknown := sorted(set(data) - {f.name for f in fields(cls)}):
            raise _bad(f"{param}.{unknown[0]}", "is no field of a device record")
        links = {peer: link_of(link, f"{param}.links.{peer}") for peer, link in dict(data.get("links") or {}).items()}
        history = _history(data.get("history") or (), f"{param}.history")
        record = cls(**{**data, "links": links, "history": history})
        check_record(record, param)
        return record


def check_record(record: DeviceRecord, param: str = "records") -> None:
    """Raise a UserError that names the first field that no device can have."""
    for name in ("id", "node", "device"):
        if not isinstance(getattr(record, name), str) or not getattr(record, name):
            raise _bad(f"{param}.{name}", "must be a name")
    for name in RATES:
        checked_number(getattr(record, name), f"{param}.{name}", 1, MOST_PER_S)
    for name in ("send_bytes_per_s", "recv_bytes_per_s"):
        checked_number(getattr(record, name), f"{param}.{name}", 0, MOST_PER_S)
    for name in ("call_us", "unit_us", "end_us"):
        checked_number(getattr(record, name), f"{param}.{name}", 0, MOST_US)
    checked_number(record.memory_bytes, f"{param}.memory_bytes", 1, MOST_BYTES)
    checked_number(record.attn_slowdown, f"{param}.attn_slowdown", 0.001, 1000)


def _history(points: Any, param: str) -> tuple[tuple[float, int], ...]:
    """Points from their JSON; a UserError names the one that is none."""
    if not isinstance(points, list | tuple):
        raise _bad(param, "is no list of points")
    found = []
    for i, point in enumerate(points):
        if not isinstance(point, list | tuple) or len(point) != 2:
            raise _bad(f"{param}.{i}", "is no point: a time and a rate")
        at = checked_number(point[0], f"{param}.{i}.0", 0, MOST_PER_S)
        found.append((float(at), round(checked_number(point[1], f"{param}.{i}.1", 1, MOST_PER_S))))
    return tuple(found)


def link_of(data: Mapping[str, Any], param: str) -> LinkProfile:
    """A link from its JSON; a UserError names the field below `param` that is missing or absurd."""
    latency = checked_number(data.get("latency_us"), f"{param}.latency_us", 0, MOST_US)
    rate = checked_number(data.get("bytes_per_s"), f"{param}.bytes_per_s", 1, MOST_PER_S)
    return LinkProfile(round(latency), round(rate))


def checked_number(value: Any, param: str, least: float, most: float) -> float:
    """The number, if it is one between the ends; else a UserError that names `param`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _bad(param, f"must be a number, not {value!r}")
    if not least <= value <= most:
        raise _bad(param, f"is {value}, not between {least:g} and {most:g}")
    return value


def record_of(profile: DeviceProfile, shape: ModelShape, step: StepShape, peers: Sequence[str]) -> DeviceRecord:
    """The rates behind a measured profile; `peers[v]` is the id of worker v, `profile.links` are kept under them."""
    call_us, slope_us, slowdown = _fit(profile, shape, step)
    ends_us = max(1, profile.embed_us + profile.classify_us)
    moved = residual_bytes(shape, step)
    return DeviceRecord(
        id=profile.device_id or peers[profile.rank],
        node=profile.node,
        device=profile.device,
        call_us=round(call_us),
        forward_flops_per_s=_rate(1, slope_us[0]),
        backward_flops_per_s=_rate(1, slope_us[1]),
        sum_bytes_per_s=_rate(stream_bytes(shape, step), profile.sum_us),
        memory_bytes=profile.free_bytes,
        trunk_flops_per_s=_rate(shape.trunk_flops(step.micro_batch_size), ends_us),
        update_params_per_s=_rate(max(shape.updated_head_params), profile.update_us),
        send_bytes_per_s=_rate(moved, profile.send_us) if profile.send_us else 0,
        recv_bytes_per_s=_rate(moved, profile.recv_us) if profile.recv_us else 0,
        unit_us=profile.trunk_us,
        end_us=profile.end_us,
        attn_slowdown=slowdown,
        links={peers[v]: link for v, link in enumerate(profile.links) if link is not None},
        facts=dict(profile.facts),
        measured_at=profile.measured_at,
        samples=profile.samples,
    )


def profiles_of(
    records: Sequence[DeviceRecord], shape: ModelShape, step: StepShape, default_link: LinkProfile | None = None
) -> tuple[DeviceProfile, ...]:
    """What each device would measure on this job's shapes; rank i is records[i].

    A link that no record knows is NODE_LINK inside a node and `default_link`, or else NETWORK_LINK, between nodes.
    """
    return tuple(_profile(rank, records, shape, step, default_link or NETWORK_LINK) for rank in range(len(records)))


def part_flops(shape: ModelShape, step: StepShape) -> dict[str, int]:
    """FLOPs of the widest head's share of each sub-layer, in one forward pass over a micro-batch."""
    widest = max(range(shape.num_heads), key=lambda h: shape.mlp_dims[h])
    mlp = 4 * step.micro_batch_size * shape.num_tokens * shape.dim * shape.mlp_dims[widest]
    return {"attn": shape.head_forward_flops(widest, step.micro_batch_size) - mlp, "mlp": mlp}


def _profile(
    rank: int, records: Sequence[DeviceRecord], shape: ModelShape, step: StepShape, between: LinkProfile
) -> DeviceProfile:
    record, moved = records[rank], residual_bytes(shape, step)
    flops, heads = part_flops(shape, step), np.arange(1, shape.num_heads + 1)

    def pass_us(part: str, rate: int) -> FloatArray:
        slower = record.attn_slowdown if part == "attn" else 1.0
        return np.asarray(record.call_us + heads * (1e6 * flops[part] * slower / rate), dtype=np.float64)

    def forward(part: str) -> tuple[int, ...]:
        return _curve(pass_us(part, record.forward_flops_per_s))

    def backward(part: str) -> tuple[int, ...]:
        again = step.recompute * pass_us(part, record.forward_flops_per_s)
        return _curve(BACKWARD_WORK * pass_us(part, record.backward_flops_per_s) + again)

    ends_us = _us(shape.trunk_flops(step.micro_batch_size), record.trunk_flops_per_s)
    embed_share = _embed_share(shape)
    return DeviceProfile(
        rank=rank,
        node=record.node,
        device=record.device,
        attn_forward_us=forward("attn"),
        attn_backward_us=backward("attn"),
        mlp_forward_us=forward("mlp"),
        mlp_backward_us=backward("mlp"),
        embed_us=max(1, round(embed_share * ends_us)),
        classify_us=max(1, round((1 - embed_share) * ends_us)),
        sum_us=_us(stream_bytes(shape, step), record.sum_bytes_per_s),
        update_us=_us(max(shape.updated_head_params), record.update_params_per_s),
        free_bytes=record.memory_bytes,
        links=tuple(_link(record, peer, between) for peer in records),
        measured_at=record.measured_at,
        send_us=_us(moved, record.send_bytes_per_s) if record.send_bytes_per_s else 0,
        recv_us=_us(moved, record.recv_bytes_per_s) if record.recv_bytes_per_s else 0,
        trunk_us=record.unit_us,
        end_us=record.end_us,
        device_id=record.id,
        facts=record.facts,
        samples=record.samples,
    )


def _curve(us: FloatArray) -> tuple[int, ...]:
    return (0, *(max(1, round(float(t))) for t in us))


def _link(record: DeviceRecord, peer: DeviceRecord, between: LinkProfile) -> LinkProfile | None:
    if record.id == peer.id:
        return None
    known = record.links.get(peer.id) or peer.links.get(record.id)
    return known or (NODE_LINK if record.node == peer.node else between)


def _embed_share(shape: ModelShape) -> float:
    """The embedding's part of the trunk's FLOPs."""
    embed = 4 * shape.num_tokens * shape.patch_dim
    return embed / (embed + 6 * shape.num_classes)


def _fit(profile: DeviceProfile, shape: ModelShape, step: StepShape) -> tuple[float, tuple[float, float], float]:
    """(call µs, µs per FLOP of the MLP forward and backward, attention's slowdown) that fit the four curves best.

    Least squares of relative errors with one slope per curve; the fixed time cannot be negative. The slowdown is the
    mean of what the forward and the backward curves say of it, each by how exactly it is known in whole µs.
    """
    flops = part_flops(shape, step)
    curves = [
        (profile.attn_forward_us, flops["attn"], 1),
        (profile.mlp_forward_us, flops["mlp"], 1),
        (profile.attn_backward_us, flops["attn"], BACKWARD_WORK),
        (profile.mlp_backward_us, flops["mlp"], BACKWARD_WORK),
    ]
    rows, wanted = [], []
    for column, (curve_us, head_flops, passes) in enumerate(curves):
        for heads, us in enumerate(curve_us):
            if heads:
                row = np.zeros(1 + len(curves))
                row[0], row[1 + column] = passes / us, heads * head_flops * passes / us
                if step.recompute and passes == BACKWARD_WORK:
                    row[0], row[column - 1] = row[0] + 1 / us, heads * head_flops / us  # at the forward pass's slope
                rows.append(row)
                wanted.append(1.0)
    scale = np.array([1.0, *(1.0 / f for _, f, _ in curves)])  # µs per call and per head: numbers of one size
    matrix, target = np.array(rows) * scale, np.array(wanted)
    solution = np.linalg.lstsq(matrix, target, rcond=None)[0]
    if solution[0] < 0 or shape.num_heads == 1:
        solution = np.array([0.0, *np.linalg.lstsq(matrix[:, 1:], target, rcond=None)[0]])
    call_us, *slopes = solution * scale
    slopes = [max(slope, 1e6 / MOST_PER_S) for slope in slopes]
    by_forward, by_backward = math.log(slopes[0] / slopes[1]), math.log(slopes[2] / slopes[3])
    doubts = [_doubt(curves[i][0][-1], curves[i + 1][0][-1]) for i in (0, 2)]
    slowdown = math.exp((by_forward * doubts[1] + by_backward * doubts[0]) / sum(doubts))
    slowdown = min(max(slowdown, 0.001), 1000.0)
    return float(call_us), (slopes[1], slopes[3]), slowdown


def _doubt(*whole_us: int) -> float:
    """How far the ratio of curves with these ends may be off, as a relative variance: by noise, and by rounding."""
    return sum(NOISE**2 + (0.5 / us) ** 2 for us in whole_us)


def _rate(amount: float, us: float) -> int:
    return max(1, min(MOST_PER_S, round(1e6 * amount / us))) if us else MOST_PER_S


def _us(amount: float, rate: int) -> int:
    return max(1, round(1e6 * amount / rate))


def _bad(param: str, what: str) -> UserError:
    return UserError(f"{param} {what}.", code="bad_device", param=param, remedy="Correct this field of the device.")
