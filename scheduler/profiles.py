"""Live profiles: what the steps of a window took, folded into what a worker measured of itself before.

    executor ── times every instruction ──► Observations ── fold ──► DeviceProfile ──► next window's plan

A figure moves by a share of log(seen / believed). Of a handful of samples the share is small, of a window's hundreds
it is nearly one, so a device that has slowed to half shows in one window. Once a profile is settled, deviations as
small as the noise of a busy machine count for little each time: plans should not twitch.

What a window did not run moves with what it did: other head counts of a curve with their neighbours, other curves and
figures with the worker as a whole. Links stay as they were measured: a message's time is mostly waiting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, NoReturn

import numpy as np

from scheduler.domain import SUBLAYERS, DeviceProfile, ModelShape, StepShape
from scheduler.errors import SystemFault
from scheduler.program import Program

Key = tuple[str, str, int, int]

PRIOR_SAMPLES = 2  # what was believed before counts like so many samples
SETTLED_SAMPLES = 200  # a profile that rests on fewer is a first guess
QUIET, LOUD = 0.25, math.log(1.3)  # share of a deviation near nothing; deviation that counts in full
MAX_DROPPED = 0.2  # where more are far from the median they are no outliers but part of what it takes
READ_QUANTILE = 0.1  # of receives: the rest of their time is waiting
STALE_S = 3600.0  # a worker measures itself minutes before it announces
MOST_FLOPS_PER_S, MOST_US = 2e16, 300_000_000  # no head is computed faster, or slower and still worth waiting for
STEP_END = ("tally", "step")
FIGURES = (
    *("embed_us", "classify_us", "sum_us", "update_us"),
    *("send_us", "recv_us", "trunk_us", "end_us"),
)
RESIDUALS = ("x", "g", "part", "gpart")
CURVES = tuple(f"{part}_{way}_us" for part in SUBLAYERS for way in ("forward", "backward"))


def timing_keys(program: Program) -> list[Key]:
    """What each instruction is timed under: (kind, part or cargo, n, m).

    n and m are FULL and FORWARD heads of `fwd` and `bwd`; else n counts parts added (`sum`), trunk units (messages of
    gradients), or heads that were trained (`step` and `tally`, the first send of one, for which it is counted).
    """
    trained = len({(i.block, h) for i in program.instructions if i.kind == "bwd" for h in i.full})
    keys: list[Key] = []
    tallied = False
    for i in program.instructions:
        if i.kind in ("fwd", "bwd"):
            keys.append((i.kind, i.part, len(i.full), len(i.only)))
        elif i.kind == "sum":
            keys.append((i.kind, i.cargo, len(i.units) or len(i.of), 0))
        elif i.kind == "step":
            keys.append((i.kind, "", trained, 0))
        elif i.kind == "send" and i.cargo == "tally" and not tallied:
            keys.append(("tally", "", trained, 0))
            tallied = True
        else:
            keys.append((i.kind, i.cargo, len(i.units), 0))
    return keys


@dataclass
class Observations:
    """How long instructions took on one worker in one window, under their `timing_keys`: in µs, one number per step.

    That is the mean over the step, so that what stops a worker now and then in every step counts, and what stopped it
    in one step only is an outlier; of receives it is a low quantile, since the rest of their time is waiting. `counts`
    says how many instructions there were.
    """

    times_us: dict[Key, list[float]] = field(default_factory=dict)
    counts: dict[Key, int] = field(default_factory=dict)

    def add(self, timings_us: Mapping[Key, Sequence[float]]) -> None:
        """Take in one step; what is no time is left out."""
        for key, values in timings_us.items():
            times = [min(t, MOST_US) for t in values if math.isfinite(t) and t > 0]
            if times:
                took = np.quantile(times, READ_QUANTILE) if key[0] == "recv" else np.mean(times)
                self.times_us.setdefault(key, []).append(max(0.1, round(float(took), 1)))
                self.counts[key] = self.counts.get(key, 0) + len(times)

    def to_dict(self) -> dict[str, Any]:
        return {"times": [[*key, self.counts[key], times] for key, times in self.times_us.items()]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Observations:
        found = cls()
        for kind, cargo, n, m, count, times in data["times"]:
            found.times_us[kind, cargo, n, m], found.counts[kind, cargo, n, m] = list(times), count
        return found


def fold(profile: DeviceProfile, observed: Observations, now: float) -> DeviceProfile:
    """The profile as the window shows it; the same one where nothing was observed."""
    seen = {key: _typical(times, observed.counts[key]) for key, times in observed.times_us.items()}
    if not seen:
        return profile
    curves = {name: _points(getattr(profile, name), name, seen) for name in CURVES}
    settled = profile.samples >= SETTLED_SAMPLES
    moves = {name: _moves(getattr(profile, name), points, settled) for name, points in curves.items()}
    overall = _overall(curves, moves)
    end, update = _step_end(profile, seen)
    send = _pooled(seen, lambda kind, cargo: kind == "send" and cargo in RESIDUALS)
    figures = {
        "embed_us": _embed(seen),
        "classify_us": _pooled(seen, lambda kind, _: kind == "classify"),
        "sum_us": _pooled(seen, lambda kind, cargo: kind == "sum" and cargo in ("x", "g"), per_unit=True),
        "send_us": send,
        "recv_us": _read(profile, seen, send),
        "trunk_us": _pooled(seen, _handles_gradients, per_unit=True),
        "update_us": update,
        "end_us": end,
    }
    news: dict[str, Any] = {
        **{name: _moved_curve(getattr(profile, name), curves[name], moves[name], overall) for name in CURVES},
        **{name: _moved(getattr(profile, name), found, overall, settled) for name, found in figures.items()},
    }
    return replace(
        profile,
        **news,
        samples=profile.samples + sum(found.samples for (kind, *_), found in seen.items() if kind in ("fwd", "bwd")),
        measured_at=now,
    )


def read_profile(data: Mapping[str, Any], rank: int) -> DeviceProfile:
    """A profile from its JSON; an error names the field that is missing."""
    for f in fields(DeviceProfile):
        if f.default is MISSING and f.default_factory is MISSING and data.get(f.name) is None:
            raise SystemFault(
                f"Worker {rank} ({data.get('device', 'unknown device')}) sent a profile without {f.name}.",
                code="bad_profile",
                param=f"profile.{f.name}",
                remedy="Run the same version of d2ft on every worker.",
            )
    return DeviceProfile.from_dict(dict(data))


def check_profile(
    profile: DeviceProfile, shape: ModelShape, step: StepShape, *, num_workers: int, now: float | None = None
) -> None:
    """Raise a SystemFault that names rank, device and field of the first figure that no plan can rest on.

    With `now` a profile that was measured more than STALE_S before is refused too; one measured at 0 has no age.
    """
    flops = min(shape.head_forward_flops(h, step.micro_batch_size) for h in range(shape.num_heads))
    for name in CURVES:
        curve = getattr(profile, name)
        if len(curve) != shape.num_heads + 1:
            _refuse(profile, name, f"has {len(curve)} entries for {shape.num_heads} heads")
        for count, us in enumerate(curve[1:], 1):
            _check_number(profile, f"{name}[{count}]", us, 1, MOST_US)
        if curve[0] != 0 or list(curve) != sorted(curve):
            _refuse(profile, name, "falls as more heads run together")
    head_us = sum(getattr(profile, name)[1] for name in CURVES if "forward" in name)
    if flops / head_us * 1e6 > MOST_FLOPS_PER_S:
        _refuse(
            profile, "attn_forward_us[1]", f"says a head of {flops:.3g} FLOP takes {head_us} µs: no device can do that"
        )
    for name in FIGURES:
        _check_number(profile, name, getattr(profile, name), 0, MOST_US)
    _check_number(profile, "free_bytes", profile.free_bytes, 1, 1 << 60)
    _check_number(profile, "base_bytes", profile.base_bytes, 0, 1 << 60)
    _check_number(profile, "limit_bytes", profile.limit_bytes, 0, 1 << 60)
    if len(profile.links) != num_workers:
        _refuse(profile, "links", f"has {len(profile.links)} entries for {num_workers} workers")
    for peer, link in enumerate(profile.links):
        if (link is None) != (peer == profile.rank):
            _refuse(profile, f"links[{peer}]", "is missing" if link is None else "leads to the worker itself")
        if link is not None:
            _check_number(profile, f"links[{peer}].latency_us", link.latency_us, 0, MOST_US)
            _check_number(profile, f"links[{peer}].bytes_per_s", link.bytes_per_s, 1, 1e15)
    if now is not None and profile.measured_at and now - profile.measured_at > STALE_S:
        _refuse(profile, "measured_at", f"is {(now - profile.measured_at) / 60:.0f} minutes ago")


def check_fleet(
    profiles: Sequence[DeviceProfile], shape: ModelShape, step: StepShape, *, now: float | None = None
) -> None:
    """Check every profile, and that they are those of ranks 0, 1, … in this order."""
    for rank, profile in enumerate(profiles):
        if profile.rank != rank:
            _refuse(profile, "rank", f"is {profile.rank} where {rank} is due")
        check_profile(profile, shape, step, num_workers=len(profiles), now=now)


def _check_number(profile: DeviceProfile, name: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _refuse(profile, name, f"is {value!r}, not a number")
    if not least <= value <= most:
        _refuse(profile, name, f"is {value}, not between {least:g} and {most:g}")


def _refuse(profile: DeviceProfile, name: str, what: str) -> NoReturn:
    raise SystemFault(
        f"Worker {profile.rank} ({profile.device} on {profile.node}) has an impossible profile: {name} {what}.",
        code="bad_profile",
        param=f"profile.{name}",
        remedy="Start the job again so that it is measured afresh; if it stays, take this device out of the cluster.",
    )


@dataclass(frozen=True)
class _Typical:
    """What something takes, from so many measurements."""

    us: float
    samples: int


def _typical(times_us: Sequence[float], count: int) -> _Typical:
    """The mean over the steps without outliers: it, not the median, adds up to what steps take."""
    times = np.asarray(times_us, dtype=np.float64)
    middle = float(np.median(times))
    spread = max(float(np.median(np.abs(times - middle))), 0.02 * middle)
    near = times[np.abs(times - middle) <= 6 * spread]
    if len(near) < (1 - MAX_DROPPED) * len(times):
        near = times
    return _Typical(float(near.mean()), count)


def _share(shift: float, samples: int, settled: bool) -> float:
    """How much of a deviation is believed."""
    trust = samples / (samples + PRIOR_SAMPLES)
    return trust * (QUIET + (1 - QUIET) * min(1.0, (shift / LOUD) ** 2)) if settled else trust


def _moved(old_us: int, found: _Typical | None, overall: float, settled: bool) -> int:
    """A single figure after the window; one that was not observed moves with the worker."""
    if found is None:
        return _whole(old_us * math.exp(overall)) if old_us else 0
    if not old_us:
        return _whole(found.us)
    shift = math.log(found.us / old_us)
    return _whole(old_us * math.exp(shift * _share(shift, found.samples, settled)))


def _points(curve_us: Sequence[int], name: str, seen: Mapping[Key, _Typical]) -> dict[int, _Typical]:
    """What was observed of a curve, by head count. A call with FULL and FORWARD heads is split as the curve has it."""
    part, kind = name.split("_")[0], "fwd" if "forward" in name else "bwd"
    found: dict[int, list[_Typical]] = {}
    for (seen_kind, seen_part, num_full, num_only), typical in seen.items():
        if (seen_kind, seen_part) != (kind, part):
            continue
        counts = [n for n in (num_full, num_only) if 0 < n < len(curve_us)]
        modelled = sum(curve_us[n] for n in counts)
        for n in counts:
            found.setdefault(n, []).append(_Typical(typical.us * curve_us[n] / modelled, typical.samples))
    return {n: _mean(typicals) for n, typicals in sorted(found.items())}


def _moves(curve_us: Sequence[int], points: Mapping[int, _Typical], settled: bool) -> dict[int, float]:
    """By what (a logarithm) the observed points of a curve move, by head count.

    More heads take no less time, so points that were seen out of order meet. They keep meeting in the same place: what
    others follow is how a point moves, not how far off it was seen, which would add up window by window.
    """
    believed = [curve_us[n] * math.exp(_believed(curve_us[n], seen, settled)) for n, seen in points.items()]
    met = _rising(believed, [seen.samples for seen in points.values()])
    return {n: math.log(us / curve_us[n]) for n, us in zip(points, met, strict=True)}


def _moved_curve(
    curve_us: tuple[int, ...], points: Mapping[int, _Typical], moves: Mapping[int, float], overall: float
) -> tuple[int, ...]:
    """Head counts that did not run move with their neighbours; without any, with the worker."""
    counts = np.arange(1, len(curve_us))
    shifts = np.interp(counts, list(moves), list(moves.values())) if moves else np.full(len(counts), overall)
    weights = [points[n].samples if n in points else 0.1 for n in counts.tolist()]
    return (0, *map(_whole, _rising(np.asarray(curve_us[1:]) * np.exp(shifts), weights)))


def _believed(old_us: int, seen: _Typical, settled: bool) -> float:
    shift = math.log(seen.us / old_us)
    return shift * _share(shift, seen.samples, settled)


def _overall(curves: Mapping[str, Mapping[int, _Typical]], moves: Mapping[str, Mapping[int, float]]) -> float:
    """The worker's move as a whole: the mean over its curves' observed points, weighted by the time they took."""
    weights = [seen.us * seen.samples for points in curves.values() for seen in points.values()]
    shifts = [shift for of_curve in moves.values() for shift in of_curve.values()]
    return float(np.average(shifts, weights=weights)) if shifts else 0.0


def _rising(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls: neighbours that are out of order become their weighted mean."""
    pools: list[list[float]] = []  # [value, weight, length]
    for value, weight in zip(values, weights, strict=True):
        pools.append([float(value), weight, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            later, earlier = pools.pop(), pools.pop()
            total = earlier[1] + later[1]
            mean = (earlier[0] * earlier[1] + later[0] * later[1]) / total
            pools.append([mean, total, earlier[2] + later[2]])
    return [value for value, _, length in pools for _ in range(int(length))]


def _pooled(
    seen: Mapping[Key, _Typical], wanted: Callable[[str, str], bool], *, per_unit: bool = False
) -> _Typical | None:
    """The mean over all keys whose kind and cargo are wanted, divided by what they count if `per_unit`."""
    found = [
        _Typical(typical.us / (key[2] if per_unit and key[2] else 1), typical.samples)
        for key, typical in seen.items()
        if wanted(key[0], key[1])
    ]
    return _mean(found) if found else None


def _mean(typicals: Sequence[_Typical]) -> _Typical:
    samples = sum(typical.samples for typical in typicals)
    return _Typical(sum(typical.us * typical.samples for typical in typicals) / samples, samples)


def _handles_gradients(kind: str, cargo: str) -> bool:
    """Whether an instruction packs, adds or unpacks gradients of trunk units; taking in a part of them does neither."""
    return cargo in ("gradpart", "grads") and (kind, cargo) != ("recv", "gradpart")


def _embed(seen: Mapping[Key, _Typical]) -> _Typical | None:
    """Both directions of the embedding; one that was not observed takes as long as the other."""
    ends = [seen[key] for kind in ("embed", "unembed") if (key := (kind, "", 0, 0)) in seen]
    return _Typical(2 * sum(end.us for end in ends) / len(ends), min(end.samples for end in ends)) if ends else None


def _read(profile: DeviceProfile, seen: Mapping[Key, _Typical], send: _Typical | None) -> _Typical | None:
    """Taking an arrived message out. Waiting cannot be told from it, so no more is believed than a send takes."""
    found = _pooled(seen, lambda kind, cargo: kind == "recv" and cargo in RESIDUALS)
    most = max(send.us if send else 0, profile.send_us, profile.recv_us, 1)
    return found and _Typical(min(found.us, most), found.samples)


def _step_end(profile: DeviceProfile, seen: Mapping[Key, _Typical]) -> tuple[_Typical | None, _Typical | None]:
    """(`end_us`, `update_us`) by the tally, clipping and update observed, in the proportion that they had."""
    found = [(key[2], typical) for key, typical in seen.items() if key[0] in STEP_END]
    if not found:
        return None, None
    counts = [typical.samples for _, typical in found]
    steps = max(sum(t.samples for key, t in seen.items() if key[0] == "step"), 1)
    took_us = sum(typical.us * typical.samples for _, typical in found) / steps
    trained = float(np.average([n for n, _ in found], weights=counts))
    modelled_us = profile.end_us + profile.update_us * trained
    if not modelled_us:
        return _Typical(took_us, steps), None
    ratio = took_us / modelled_us
    ends = [_Typical(old_us * ratio, steps) if old_us else None for old_us in (profile.end_us, profile.update_us)]
    return ends[0], ends[1]


def _whole(us: float) -> int:
    return max(1, round(us))
