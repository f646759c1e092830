"""What memory a worker's process takes and may take: resident pages, limits of machine, container and user.

A device is a GPU, whose memory torch counts, or else the machine's memory, in which the process itself, its libraries
and its data lie beside the model: its *base*.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
STATUS = Path("/proc/self/status")
# Files of a control group in versions 2 and 1: its limit, what it uses, and which line of memory.stat could be dropped.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class Room(NamedTuple):
    """`base_bytes` the process takes without the model, `free_bytes` there are for the model beside it."""

    base_bytes: int
    free_bytes: int


def room(model_bytes: int, device: torch.device, sharers: int, limit_bytes: int | None) -> Room:
    """What this worker has, asked while it holds the whole model and nothing else of the job.

    `sharers` workers, each with the whole model, share the device; none may take more than `limit_bytes` in all.
    """
    give_back()
    held = resident_bytes(device)
    base = max(0, held - model_bytes) if device.type == "cpu" else 0
    free = available_bytes(device) // sharers + held - base
    if limit_bytes is not None:
        free = min(free, limit_bytes - base)
    return Room(base, max(1, free))


def available_bytes(device: torch.device) -> int:
    """What all that share the device could still take, by the machine and by the containers around this process."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *container_bytes()])


def container_bytes() -> list[int]:
    """What is left under the limit of every control group around this process that has one."""
    found = []
    for group in _groups():
        for limit, usage, droppable in _FILES:
            most, used = _number(group / limit), _number(group / usage)
            if most is not None and used is not None and most < 1 << 60:  # version 1 writes no limit as a huge one
                found.append(max(0, most - used + _stat(group / "memory.stat", droppable)))
    return found


def resident_bytes(device: torch.device) -> int:
    """What this process holds now: of a GPU what its tensors take."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def peak_bytes(device: torch.device) -> int:
    """The most that this process ever held."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    held = resident_bytes(device)  # the kernel brings its own maximum up to date now and then
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return held
    return max([held, *(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))])


def fits(num_bytes: int, sharers: int, limit_bytes: int | None) -> bool:
    """Whether this process may take so much more of the machine's memory."""
    give_back()
    main = torch.device("cpu")
    left = available_bytes(main) // sharers
    return num_bytes <= (left if limit_bytes is None else min(left, limit_bytes - resident_bytes(main)))


def give_back() -> None:
    """Return freed pages to the kernel, which glibc keeps when it is told so; nothing where there is no glibc."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def _groups() -> list[Path]:
    """Folders of the control groups around this process, for both versions; in a container the mount is the group."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    folders: dict[Path, None] = {}
    for _, controllers, name in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        top = CGROUPS / "memory" if controllers else CGROUPS
        own = top / name.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top):
                folders[folder] = None
    return list(folders)


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file, or "max" in it."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _stat(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
