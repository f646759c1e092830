"""What-if: the plan that a job would get on an invented or recorded fleet, with the reasons. JSON in, JSON out.

    request   shape, step, plan, and devices or records; link, links, scores, gantt may be left out
    answer    plan, devices, heads, rounding_loss, gantt, seconds

Everything is as in `scheduler.plan`: the same placement, selection, programs and clock that a job's window runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import numpy as np

from scheduler import gantt
from scheduler.cost import Costs
from scheduler.devices import DeviceRecord, checked_number, link_of, profiles_of
from scheduler.domain import LinkProfile, ModelShape, Plan, Scores, StepShape
from scheduler.errors import D2ftError, UserError
from scheduler.explain import Explanation
from scheduler.fleets import MAX_DEVICES, DeviceSpec, computes_bf16, parse_device, parse_link, records_of, with_links
from scheduler.plan import make_plan
from scheduler.request import PlanRequest

KEYS = ("shape", "step", "plan", "devices", "records", "link", "links", "scores", "gantt")
MOST = {"num_blocks": 1000, "num_heads": 256, "num_micro_batches": 256, "micro_batch_size": 65536}
MOST |= dict.fromkeys(("wire_itemsize", "itemsize", "compute_itemsize"), 8)
SAMPLES = 2  # tables of the cycle that are simulated
MOST_SIZE = 10**12  # of any other number of a shape


def what_if(request: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of a job's first window on a fleet, with the reasons.

    `devices` are {"kind", "count", "memory_bytes", "node"} or such as "2x fast:24GB"; `records` are device records;
    `link` {"latency_us", "bytes_per_s"} or such as "1Gbps/50us" joins different nodes; `links` join two ranks a and b.
    `scores` {"backward", "forward"} are [L][H]; without them every head is worth 1. Raises UserError, which names the
    field at fault, or InfeasibleError.
    """
    began = time.perf_counter()
    if unknown := sorted(set(request) - set(KEYS)):
        raise _bad(unknown[0], "is no field of a what-if", f"Use {', '.join(KEYS)}.")
    shape, asked, records = _shape(request.get("shape")), _asked(request.get("plan")), _fleet(request)
    step = _step(request.get("step"), records)
    costs = Costs(shape, step, profiles_of(records, shape, step, _default_link(request.get("link"))))
    scores = _scores(request.get("scores"), shape)
    plan = make_plan(asked, costs, scores, samples=SAMPLES)
    told = Explanation(plan, costs, scores)
    return {
        "plan": plan.to_dict(),
        "devices": told.workers(),
        "heads": told.heads(),
        "rounding_loss": plan.placement_report.rounding_loss,
        "gantt": _gantt(plan, asked, costs) if request.get("gantt") else None,
        "seconds": time.perf_counter() - began,
    }


def _gantt(plan: Plan, asked: PlanRequest, costs: Costs) -> dict[str, Any]:
    return gantt.to_dict(gantt.of_plan(plan, costs, embed_grad=asked.embed_grad))


def _fleet(request: Mapping[str, Any]) -> tuple[DeviceRecord, ...]:
    if bool(request.get("devices")) == bool(request.get("records")):
        raise _bad("devices", "or records must be given, and not both", "Name the fleet once, for example 2x fast.")
    if request.get("records"):
        found = [_record(data, f"records.{i}") for i, data in _listed(request, "records")]
        if len({record.id for record in found}) < len(found):
            raise _bad("records", "name a device twice", "Give every record its own id.")
        if len(found) > MAX_DEVICES:
            raise _bad("records", f"name {len(found)} devices", f"Plan for at most {MAX_DEVICES} devices.")
        records: Sequence[DeviceRecord] = found
    else:
        specs = [_spec(data, f"devices.{i}") for i, data in _listed(request, "devices")]
        records = records_of(specs)
    return with_links(records, [_pair(link, f"links.{i}", len(records)) for i, link in _listed(request, "links")])


def _listed(request: Mapping[str, Any], name: str) -> list[tuple[int, Any]]:
    value = request.get(name) or []
    if not isinstance(value, list | tuple):
        raise _bad(name, "is not a list", "Give a list.")
    return list(enumerate(value))


def _spec(data: Any, param: str) -> DeviceSpec:
    return parse_device(data, param) if isinstance(data, str) else DeviceSpec.from_dict(_object(data, param), param)


def _record(data: Any, param: str) -> DeviceRecord:
    return DeviceRecord.from_dict(_object(data, param), param)


def _pair(data: Any, param: str, num_devices: int) -> tuple[int, int, LinkProfile]:
    link = _object(data, param)
    ends = []
    for end in ("a", "b"):
        rank = link.get(end)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < num_devices:
            remedy = f"Use a rank from 0 to {num_devices - 1}, in the fleet's order."
            raise _bad(f"{param}.{end}", f"is {rank!r}, not a device", remedy)
        ends.append(rank)
    if ends[0] == ends[1]:
        raise _bad(f"{param}.b", "is the same device as a", "A link joins two devices.")
    return ends[0], ends[1], link_of(link, param)


def _default_link(data: Any) -> LinkProfile | None:
    if data is None:
        return None
    return parse_link(data) if isinstance(data, str) else link_of(_object(data, "link"), "link")


_PER_HEAD = {"mlp_dims", "head_params", "trained_head_params"}
_MAY_BE_NONE = {"norm_params", "trained_norm_params", "trained_head_params", "num_frozen"}


def _shape(data: Any) -> ModelShape:
    given = {name: value for name, value in _object(data, "shape").items() if value is not None}
    sizes = _sizes(given, ModelShape, "shape")
    heads = sizes["num_heads"]
    for name in _PER_HEAD & set(sizes):
        if len(sizes[name]) != heads:
            raise _bad(f"shape.{name}", f"has {len(sizes[name])} entries for {heads} heads", "Give one per head.")
    if sizes.get("num_frozen", 0) > sizes["num_blocks"]:
        raise _bad("shape.num_frozen", f"is more than the {sizes['num_blocks']} blocks", "Freeze fewer.")
    return ModelShape(**sizes)


def _step(data: Any, records: Sequence[DeviceRecord]) -> StepShape:
    """Unless it says in what is computed, as these devices would do it; where they differ, by what keeps most."""
    given = {name: value for name, value in _object(data, "step").items() if name != "recompute"}
    again = data.get("recompute", False)
    if not isinstance(again, bool):
        raise _bad("step.recompute", f"is {again!r}", "Give true or false.")
    if all(map(computes_bf16, records)):
        given.setdefault("compute_itemsize", 2)
    return StepShape(**_sizes(given, StepShape, "step"), recompute=again)


def _sizes(data: Mapping[str, Any], kind: type, param: str) -> dict[str, Any]:
    """The fields of a shape that are given or have to be: whole numbers, or lists of them for what is per head."""
    names = [f.name for f in fields(kind)]
    if unknown := sorted(set(data) - set(names)):
        raise _bad(f"{param}.{unknown[0]}", "is unknown", f"Use {', '.join(names)}.")
    sizes: dict[str, Any] = {}
    for name in (each.name for each in fields(kind) if each.name in data or each.default is MISSING):
        value = data.get(name)
        if name in _PER_HEAD:
            if not isinstance(value, list | tuple):
                raise _bad(f"{param}.{name}", "is not a list", "Give one number per head.")
            each = ((f"{param}.{name}.{i}", v) for i, v in enumerate(value))
            sizes[name] = tuple(_whole(v, where, MOST_SIZE, int(name not in _MAY_BE_NONE)) for where, v in each)
        else:
            fewest = int(name not in _MAY_BE_NONE)
            sizes[name] = _whole(value, f"{param}.{name}", MOST.get(name, MOST_SIZE), fewest)
    return sizes


def _whole(value: Any, param: str, most: int, fewest: int = 1) -> int:
    number = checked_number(value, param, fewest, most)
    if number != int(number):
        raise _bad(param, f"is {number}, not a whole number", "Give a whole number.")
    return int(number)


def _asked(data: Any) -> PlanRequest:
    try:
        return PlanRequest.from_dict(dict(_object(data or {}, "plan"))).at(0.0)
    except D2ftError:
        raise
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        remedy = "Give ratios, budgets or a schedule as in a job's method."
        raise _bad("plan", f"cannot be read: {error}", remedy) from error


def _scores(data: Any, shape: ModelShape) -> Scores:
    wanted = (shape.num_blocks, shape.num_heads)
    if data is None:
        return Scores(np.ones(wanted), np.ones(wanted))
    worths = []
    for name in ("backward", "forward"):
        try:
            worth_LH = np.array(_object(data, "scores").get(name), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise _bad(f"scores.{name}", "is not a table of numbers", "Give one number per block and head.") from error
        if worth_LH.shape != wanted or not np.isfinite(worth_LH).all() or worth_LH.min() < 0:
            raise _bad(f"scores.{name}", f"is not a table {wanted} of numbers ≥ 0", "Give one per block and head.")
        worths.append(worth_LH / max(float(worth_LH.mean()), 1e-30))
    return Scores(*worths)


def _object(data: Any, param: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise _bad(param, "is missing or no object", "Give an object with its fields.")
    return data


def _bad(param: str, what: str, remedy: str) -> UserError:
    return UserError(f"{param} {what}.", code="bad_what_if", param=param, remedy=remedy)
