"""The scheduler answers for many jobs, solves once per window, and says what is wrong instead of raising."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import ray

from scheduler import actor
from scheduler.actor import MAX_ATTEMPTS, NAME, NAMESPACE, Scheduler
from scheduler.domain import Plan, StepShape
from scheduler.plan import PlanRequest
from tests.scheduler.fleet import fleet, vit_shape

SHAPE = vit_shape(4, 4, 64)


def announcement(rank: int, workers: int = 2, request: PlanRequest | None = None, **more: Any) -> dict[str, Any]:
    """What one rank would send, through JSON."""
    worth = np.random.default_rng(7).exponential(size=(2, 4, 4))
    message = {
        "profile": asdict(fleet((1.0,) * workers, shape=SHAPE)[rank]),
        "fisher": (worth[0] * 10).tolist(),
        "samples": 10,
        "magnitude": worth[1].tolist(),
        "shape": asdict(SHAPE),
        "step": asdict(StepShape(5, 8)),
        "request": (request or PlanRequest(ratios=(3, 0, 2))).to_dict(),
        **more,
    }
    return json.loads(json.dumps(message))  # type: ignore[no-any-return]


def announced(job: str = "a", attempt: int = 1, workers: int = 2, **more: Any) -> Scheduler:
    scheduler = Scheduler()
    for rank in range(workers):
        scheduler.announce(job, attempt, workers, rank, announcement(rank, workers, **more))
    return scheduler


def test_a_plan_waits_for_every_rank_and_is_the_same_for_all() -> None:
    scheduler = Scheduler()
    assert scheduler.announce("a", 1, 2, 1, announcement(1)) == {"announced": 1, "world_size": 2}
    assert scheduler.plan("a", 1) == {"waiting": 1}
    scheduler.announce("a", 1, 2, 0, announcement(0))
    first, again = scheduler.plan("a", 1), scheduler.plan("a", 1)
    assert first is again
    assert Plan.from_dict(json.loads(json.dumps(first))).to_dict() == Plan.from_dict(first).to_dict()
    assert Plan.from_dict(first).compute_fraction == pytest.approx(0.6, abs=0.01)
    assert [profile["rank"] for profile in first["profiles"]] == [0, 1]


def test_announcing_twice_changes_nothing() -> None:
    scheduler = announced()
    before = scheduler.plan("a", 1)
    assert scheduler.announce("a", 1, 2, 0, announcement(0)) == {"announced": 2, "world_size": 2}
    assert scheduler.plan("a", 1) is before


def test_another_world_size_starts_the_attempt_afresh() -> None:
    scheduler = announced()
    scheduler.plan("a", 1)
    scheduler.announce("a", 1, 3, 0, announcement(0, 3))
    assert scheduler.plan("a", 1) == {"waiting": 2}


def test_later_windows_keep_the_placement_and_take_new_scores() -> None:
    scheduler = announced(request=PlanRequest(ratios=(2, 3, 0)))
    first = scheduler.plan("a", 1, 0)
    turned = 1 / (np.asarray(announcement(0)["fisher"]) + 0.01)
    second = scheduler.plan("a", 1, 1, {"fisher": (100 * turned).tolist()})
    assert second["placement"] == first["placement"]
    assert (second["version"], second["window"]) == (2, 1)
    assert second["cycle"] != first["cycle"]


def test_a_slower_device_shows_in_the_forecast_of_the_next_window() -> None:
    scheduler = announced()
    slow = asdict(fleet((0.25, 1.0), shape=SHAPE)[0])
    first, second = scheduler.plan("a", 1, 0), scheduler.plan("a", 1, 1, {"profiles": {"0": {**slow, "free_bytes": 0}}})
    assert second["all_full"]["step_us"] > 2 * first["all_full"]["step_us"]


def test_concurrent_callers_have_it_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, calls, answers = announced(), [], []
    solve = actor.make_plan
    monkeypatch.setattr(actor, "make_plan", lambda *args, **kwargs: calls.append(1) or solve(*args, **kwargs))
    threads = [threading.Thread(target=lambda: answers.append(scheduler.plan("a", 1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert all(answer is answers[0] for answer in answers)


def test_while_one_job_is_solved_another_may_announce(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, solving, go_on = announced(), threading.Event(), threading.Event()
    solve = actor.make_plan

    def slowly(*args: Any, **kwargs: Any) -> Plan:
        solving.set()
        assert go_on.wait(10)
        return solve(*args, **kwargs)

    monkeypatch.setattr(actor, "make_plan", slowly)
    thread = threading.Thread(target=scheduler.plan, args=("a", 1))
    thread.start()
    assert solving.wait(10)
    assert scheduler.announce("b", 1, 2, 0, announcement(0))["announced"] == 1
    assert len(scheduler.devices()) == 3
    go_on.set()
    thread.join()


def test_errors_are_answers() -> None:
    scheduler = announced(request=PlanRequest(compute=0.6, max_bytes=0.0001))
    error = scheduler.plan("a", 1)["error"]
    assert (error["code"], error["fault"], error["param"]) == ("budgets_infeasible", "user", "method.budgets")
    assert scheduler.plan("nobody", 1)["error"]["code"] == "unknown_attempt"


@pytest.mark.parametrize(
    ("spoilt", "code"),
    [
        ({"profile": {}}, "bad_announcement"),
        ({"fisher": "many"}, "bad_announcement"),
        ({"request": {"strategy": "greedy"}}, "unknown_strategy"),
    ],
)
def test_a_bad_announcement_is_refused(spoilt: dict[str, Any], code: str) -> None:
    scheduler = Scheduler()
    assert scheduler.announce("a", 1, 2, 0, {**announcement(0), **spoilt})["error"]["code"] == code
    assert scheduler.announce("a", 1, 2, 5, announcement(0))["error"]["code"] == "bad_announcement"


def test_ranks_that_differ_are_told_so() -> None:
    scheduler = announced()
    scheduler.announce("a", 1, 2, 1, announcement(1, request=PlanRequest()))
    assert scheduler.plan("a", 1)["error"]["code"] == "ranks_differ"


def test_after_a_restart_ranks_announce_again_and_keep_their_placement() -> None:
    before = announced().plan("a", 1)
    restarted = Scheduler()
    assert restarted.plan("a", 1, 3, rank=1)["error"]["code"] == "unknown_attempt"
    restarted.announce("a", 1, 2, 0, announcement(0, placement=before["placement"]))
    assert restarted.plan("a", 1, 3, rank=1)["error"]["code"] == "unknown_attempt"
    assert restarted.plan("a", 1, 3, rank=0) == {"waiting": 1}
    restarted.announce("a", 1, 2, 1, announcement(1))
    assert restarted.plan("a", 1, 3, rank=1)["placement"] == before["placement"]


def test_devices_are_listed_and_jobs_forgotten() -> None:
    scheduler = announced()
    listed = scheduler.devices()
    assert [(d["job"], d["attempt"], d["rank"]) for d in listed] == [("a", 1, 0), ("a", 1, 1)]
    assert scheduler.forget("a") == 1
    assert scheduler.devices() == []
    assert scheduler.forget("a") == 0


def test_old_attempts_are_dropped() -> None:
    scheduler = Scheduler()
    for attempt in range(MAX_ATTEMPTS + 3):
        scheduler.announce("a", attempt, 2, 0, announcement(0))
    assert {d["attempt"] for d in scheduler.devices()} == set(range(3, MAX_ATTEMPTS + 3))


@pytest.fixture
def ray_dir() -> Iterator[str]:
    """A folder whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="d2ft", ignore_cleanup_errors=True) as path:
        yield path


@pytest.mark.filterwarnings("default")
def test_the_actor_is_one_per_cluster_and_answers_over_ray(ray_dir: str) -> None:
    options = {"num_cpus": 1, "include_dashboard": False, "log_to_driver": False, "_temp_dir": ray_dir}
    ray.init("local", namespace=NAMESPACE, **options)
    try:
        first, again = actor.connect(), actor.connect()
        for rank in range(2):
            ray.get(first.announce.remote("a", 1, 2, rank, announcement(rank)), timeout=60)
        answer = ray.get(again.plan.remote("a", 1), timeout=60)
        assert Plan.from_dict(answer).placement.num_workers == 2
        assert len(ray.get(ray.get_actor(NAME).devices.remote(), timeout=60)) == 2
    finally:
        ray.shutdown()
