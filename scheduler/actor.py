"""The scheduler actor: one named, detached Ray actor per cluster that answers for many jobs.

    worker ── announce(job, attempt, rank, profile, scores) ──►┐
    worker ── plan(job, attempt, window) ──► {"waiting": n} … plan ◄── solved once, the same for every rank

The decisions are in `Scheduler`, plain Python; `connect` wraps it in Ray, and this is the planner's only file that
knows Ray. Ray may run a call twice, so calls are idempotent, keyed by (job, attempt). The actor's memory is lost when
it restarts: `plan` then answers with the error `unknown_attempt`, and the workers announce again, rank 0 with the
placement in use. Everything that crosses its line is dicts, lists, numbers and text. Errors are answers, `{"error":
{...}}`, not exceptions.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import ray

from scheduler.cost import Costs
from scheduler.domain import DeviceProfile, ModelShape, Placement, Scores, StepShape
from scheduler.errors import D2ftError, SystemFault, UserError
from scheduler.plan import PlanRequest, make_plan
from scheduler.scores import FloatArray, make_scores, merge

NAME, NAMESPACE = "d2ft-scheduler", "d2ft"
MAX_ATTEMPTS = 100  # kept in memory; the oldest are dropped
RAY_OPTIONS: dict[str, Any] = {
    "num_cpus": 0,
    "max_restarts": -1,
    "max_task_retries": -1,
    "max_concurrency": 16,  # calls at a time: some may solve while others announce and ask
}
FRESH = 0.5  # weight of a window's new Fisher against the old

Answer = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Announcement:
    """What one rank measured: its device, and its share of the scoring pass."""

    profile: DeviceProfile
    fisher_sums_LH: FloatArray
    samples: int
    magnitude_LH: FloatArray
    shape: ModelShape
    step: StepShape
    request: PlanRequest
    placement: Placement | None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Announcement:
        """Keys: profile, fisher [L][H] sums, samples, magnitude [L][H], shape, step, request; placement if in use."""
        sizes: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data["shape"].items()
        }
        placement = data.get("placement")
        return cls(
            DeviceProfile.from_dict(data["profile"]),
            np.asarray(data["fisher"], dtype=np.float64),
            int(data["samples"]),
            np.asarray(data["magnitude"], dtype=np.float64),
            ModelShape(**sizes),
            StepShape(**data["step"]),
            PlanRequest.from_dict(data["request"]),
            None if placement is None else Placement.from_dict(placement),
        )


@dataclass(eq=False)
class _Attempt:
    """One attempt of a job. `lock` is held while solving: callers of the same attempt wait, others do not."""

    world_size: int
    announcements: dict[int, Announcement] = field(default_factory=dict)
    answers: dict[int, Answer] = field(default_factory=dict)
    placement: Placement | None = None
    fisher_LH: FloatArray | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Scheduler:
    """Collects announcements and makes plans; safe to call from several threads."""

    def __init__(self) -> None:
        self._attempts: OrderedDict[tuple[str, int], _Attempt] = OrderedDict()
        self._lock = threading.Lock()

    def announce(self, job: str, attempt: int, world_size: int, rank: int, announcement: dict[str, Any]) -> Answer:
        """Take what one rank measured; announcing again replaces it. Another world size starts the attempt afresh."""
        try:
            heard = Announcement.from_dict(announcement)
            if not 0 <= rank < world_size or len(heard.profile.links) != world_size:
                raise ValueError(f"rank {rank} with {len(heard.profile.links)} links in a world of {world_size}")
        except D2ftError as error:
            return {"error": error.to_dict()}
        except (KeyError, TypeError, ValueError) as error:
            return {"error": SystemFault(f"Bad announcement: {error!r}.", code="bad_announcement").to_dict()}
        with self._lock:
            found = self._attempts.get((job, attempt))
            if found is None or found.world_size != world_size:
                found = self._attempts[job, attempt] = _Attempt(world_size)
            found.announcements[rank] = heard
            while len(self._attempts) > MAX_ATTEMPTS:
                self._attempts.popitem(last=False)
            return {"announced": len(found.announcements), "world_size": world_size}

    def plan(
        self,
        job: str,
        attempt: int,
        window: int = 0,
        timings: dict[str, Any] | None = None,
        rank: int | None = None,
    ) -> Answer:
        """The plan of a window as a dict, `{"waiting": n}` for n ranks that have not announced, or `{"error": {...}}`.

        The first caller of a window has it solved, the others get the same; it carries the `profiles` it rests on, in
        rank order. Windows after the first keep the placement. `timings` may hold newer measurements: `profiles`
        {rank: profile} and `fisher` [L][H] means per sample. A caller that gives its `rank` is told `unknown_attempt`
        when it has to announce.
        """
        found = self._attempts.get((job, attempt))
        if found is None or (rank is not None and rank not in found.announcements):
            return {"error": SystemFault("The scheduler does not know this attempt.", code="unknown_attempt").to_dict()}
        waiting = found.world_size - len(found.announcements)
        if waiting:
            return {"waiting": waiting}
        with found.lock:
            if window not in found.answers:
                found.answers[window] = _answer(found, window, timings or {})
            return found.answers[window]

    def devices(self) -> list[dict[str, Any]]:
        """Every rank of every attempt in memory with its latest profile, newest attempt last."""
        with self._lock:
            attempts = list(self._attempts.items())
        return [
            {"job": job, "attempt": attempt, **asdict(heard.profile)}
            for (job, attempt), found in attempts
            for _, heard in sorted(found.announcements.items())
        ]

    def forget(self, job: str) -> int:
        """Drop all attempts of a job; says how many there were."""
        with self._lock:
            keys = [key for key in self._attempts if key[0] == job]
            for key in keys:
                del self._attempts[key]
            return len(keys)


SchedulerActor: Any = ray.remote(**RAY_OPTIONS)(Scheduler)


def connect() -> Any:
    """The cluster's scheduler actor, made if it is not there; the methods of `Scheduler`, called with `.remote`."""
    return SchedulerActor.options(name=NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True).remote()


def _answer(found: _Attempt, window: int, timings: dict[str, Any]) -> Answer:
    try:
        return _solve(found, window, timings)
    except D2ftError as error:
        return {"error": error.to_dict()}


def _solve(found: _Attempt, window: int, timings: dict[str, Any]) -> Answer:
    """The plan with the profiles that it was made for: all ranks compile their programs from the same ones."""
    heard = [found.announcements[rank] for rank in range(found.world_size)]
    first = heard[0]
    if any((other.shape, other.step, other.request) != (first.shape, first.step, first.request) for other in heard):
        raise UserError("The ranks announce different models or requests.", code="ranks_differ", param="workers")
    newer = {int(rank): DeviceProfile.from_dict(profile) for rank, profile in timings.get("profiles", {}).items()}
    # memory was free before the model was placed; what a profile measures later is less and means nothing here
    profiles = [replace(newer.get(rank, h.profile), free_bytes=h.profile.free_bytes) for rank, h in enumerate(heard)]
    costs = Costs(first.shape, first.step, profiles)
    placement = found.placement or first.placement
    plan = make_plan(
        first.request, costs, _scores(found, heard, timings), version=window + 1, window=window, placement=placement
    )
    found.placement = plan.placement
    return {**plan.to_dict(), "profiles": [asdict(profile) for profile in costs.profiles]}


def _scores(found: _Attempt, heard: list[Announcement], timings: dict[str, Any]) -> Scores:
    if found.fisher_LH is None:
        found.fisher_LH = merge((h.fisher_sums_LH, h.samples) for h in heard)
    if timings.get("fisher") is not None:
        fresh = np.asarray(timings["fisher"], dtype=np.float64)
        found.fisher_LH = (1 - FRESH) * found.fisher_LH + FRESH * fresh
    magnitude_LH = np.mean([h.magnitude_LH for h in heard], axis=0)
    return make_scores(heard[0].request.score, found.fisher_LH, magnitude_LH, heard[0].request.seed)
