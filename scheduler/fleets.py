"""Invented fleets: "2x fast:24GB", "a100@n1", "12TFLOPS:24GB" and "10Gbps/50us" as device records and links.

    [COUNTx ]KIND[:MEMORY][@NODE]      KIND a name of KINDS, or a sustained rate such as 800GFLOPS
    WIDTH[/LATENCY]                    Kbps, Mbps, Gbps (bits) or KB/s, MB/s, GB/s (bytes); us or ms

Devices of one NODE share a fast link; without @NODE every device stands in a machine of its own. Spoken prefixes are
decimal; MiB and GiB are powers of two.

The table of KINDS holds assumptions, not measurements: data-sheet peaks (dense, without sparsity), of which training
sustains SUSTAINED. A GPU that has bfloat16 computes in it, as the workers do; "a100-fp32" names the same GPU in
float32. "fast" is four times "slow", and "cpu" is a few cores of a server.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scheduler.devices import MOST_BYTES, MOST_PER_S, MOST_US, DeviceRecord, checked_number
from scheduler.domain import LinkProfile
from scheduler.errors import UserError

MAX_DEVICES = 64
GB = 10**9
SUSTAINED = {"fp32": 0.5, "bf16": 0.4, "memory": 0.7}  # of the peak, in training; of the memory's bandwidth, in sums
UPDATE_BYTES_PER_PARAM = 28  # AdamW reads weight, gradient and two moments, and writes all but the gradient
SUM_PASSES = 3  # adding a part to the residual reads both and writes one
GPU_CALL_US, CPU_CALL_US = 80, 60  # a part is about eight kernels; on a CPU its fixed time is Python's
DEFAULT_LATENCY_US = 100
MOST_FLOPS_PER_S = 10**17
BF16_CAPABILITY = 8  # CUDA's major one, from which a GPU has it


@dataclass(frozen=True)
class Kind:
    """A kind of device: sustained FLOPs/s, the rate at which it adds up bytes, memory, fixed time of a part."""

    flops_per_s: int
    memory_bandwidth: int  # bytes/s, as in the data sheet
    memory_bytes: int
    call_us: int = GPU_CALL_US


def _gpus(rows: str) -> dict[str, Kind]:
    """Kinds of a table: name, TFLOPS fp32, TFLOPS bf16 (- where it has none), GB/s, GB."""
    kinds: dict[str, Kind] = {}
    for name, fp32, bf16, width, memory in (row.split() for row in rows.strip().splitlines()):
        slow = Kind(round(float(fp32) * 1e12 * SUSTAINED["fp32"]), int(width) * GB, int(memory) * GB)
        kinds[name] = kinds[f"{name}-fp32"] = slow
        if bf16 != "-":
            kinds[name] = Kind(round(float(bf16) * 1e12 * SUSTAINED["bf16"]), int(width) * GB, int(memory) * GB)
    return kinds


KINDS: dict[str, Kind] = {
    "fast": Kind(8 * 10**12, 600 * GB, 24 * GB),
    "slow": Kind(2 * 10**12, 200 * GB, 12 * GB),
    "cpu": Kind(10**11, 50 * GB, 16 * GB, CPU_CALL_US),
    **_gpus(
        """
        t4       8.1    -     320   16
        v100     15.7   -     900   16
        rtx2080ti 13.4  -     616   11
        rtx3060  12.7   25    360   12
        rtx3090  35.6   71    936   24
        rtx4090  82.6   165   1008  24
        a10      31.2   125   600   24
        a6000    38.7   155   768   48
        l4       30.3   121   300   24
        l40s     91.6   362   864   48
        a100     19.5   312   1555  40
        h100     66.9   989   3350  80
        h200     66.9   989   4800  141
        """
    ),
}


@dataclass(frozen=True)
class DeviceSpec:
    """Some devices of one kind; `memory_bytes` None means the kind's own, `node` "" a machine each."""

    kind: str
    count: int = 1
    memory_bytes: int | None = None
    node: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], param: str = "devices") -> DeviceSpec:
        """A spec from its JSON; a UserError names the field below `param` that is wrong."""
        if unknown := sorted(set(data) - {"kind", "count", "memory_bytes", "node"}):
            raise _bad(f"{param}.{unknown[0]}", "is no field of a device", "Use kind, count, memory_bytes and node.")
        kind, memory, node = data.get("kind"), data.get("memory_bytes"), data.get("node") or ""
        _kind(kind, f"{param}.kind")
        count = checked_number(data.get("count", 1), f"{param}.count", 1, MAX_DEVICES)
        if count != int(count):
            raise _bad(f"{param}.count", f"is {count}, not a whole number", "Count whole devices.")
        if memory is not None:
            memory = int(checked_number(memory, f"{param}.memory_bytes", 1, MOST_BYTES))
        if not isinstance(node, str) or not _NODE.fullmatch(node):
            raise _bad(f"{param}.node", f"is {node!r}, not a name", "Use letters, digits, dots, dashes.")
        return cls(str(kind).lower() if str(kind).lower() in KINDS else str(kind), int(count), memory, node)

    def to_dict(self) -> dict[str, Any]:
        """Inverse of `from_dict`."""
        return {"kind": self.kind, "count": self.count, "memory_bytes": self.memory_bytes, "node": self.node or None}

    def __str__(self) -> str:
        memory = "" if self.memory_bytes is None else f":{_spoken(self.memory_bytes, _MEMORY_UNITS)}"
        return f"{f'{self.count}x ' if self.count > 1 else ''}{self.kind}{memory}{f'@{self.node}' if self.node else ''}"


_MEMORY_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": GB, "TB": 10**12, "MiB": 1 << 20, "GiB": 1 << 30}
_WIDTH_UNITS = {"bps": 0.125, "Kbps": 125, "Mbps": 125_000, "Gbps": 125_000_000, "Tbps": 125_000_000_000}
_WIDTH_UNITS |= {"B/s": 1, "KB/s": 10**3, "MB/s": 10**6, "GB/s": GB}
_TIME_UNITS = {"us": 1, "µs": 1, "ms": 1000, "s": 1_000_000}
_RATE_UNITS = {"GFLOPS": 10**9, "TFLOPS": 10**12, "PFLOPS": 10**15}
_NODE = re.compile(r"[\w.\-]{0,64}")
_SPEC = re.compile(r"\s*(?:(-?\d+)\s*[x×]\s*)?([^:@\s]+)\s*(?::\s*([^@\s]+))?\s*(?:@\s*(\S+))?\s*", re.IGNORECASE)
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-zµ/]+)")


def parse_device(text: str, param: str = "devices") -> DeviceSpec:
    """The spec behind "[COUNTx ]KIND[:MEMORY][@NODE]"; a UserError names the part that is wrong."""
    match = _SPEC.fullmatch(text)
    if match is None:
        raise _bad(param, f"is '{text}'", "Write it as 2x fast:24GB@node1; count, memory and node may be left out.")
    count, kind, memory, node = match.groups()
    data = {"kind": kind, "count": int(count or 1), "node": node}
    if memory:
        data["memory_bytes"] = round(_amount(memory, _MEMORY_UNITS, f"{param}.memory_bytes"))
    return DeviceSpec.from_dict(data, param)


def parse_link(text: str, param: str = "link") -> LinkProfile:
    """The link behind "WIDTH[/LATENCY]": "1Gbps", "10Gbps/50us", "800MB/s/1ms"."""
    width, latency = text.strip(), float(DEFAULT_LATENCY_US)
    head, slash, tail = width.rpartition("/")
    if slash and tail.strip() != "s":
        width, latency = head, _amount(tail, _TIME_UNITS, f"{param}.latency_us")
    width_param = f"{param}.bytes_per_s"
    rate = checked_number(round(_amount(width, _WIDTH_UNITS, width_param)), width_param, 1, MOST_PER_S)
    return LinkProfile(round(checked_number(latency, f"{param}.latency_us", 0, MOST_US)), int(rate))


def spoken_link(link: LinkProfile) -> str:
    """Inverse of `parse_link`."""
    return f"{_spoken(link.bytes_per_s, _WIDTH_UNITS)}/{link.latency_us}us"


def computes_bf16(record: DeviceRecord) -> bool:
    """Whether workers on the device compute in bfloat16 unless told otherwise."""
    if record.facts:
        major = str(record.facts.get("capability")).partition(".")[0]
        return record.facts.get("kind") == "cuda" and major.isdecimal() and int(major) >= BF16_CAPABILITY
    single = f"{record.device}-fp32"
    return single in KINDS and KINDS[record.device] is not KINDS[single]


def records_of(specs: Sequence[DeviceSpec], param: str = "devices") -> tuple[DeviceRecord, ...]:
    """One record per device, in order; ids are the kind and the rank."""
    total = sum(spec.count for spec in specs)
    if not 1 <= total <= MAX_DEVICES:
        raise _bad(param, f"name {total} devices, not 1 to {MAX_DEVICES}", f"Plan for at most {MAX_DEVICES} devices.")
    spread = [spec for spec in specs for _ in range(spec.count)]
    return tuple(_record(rank, spec, f"{param}.kind") for rank, spec in enumerate(spread))


def with_links(
    records: Sequence[DeviceRecord], links: Iterable[tuple[int, int, LinkProfile]]
) -> tuple[DeviceRecord, ...]:
    """The records with (rank, rank, link) in both directions."""
    known = [dict(record.links) for record in records]
    for a, b, link in links:
        known[a][records[b].id] = known[b][records[a].id] = link
    return tuple(_replace_links(record, peers) for record, peers in zip(records, known, strict=True))


def _replace_links(record: DeviceRecord, links: dict[str, LinkProfile]) -> DeviceRecord:
    return DeviceRecord(**{**vars(record), "links": links})


def _record(rank: int, spec: DeviceSpec, param: str) -> DeviceRecord:
    kind = _kind(spec.kind, param)
    moved = kind.memory_bandwidth * SUSTAINED["memory"]
    return DeviceRecord(
        id=f"{spec.kind}-{rank}",
        node=spec.node or f"machine of {spec.kind}-{rank}",
        device=spec.kind,
        call_us=kind.call_us,
        forward_flops_per_s=kind.flops_per_s,
        backward_flops_per_s=kind.flops_per_s,
        sum_bytes_per_s=round(moved / SUM_PASSES),
        memory_bytes=spec.memory_bytes or kind.memory_bytes,
        trunk_flops_per_s=kind.flops_per_s,
        update_params_per_s=round(moved / UPDATE_BYTES_PER_PARAM),
    )


def _kind(word: Any, param: str) -> Kind:
    """The kind of that name, or one with the rate that the word spells: 12TFLOPS."""
    name = str(word)
    if known := KINDS.get(name.lower()):
        return known
    if match := _AMOUNT.fullmatch(name):
        units = {unit.lower(): scale for unit, scale in _RATE_UNITS.items()}
        if scale := units.get(match[2].lower()):
            rate = checked_number(float(match[1]) * scale, param, 1e6, MOST_FLOPS_PER_S)
            fast = KINDS["fast"]
            bandwidth = round(max(10 * GB, fast.memory_bandwidth * rate / fast.flops_per_s))
            return Kind(round(rate), bandwidth, fast.memory_bytes, fast.call_us)
    raise UserError(
        f"'{word}' is not a kind of device.",
        code="unknown_device_kind",
        param=param,
        remedy=f"Use one of {', '.join(k for k in KINDS if not k.endswith('-fp32'))}, or a rate such as 12TFLOPS.",
    )


def _amount(text: str, units: Mapping[str, float], param: str) -> float:
    match = _AMOUNT.fullmatch(text.strip())
    by_name = {unit.lower(): scale for unit, scale in units.items()}
    scale = match and (units.get(match[2]) or by_name.get(match[2].lower()))
    if not match or not scale:
        raise _bad(param, f"is '{text}'", f"Write a number and one of {', '.join(units)}.")
    return float(match[1]) * scale


def _spoken(amount: int, units: Mapping[str, float]) -> str:
    """The amount in the largest unit that leaves a whole number."""
    unit, scale = max(((u, s) for u, s in units.items() if amount % s == 0), key=lambda pair: pair[1])
    return f"{round(amount / scale)}{unit}"


def _bad(param: str, what: str, remedy: str) -> UserError:
    return UserError(f"{param} {what}.", code="bad_device", param=param, remedy=remedy)
