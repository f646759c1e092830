"""The scheduler answers for many jobs, solves once per window, and says what is wrong instead of raising."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from scheduler import actor
from scheduler.actor import MAX_ATTEMPTS, NAME, NAMESPACE, Scheduler
from scheduler.book import read_book
from scheduler.domain import DeviceProfile, Placement, Plan, StepShape
from scheduler.request import Phase, PlanRequest
from tests.scheduler.fleet import fleet, vit_shape
from tests.scheduler.test_profiles import slower

SHAPE = vit_shape(4, 4, 64)
NOW = time.time()


def announcement(rank: int, workers: int = 2, request: PlanRequest | None = None, **more: Any) -> dict[str, Any]:
    """What one rank would send, through JSON."""
    worth = np.random.default_rng(7).exponential(size=(2, 4, 4))
    message = {
        "profile": {
            **asdict(fleet((1.0,) * workers, shape=SHAPE)[rank]),
            "device_id": f"box{rank}",
            "measured_at": NOW,
        },
        "scores": {"backward": (worth[0] * 10).tolist(), "forward": worth[1].tolist(), "samples": 10},
        "shape": asdict(SHAPE),
        "step": asdict(StepShape(5, 8)),
        "request": (request or PlanRequest(ratios=(3, 0, 2))).to_dict(),
        **more,
    }
    return json.loads(json.dumps(message))  # type: ignore[no-any-return]


def report_after(answer: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What every rank says after the window of a plan, through JSON."""
    report = {
        "profiles": {str(p["rank"]): p for p in answer["profiles"]},
        "worth": None,
        "worth_TLHM": None,
        "progress": 0.2,
        "steps_left": 1000,
        "measured": {"step_us": 1, "forecast_us": 1},
        "policy": answer["policy"],
        "placement": answer["placement"],
        **more,
    }
    return json.loads(json.dumps(report))  # type: ignore[no-any-return]


def slowed(answer: dict[str, Any], rank: int, factor: float) -> dict[str, Any]:
    """The profiles of an answer, with one worker's device so many times slower."""
    profiles = {str(p["rank"]): p for p in answer["profiles"]}
    profiles[str(rank)] = asdict(slower(DeviceProfile.from_dict(profiles[str(rank)]), factor))
    return profiles


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


def test_later_windows_keep_the_placement_and_take_new_worth() -> None:
    scheduler = announced(request=PlanRequest(ratios=(2, 3, 0)))
    first = scheduler.plan("a", 1, 0)
    turned = 1 / (np.asarray(announcement(0)["scores"]["backward"]) + 0.01)
    second = scheduler.plan("a", 1, 1, report_after(first, worth={"backward": (100 * turned).tolist()}))
    assert second["placement"] == first["placement"] and not second["change"]["migrated"]
    assert (second["version"], second["window"]) == (2, 1)
    assert second["cycle"] != first["cycle"]


def test_reasons_come_with_a_plan_and_not_again_with_its_like() -> None:
    scheduler = announced(request=PlanRequest(ratios=(2, 3, 0)))
    first = scheduler.plan("a", 1, 0)
    owners = [[head["owner"] for head in row] for row in first["told"]["heads"]]
    assert owners == first["placement"]["owners"] and len(first["told"]["devices"]) == 2
    assert first["told"]["gantt"]["step_us"] == first["forecast"]["step_us"]
    second = scheduler.plan("a", 1, 1, report_after(first))
    assert second["told"] is None and second["cycle"] == first["cycle"]
    worth = {"backward": announcement(0)["scores"]["backward"][::-1]}
    third = scheduler.plan("a", 1, 2, report_after(second, worth=worth))
    assert third["cycle"] != second["cycle"] and third["told"]["heads"] != first["told"]["heads"]


def test_a_slower_device_shows_in_the_forecast_of_the_next_window_and_loses_heads_in_the_one_after() -> None:
    scheduler = announced(request=PlanRequest())
    first = scheduler.plan("a", 1, 0)
    profiles = slowed(first, 0, 4.0)
    second = scheduler.plan("a", 1, 1, report_after(first, profiles=profiles))
    assert second["all_full"]["step_us"] > 2 * first["all_full"]["step_us"]
    assert not second["change"]["migrated"] and second["policy"]["strikes"] == 1
    third = scheduler.plan("a", 1, 2, report_after(second, profiles=profiles))
    change = third["change"]
    assert change["migrated"] and change["moved_heads"] > 0 and change["reason"]
    assert change["after"]["heads"][0] < change["before"]["heads"][0]
    assert third["forecast"]["step_us"] == change["after"]["step_us"] < change["before"]["step_us"]


def test_the_phase_of_a_schedule_follows_progress() -> None:
    schedule = (Phase(0.5, ratios=(2, 3, 0)), Phase(0.5))
    scheduler = announced(request=PlanRequest(schedule=schedule))
    first = scheduler.plan("a", 1, 0)
    assert Plan.from_dict(first).compute_fraction < 0.7
    late = scheduler.plan("a", 1, 1, report_after(first, progress=0.5))
    assert Plan.from_dict(late).compute_fraction == 1.0


def test_memory_is_what_was_free_before_the_model_was_placed() -> None:
    scheduler = announced()
    first = scheduler.plan("a", 1, 0)
    profiles = {rank: {**p, "free_bytes": 1} for rank, p in report_after(first)["profiles"].items()}
    second = scheduler.plan("a", 1, 1, report_after(first, profiles=profiles))
    assert [p["free_bytes"] for p in second["profiles"]] == [p["free_bytes"] for p in first["profiles"]]


def test_concurrent_callers_have_it_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, calls, answers = announced(), [], []
    solve = actor.first_plan
    monkeypatch.setattr(actor, "first_plan", lambda *args, **kwargs: calls.append(1) or solve(*args, **kwargs))
    threads = [threading.Thread(target=lambda: answers.append(scheduler.plan("a", 1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert all(answer is answers[0] for answer in answers)


def test_while_one_job_is_solved_another_may_announce(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, solving, go_on = announced(), threading.Event(), threading.Event()
    solve = actor.first_plan

    def slowly(*args: Any, **kwargs: Any) -> Plan:
        solving.set()
        assert go_on.wait(10)
        return solve(*args, **kwargs)

    monkeypatch.setattr(actor, "first_plan", slowly)
    thread = threading.Thread(target=scheduler.plan, args=("a", 1))
    thread.start()
    assert solving.wait(10)
    assert scheduler.announce("b", 1, 2, 0, announcement(0))["announced"] == 1
    assert scheduler.devices()
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
        ({"profile": {}}, "bad_profile"),
        ({"scores": {"backward": "many", "forward": [], "samples": 1}}, "bad_announcement"),
        ({"scores": {"backward": [[1.0]], "forward": [[1.0]], "samples": 1}}, "bad_announcement"),
        ({"scores": None}, "bad_announcement"),
        ({"request": {"strategy": "greedy"}}, "unknown_strategy"),
    ],
)
def test_a_bad_announcement_is_refused(spoilt: dict[str, Any], code: str) -> None:
    scheduler = Scheduler()
    assert scheduler.announce("a", 1, 2, 0, {**announcement(0), **spoilt})["error"]["code"] == code
    assert scheduler.announce("a", 1, 2, 5, announcement(0))["error"]["code"] == "bad_announcement"


@pytest.mark.parametrize(
    ("spoilt", "field"),
    [
        ({"sum_us": float("nan")}, "sum_us"),
        ({"free_bytes": 0}, "free_bytes"),
        ({"measured_at": NOW - 7200}, "measured_at"),
    ],
)
def test_a_profile_that_no_plan_can_rest_on_is_refused_by_field(spoilt: dict[str, Any], field: str) -> None:
    message = announcement(1)
    message["profile"].update(spoilt)
    error = Scheduler().announce("a", 1, 2, 1, message)["error"]
    assert (error["code"], error["param"]) == ("bad_profile", f"profile.{field}")
    assert "Worker 1 (cpu on node1)" in error["message"]


def test_a_spoilt_report_is_an_answer_too() -> None:
    scheduler = announced()
    first = scheduler.plan("a", 1, 0)
    spoilt = report_after(first)
    spoilt["profiles"]["0"]["mlp_forward_us"][1] = None
    assert scheduler.plan("a", 1, 1, spoilt)["error"]["code"] == "bad_profile"
    assert scheduler.plan("a", 1, 2, report_after(first, policy={"strikes": 1}))["error"]["code"] == "bad_report"


def test_ranks_that_differ_are_told_so() -> None:
    scheduler = announced()
    scheduler.announce("a", 1, 2, 1, announcement(1, request=PlanRequest()))
    assert scheduler.plan("a", 1)["error"]["code"] == "ranks_differ"


def again(answer: dict[str, Any], workers: int = 2, **more: Any) -> Scheduler:
    """A scheduler that has lost its memory, after all ranks announced again with the placement of their last plan."""
    return announced(workers=workers, placement=answer["placement"], **more)


def test_after_a_restart_the_same_plan_and_version_come_back() -> None:
    request = PlanRequest(ratios=(2, 3, 0))
    before = announced(request=request)
    first = before.plan("a", 1, 0)
    reports = [report_after(first, profiles=slowed(first, 0, 4.0))]
    second = before.plan("a", 1, 1, reports[0])
    reports.append(report_after(second, profiles=slowed(first, 0, 4.0)))
    third = before.plan("a", 1, 2, reports[1])
    assert timeless(again(first, request=request).plan("a", 1, 0)) == timeless(first)
    assert timeless(again(first, request=request).plan("a", 1, 1, reports[0])) == timeless(second)
    assert timeless(again(second, request=request).plan("a", 1, 2, reports[1])) == timeless(third)


def timeless(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without how long its solvers took, and without what is told again only after a restart."""
    answer = json.loads(json.dumps(answer))
    del answer["told"]
    for report in ("placement_report", "selection_report"):
        answer[report].pop("seconds")
    return answer


def test_ranks_that_were_answered_before_a_restart_bind_the_others() -> None:
    first = announced(request=PlanRequest()).plan("a", 1, 0)
    other = np.asarray(first["placement"]["owners"])[::-1].tolist()
    told = Placement.make(1 - np.asarray(other), 2).to_dict()
    restarted = Scheduler()
    restarted.announce("a", 1, 2, 0, announcement(0, request=PlanRequest(), placement=told))
    restarted.announce("a", 1, 2, 1, announcement(1, request=PlanRequest(), placement=first["placement"]))
    report = report_after(first)
    answer = restarted.plan("a", 1, 1, report)
    assert answer["placement"] == told and answer["change"]["moved_heads"] > 0
    # The announcements are of that one moment: later windows are free again.
    later = restarted.plan("a", 1, 2, report_after(answer))
    assert later["placement"] == told or later["change"]["migrated"]


def test_after_a_restart_each_rank_is_told_to_announce() -> None:
    before = announced().plan("a", 1)
    restarted = Scheduler()
    assert restarted.plan("a", 1, 3, rank=1)["error"]["code"] == "unknown_attempt"
    restarted.announce("a", 1, 2, 0, announcement(0, placement=before["placement"]))
    assert restarted.plan("a", 1, 3, rank=1)["error"]["code"] == "unknown_attempt"
    assert restarted.plan("a", 1, 3, rank=0) == {"waiting": 1}


def test_a_long_attempt_may_announce_its_old_profile_again() -> None:
    placement = announced().plan("a", 1)["placement"]
    message = announcement(0, placement=placement)
    message["profile"]["measured_at"] = NOW - 100_000
    assert "error" not in Scheduler().announce("a", 1, 2, 0, message)


def test_devices_outlive_their_job_and_say_who_has_them(tmp_path: Path) -> None:
    scheduler = Scheduler(str(tmp_path))
    for rank in range(2):
        scheduler.announce("a", 1, 2, rank, announcement(rank))
    listed = scheduler.devices()
    assert [(d["id"], d["used_by"]) for d in listed] == [
        ("box0", [{"job": "a", "attempt": 1, "rank": 0}]),
        ("box1", [{"job": "a", "attempt": 1, "rank": 1}]),
    ]
    assert 0 <= listed[0]["age_s"] < 600 and listed[0]["forward_flops_per_s"] > 0
    assert scheduler.forget("a") == 1 and scheduler.forget("a") == 0
    reopened = Scheduler(str(tmp_path)).devices()
    assert [(d["id"], d["used_by"]) for d in reopened] == [("box0", []), ("box1", [])]


def test_a_window_teaches_the_book() -> None:
    scheduler = announced(request=PlanRequest())
    first = scheduler.plan("a", 1, 0)
    before = scheduler.devices()[0]["forward_flops_per_s"]
    profiles = slowed(first, 0, 4.0)
    profiles["0"]["measured_at"] = NOW + 60
    scheduler.plan("a", 1, 1, report_after(first, profiles=profiles))
    assert scheduler.devices()[0]["forward_flops_per_s"] < 0.5 * before


def test_answers_of_old_windows_are_let_go() -> None:
    scheduler = announced()
    answer = scheduler.plan("a", 1, 0)
    for window in range(1, 6):
        answer = scheduler.plan("a", 1, window, report_after(answer))
    assert sorted(scheduler._attempts["a", 1].answers) == [3, 4, 5]


def test_old_attempts_are_dropped() -> None:
    scheduler = Scheduler()
    for attempt in range(MAX_ATTEMPTS + 3):
        scheduler.announce("a", attempt, 2, 0, announcement(0))
    assert [key[1] for key in scheduler._attempts] == list(range(3, MAX_ATTEMPTS + 3))


@pytest.fixture
def ray_dir() -> Iterator[str]:
    """A folder whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="d2ft", ignore_cleanup_errors=True) as path:
        yield path


@pytest.mark.filterwarnings("default")
def test_the_actor_is_one_per_cluster_and_killed_mid_answer_gives_the_same_plan_again(ray_dir: str) -> None:
    options: dict[str, Any] = {"num_cpus": 1, "include_dashboard": False, "log_to_driver": False, "_temp_dir": ray_dir}
    ray.init("local", namespace=NAMESPACE, **options)
    try:
        book = Path(ray_dir) / "scheduler"
        first, again = actor.connect(str(book)), actor.connect(str(book))
        request = PlanRequest(ratios=(2, 3, 0))

        def ask(window: int, report: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
            """As a worker does: told that it is unknown, it announces again."""
            answer = ray.get(again.plan.remote("a", 1, window, report, 0), timeout=60)
            if answer.get("error", {}).get("code") == "unknown_attempt":
                for rank in range(2):
                    ray.get(first.announce.remote("a", 1, 2, rank, announcement(rank, request=request, **more)))
                answer = ray.get(again.plan.remote("a", 1, window, report, 0), timeout=60)
            return answer  # type: ignore[no-any-return]

        plan = ask(0, None, {})
        assert Plan.from_dict(plan).placement.num_workers == 2
        report = report_after(plan, profiles=slowed(plan, 0, 4.0))
        second = ask(1, report, {})
        ray.kill(again, no_restart=False)
        killed = ask(1, report, {"placement": plan["placement"]})
        assert timeless(killed) == timeless(second) and killed["version"] == 2
        in_flight = again.plan.remote("a", 1, 2, report_after(second, profiles=slowed(plan, 0, 4.0)), 0)
        ray.kill(again, no_restart=False)
        ray.get(in_flight, timeout=60)
        third = ask(2, report_after(second, profiles=slowed(plan, 0, 4.0)), {"placement": plan["placement"]})
        assert third["version"] == 3
        devices: list[dict[str, Any]] = ray.get(ray.get_actor(NAME).devices.remote(), timeout=60)
        assert [d["id"] for d in devices] == ["box0", "box1"] == [r.id for r in read_book(book / "devices.json")]
    finally:
        ray.shutdown()
