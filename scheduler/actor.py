"""The scheduler actor: one named, detached Ray actor per cluster that answers for many jobs and keeps the device book.

    worker ── announce(job, attempt, rank, profile, scores) ──►┐
    worker ── plan(job, attempt, window, report) ──► {"waiting": n} … plan ◄── solved once, the same for every rank

The decisions are in `Scheduler`, plain Python; `connect` wraps it in Ray, and this is the planner's only file that
knows Ray. Ray may run a call twice, so calls are idempotent, keyed by (job, attempt). The actor's memory is lost when
it restarts: `plan` then answers with the error `unknown_attempt`, and the workers announce again, with the placement
of the last plan they got. An answer is a function of announcements and report alone, and every rank brings the same
report, so that the plan that comes back is the one that was lost. Everything that crosses its line is dicts, lists,
numbers and text. Errors are answers, `{"error": {...}}`, not exceptions.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from scheduler import failpoints
from scheduler.book import FILE, Book, book_ids
from scheduler.cost import Costs
from scheduler.domain import DeviceProfile, FloatArray, ModelShape, Placement, Scores, StepShape
from scheduler.errors import D2ftError, SystemFault, UserError
from scheduler.explain import Explanation
from scheduler.plan import make_plan
from scheduler.profiles import check_fleet, check_profile, read_profile
from scheduler.replan import change_of, first_plan, next_plan
from scheduler.request import PlanRequest
from scheduler.scores import make_scores, merge

NAME, NAMESPACE = "d2ft-scheduler", "d2ft"
MAX_ATTEMPTS = 100  # kept in memory; the oldest are dropped
KEPT_ANSWERS = 3  # windows of an attempt: ranks are never further apart than one
RAY_OPTIONS: dict[str, Any] = {
    "num_cpus": 0,
    "max_restarts": -1,
    "max_task_retries": -1,
    "max_concurrency": 16,  # calls at a time: some may solve while others announce and ask
}

Answer = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Announcement:
    """What one rank measured: its device, and its share of the scoring pass; the placement of its last plan, if any."""

    profile: DeviceProfile
    backward_sums_LH: FloatArray
    forward_sums_LH: FloatArray
    samples: int
    shape: ModelShape
    step: StepShape
    request: PlanRequest
    placement: Placement | None

    @classmethod
    def from_dict(cls, data: dict[str, Any], rank: int) -> Announcement:
        """Keys: profile, scores {backward, forward [L][H] sums, samples}, shape, step, request; placement if in use."""
        sizes: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data["shape"].items()
        }
        shape, scores, placement = ModelShape(**sizes), data["scores"], data.get("placement")
        backward, forward = (np.asarray(scores[key], dtype=np.float64) for key in ("backward", "forward"))
        if not backward.shape == forward.shape == (shape.num_blocks, shape.num_heads):
            raise ValueError(f"scores of shapes {backward.shape} and {forward.shape}")
        return cls(
            read_profile(data["profile"], rank),
            backward,
            forward,
            int(scores["samples"]),
            shape,
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
    lock: threading.Lock = field(default_factory=threading.Lock)


class Scheduler:
    """Collects announcements and makes plans; safe to call from several threads.

    The device book lies in `state_dir`, or in memory alone without one.
    """

    def __init__(self, state_dir: str | None = None) -> None:
        self._attempts: OrderedDict[tuple[str, int], _Attempt] = OrderedDict()
        self._lock = threading.Lock()
        self._book = Book(None if state_dir is None else Path(state_dir) / FILE)

    def announce(self, job: str, attempt: int, world_size: int, rank: int, announcement: dict[str, Any]) -> Answer:
        """Take what one rank measured; announcing again replaces it. Another world size starts the attempt afresh."""
        try:
            heard = Announcement.from_dict(announcement, rank)
            if not 0 <= rank < world_size or heard.profile.rank != rank:
                raise ValueError(f"rank {rank} with the profile of {heard.profile.rank} in a world of {world_size}")
            # An attempt under way announces again what it measured at its start, after a restart of this actor.
            now = time.time() if heard.placement is None else None
            check_profile(heard.profile, heard.shape, heard.step, num_workers=world_size, now=now)
        except D2ftError as error:
            return {"error": error.to_dict()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return {"error": SystemFault(f"Bad announcement: {error!r}.", code="bad_announcement").to_dict()}
        with self._lock:
            found = self._attempts.get((job, attempt))
            if found is None or found.world_size != world_size:
                found = self._attempts[job, attempt] = _Attempt(world_size)
            found.announcements[rank] = heard
            while len(self._attempts) > MAX_ATTEMPTS:
                self._attempts.popitem(last=False)
            complete = _in_order(found) if len(found.announcements) == world_size else []
        if complete and heard.placement is None:
            self._book.hear([h.profile for h in complete], heard.shape, heard.step)
        return {"announced": len(found.announcements), "world_size": world_size}

    def plan(
        self,
        job: str,
        attempt: int,
        window: int = 0,
        report: dict[str, Any] | None = None,
        rank: int | None = None,
    ) -> Answer:
        """The plan of a window as a dict, `{"waiting": n}` for n ranks that have not announced, or `{"error": {...}}`.

        The first caller of a window has it solved, the others get the same. It carries the `profiles` it rests on, in
        rank order, the `change`, and what is `told` to people (`Explanation.told`), None where the last plan was alike.
        Windows after the first bring a `report`, the same from every rank: `profiles` {rank: profile as folded},
        `worth` {"backward": [L][H]} and `worth_TLHM` (or None), `progress` 0 to 1, `steps_left`, `measured`,
        `placement` in use and the last plan's `policy`. A caller that gives its `rank` is told `unknown_attempt` when
        it has to announce.
        """
        failpoints.hit("scheduler.plan")
        found = self._attempts.get((job, attempt))
        if found is None or (rank is not None and rank not in found.announcements):
            return {"error": SystemFault("The scheduler does not know this attempt.", code="unknown_attempt").to_dict()}
        waiting = found.world_size - len(found.announcements)
        if waiting:
            return {"waiting": waiting}
        with found.lock:
            if window not in found.answers:
                found.answers[window] = answer = _answer(_in_order(found), window, report, found.answers)
                found.answers.pop(window - KEPT_ANSWERS, None)
                if report is not None and "profiles" in answer:
                    profiles = [DeviceProfile.from_dict(profile) for profile in answer["profiles"]]
                    self._book.hear(profiles, found.announcements[0].shape, found.announcements[0].step)
            return found.answers[window]

    def devices(self) -> list[dict[str, Any]]:
        """Every device of the book as a record, with `age_s` since it was measured and `used_by`, who has it now."""
        with self._lock:
            users = [
                (name, {"job": job, "attempt": attempt, "rank": heard.profile.rank})
                for (job, attempt), found in self._attempts.items()
                for name, heard in _named(found)
            ]
        now = time.time()
        return [
            {
                **record.to_dict(),
                "age_s": max(0.0, now - record.measured_at),
                "used_by": [user for device_id, user in users if device_id == record.id],
            }
            for record in self._book.records()
        ]

    def forget(self, job: str) -> int:
        """Drop all attempts of a job; says how many there were. What was learnt of its devices stays."""
        with self._lock:
            keys = [key for key in self._attempts if key[0] == job]
            for key in keys:
                del self._attempts[key]
            return len(keys)


SchedulerActor: Any = ray.remote(**RAY_OPTIONS)(Scheduler)


def connect(state_dir: str | None = None) -> Any:
    """The cluster's scheduler actor, made if it is not there; the methods of `Scheduler`, called with `.remote`.

    `state_dir` is where a new one keeps its device book, also after restarts.
    """
    options = {"name": NAME, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
    return SchedulerActor.options(**options).remote(state_dir)


def _in_order(found: _Attempt) -> list[Announcement]:
    return [found.announcements[rank] for rank in sorted(found.announcements)]


def _named(found: _Attempt) -> list[tuple[str, Announcement]]:
    """Announcements under their devices' names in the book."""
    heard = _in_order(found)
    return list(zip(book_ids([h.profile.device_id for h in heard]), heard, strict=True))


def _answer(heard: list[Announcement], window: int, report: dict[str, Any] | None, given: dict[int, Answer]) -> Answer:
    """The answer for a window after those that were `given`."""
    try:
        return _solve(heard, window, report or {}, given)
    except D2ftError as error:
        return {"error": error.to_dict()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return {"error": SystemFault(f"Bad report: {error!r}.", code="bad_report").to_dict()}


def _solve(heard: list[Announcement], window: int, report: dict[str, Any], given: dict[int, Answer]) -> Answer:
    """The plan with the profiles that it was made for: all ranks compile their programs from the same ones."""
    first = heard[0]
    if any((other.shape, other.step, other.request) != (first.shape, first.step, first.request) for other in heard):
        raise UserError("The ranks announce different models or requests.", code="ranks_differ", param="workers")
    costs = Costs(first.shape, first.step, _profiles(heard, report))
    scores = _scores(heard, report)
    request = first.request.at(float(report.get("progress", 0.0)))
    current = None if report.get("placement") is None else Placement.from_dict(report["placement"])
    change: dict[str, Any] | None = None
    if current is None:
        plan = replace(first_plan(request, costs, scores), version=window + 1, window=window)
    else:
        left, memory = int(report.get("steps_left", 0)), report.get("policy")
        plan, change = next_plan(request, costs, scores, current, window=window, steps_left=left, memory=memory)
    if not given and (other := _told(heard, current, plan.placement)):
        again = make_plan(request, costs, scores, version=plan.version, window=window, placement=other)
        plan = replace(again, policy=plan.policy)
        if current is not None and change is not None:
            reason = "as other workers were told before the scheduler restarted"
            change = change_of(None, current, plan, change["cause"], reason)
    answer = {**plan.to_dict(), "profiles": [asdict(profile) for profile in costs.profiles], "change": change}
    if (last := given.get(window - 1)) and all(last.get(key) == answer[key] for key in ("placement", "cycle")):
        return {**answer, "told": None}  # as told before: a fleet of sixteen takes as long to explain as to plan again
    return {**answer, "told": Explanation(plan, costs, scores).told(embed_grad=request.embed_grad)}


def _told(heard: list[Announcement], current: Placement | None, solved: Placement) -> Placement | None:
    """Another placement than `solved` that ranks got for this window before this actor was restarted, if any did.

    Solving again gives the same one, unless a solver ran into its wall clock.
    """
    in_use = None if current is None else current.to_dict()
    told = [h.placement for h in heard if h.placement is not None and h.placement.to_dict() != in_use]
    if any(placement.to_dict() == solved.to_dict() for placement in told):
        return None
    return told[0] if told else None


def _profiles(heard: list[Announcement], report: dict[str, Any]) -> list[DeviceProfile]:
    newer = {int(rank): read_profile(profile, int(rank)) for rank, profile in (report.get("profiles") or {}).items()}
    # memory was free before the model was placed; what a profile measures later is less and means nothing here
    profiles = [replace(newer.get(rank, h.profile), free_bytes=h.profile.free_bytes) for rank, h in enumerate(heard)]
    check_fleet(profiles, heard[0].shape, heard[0].step)
    return profiles


def _scores(heard: list[Announcement], report: dict[str, Any]) -> Scores:
    backward_LH = (report.get("worth") or {}).get("backward")
    if backward_LH is None:
        backward_LH = merge((h.backward_sums_LH, h.samples) for h in heard)
    forward_LH = merge((h.forward_sums_LH, h.samples) for h in heard)
    request = heard[0].request
    return make_scores(request.score, backward_LH, forward_LH, request.seed, report.get("worth_TLHM"))
