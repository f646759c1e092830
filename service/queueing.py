"""Who starts next: priorities, fair share and preemption, as pure functions over values.

Higher priority first. Among jobs of one priority the user goes first who, for their share, has the fewest jobs running
and ahead, then who used the fewest device-seconds lately; a user's own jobs start in the order in which they came.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

HALF_LIFE_S = 24 * 3600.0  # of what a user has used
DEFAULT_JOB_S = 600.0  # how long a job takes where none has ended yet


@dataclass(frozen=True)
class Waiting:
    """A queued job."""

    job_id: str
    owner: str
    priority: int
    queued_at: float
    workers: int = 1


@dataclass(frozen=True)
class Load:
    """What a user has of the cluster: jobs that run, and device-seconds used, decayed."""

    share: float = 1.0
    running: int = 0
    max_running: int | None = None
    usage_s: float = 0.0

    @property
    def is_full(self) -> bool:
        return self.max_running is not None and self.running >= self.max_running


@dataclass(frozen=True)
class Running:
    """A job that holds devices. `since` is when its attempt began; None of `eta_s` means unknown."""

    job_id: str
    priority: int
    since: float
    pausable: bool
    eta_s: float | None = None


def start_order(waiting: Iterable[Waiting], loads: Mapping[str, Load]) -> list[Waiting]:
    """All that wait, as they would start one after another if nothing else came or ended."""
    ranks: dict[int, dict[str, deque[Waiting]]] = defaultdict(lambda: defaultdict(deque))
    for job in sorted(waiting, key=lambda job: (job.queued_at, job.job_id)):
        ranks[job.priority][job.owner].append(job)
    ahead = {owner: load.running for owner, load in loads.items()}
    order: list[Waiting] = []
    for priority in sorted(ranks, reverse=True):
        order += _take_turns(ranks[priority], loads, ahead)
    return order


def decayed(usage_s: float, since_s: float) -> float:
    """What remains of a use after `since_s` seconds."""
    return usage_s * 0.5 ** (max(0.0, since_s) / HALF_LIFE_S)


def to_preempt(
    first: Waiting | None, running: Sequence[Running], *, slots: int, now: float, at_least_s: float
) -> str | None:
    """The running job that is to make room for the first that waits, or None.

    Only a job of lower priority, that can be paused, and that has had `at_least_s` seconds; of those the lowest, and
    of equals the youngest, since it has the least to lose.
    """
    if first is None or len(running) < slots:
        return None
    candidates = [
        job for job in running if job.pausable and job.priority < first.priority and now - job.since >= at_least_s
    ]
    return min(candidates, key=lambda job: (job.priority, -job.since)).job_id if candidates else None


def expected_waits(num_waiting: int, running: Sequence[Running], *, slots: int, typical_s: float) -> list[float]:
    """Seconds until each of the jobs that wait, in their order, may be expected to start."""
    ends = [typical_s if job.eta_s is None else job.eta_s for job in running]
    free_at = sorted([*ends, *[0.0] * max(0, slots - len(ends))])[: max(1, slots)]
    heapq.heapify(free_at)
    waits = []
    for _ in range(num_waiting):
        start = heapq.heappop(free_at)
        waits.append(start)
        heapq.heappush(free_at, start + typical_s)
    return waits


def _take_turns(
    queues: Mapping[str, deque[Waiting]], loads: Mapping[str, Load], ahead: dict[str, int]
) -> list[Waiting]:
    """One priority's jobs in turn; `ahead` counts each user's jobs that run or go first, and grows with them."""

    def turn(owner: str) -> tuple[float, float, float, str]:
        load = loads.get(owner, Load())
        return (ahead.get(owner, 0) / load.share, load.usage_s / load.share, queues[owner][0].queued_at, owner)

    turns = [turn(owner) for owner in queues]
    heapq.heapify(turns)
    order = []
    while turns:
        owner = heapq.heappop(turns)[-1]
        order.append(queues[owner].popleft())
        ahead[owner] = ahead.get(owner, 0) + 1
        if queues[owner]:
            heapq.heappush(turns, turn(owner))
    return order
