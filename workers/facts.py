"""What the machine tells of a worker's device: name, memory, clocks, load, cores; and an id that lasts across jobs.

Facts are for people and for the device book: no plan rests on them. What cannot be found out is left out, nothing here
fails. A GPU is asked through NVML where the `pynvml` module is there, as PyTorch alone knows no clocks.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import psutil
import torch

try:
    import pynvml
except ImportError:
    pynvml = None

Facts = dict[str, Any]


def device_facts(device: torch.device | str) -> Facts:
    """Everything that can be found out about the device and its machine, as JSON."""
    device = torch.device(device)
    facts: Facts = {"kind": device.type, "host": platform.node(), "torch": torch.__version__, **_machine()}
    if device.type == "cuda":
        facts.update(_cuda(device))
        facts.update(_nvml(facts.get("uuid")))
    else:
        facts["threads"] = torch.get_num_threads()
        facts["name"] = _cpu_name()
    return {key: value for key, value in facts.items() if value is not None}


def device_id(facts: Facts) -> str:
    """A name for the device that stays the same from job to job: machine and GPU, or the cores that may be used.

    Workers that share their cores share the id; the device book tells them apart by their order.
    """
    where = facts.get("host") or "unknown"
    if facts["kind"] == "cuda":
        return f"{where}/{facts.get('uuid') or facts.get('name') or 'gpu'}"
    return f"{where}/cpu:{_ranges(facts.get('affinity') or [])}"


def device_name(facts: Facts) -> str:
    """What people call the device."""
    if facts["kind"] == "cuda":
        return str(facts.get("name") or "GPU")
    return f"CPU ({facts.get('threads', 1)} threads)"


def _machine() -> Facts:
    memory = _tried(psutil.virtual_memory)
    clock = _tried(psutil.cpu_freq)
    return {
        "cores": os.cpu_count(),
        "affinity": _tried(lambda: sorted(os.sched_getaffinity(0))),
        "load": _tried(lambda: round(os.getloadavg()[0], 2)),
        "cpu_mhz": clock and round(clock.current),
        "memory_bytes": memory and memory.total,
        "free_memory_bytes": memory and memory.available,
    }


def _cuda(device: torch.device) -> Facts:
    properties = _tried(lambda: torch.cuda.get_device_properties(device))
    memory = _tried(lambda: torch.cuda.mem_get_info(device))
    uuid = getattr(properties, "uuid", None)
    return {
        "name": getattr(properties, "name", None),
        "uuid": uuid and f"GPU-{str(uuid).removeprefix('GPU-')}",
        "capability": properties and f"{properties.major}.{properties.minor}",
        "multiprocessors": getattr(properties, "multi_processor_count", None),
        "gpu_memory_bytes": memory and int(memory[1]),
        "free_gpu_memory_bytes": memory and int(memory[0]),
    }


def _nvml(uuid: str | None) -> Facts:
    if pynvml is None or uuid is None:
        return {}
    _tried(pynvml.nvmlInit)
    try:
        handle = _tried(lambda: pynvml.nvmlDeviceGetHandleByUUID(uuid))
        if handle is None:
            return {}
        load = _tried(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle))
        power = _tried(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
        return {
            "driver": _text(_tried(pynvml.nvmlSystemGetDriverVersion)),
            "sm_mhz": _tried(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
            "memory_mhz": _tried(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
            "max_sm_mhz": _tried(lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)),
            "utilisation": load and load.gpu / 100,
            "temperature_c": _tried(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
            "power_w": power and power / 1000,
        }
    finally:
        _tried(pynvml.nvmlShutdown)


def _cpu_name() -> str | None:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    except OSError:
        return platform.processor() or None


def _ranges(numbers: list[int]) -> str:
    """Numbers in order as text: 0-3,8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _tried(ask: Callable[[], Any]) -> Any:
    """The answer; None where asking fails, in whatever way: drivers have many."""
    try:
        return ask()
    except Exception:
        return None
