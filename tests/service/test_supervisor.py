"""The supervisor against a fake of the Jobs API: whatever is lost, killed or repeated, a job ends once and rightly."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable

import pytest

from service.lifecycle import JobState
from service.ray_jobs import RayJob, RayJobs
from service.settings import Settings
from service.store import Attempt, Store
from service.store.access import FIRST_USER
from service.supervisor import Step, Supervisor, decide
from service.tail import read_batch
from tests.service.bench import Bench, sid
from tests.service.conftest import FakeRay
from workers.contract import JobSpec, RunContext
from workers.sweeps.contract import SweepContext, SweepSpec


@pytest.fixture
def bench(settings: Settings, store: Store, ray: FakeRay) -> Bench:
    return Bench(settings, store, ray)


def test_a_queued_job_becomes_one_ray_job_with_its_context(bench: Bench) -> None:
    job_id = bench.submit(steps=3)
    bench.looks(3)
    assert bench.ray.submits == [sid(job_id)]
    sent = bench.ray.jobs[sid(job_id)]
    path = bench.settings.attempt_dir(job_id, 1) / "context.json"
    assert sent["entrypoint"].endswith(f"-m workers.loop --context {path}")
    env = sent["runtime_env"]["env_vars"]
    assert env["RAY_JOB_STOP_SIGNAL"] == "SIGTERM" and env["OMP_NUM_THREADS"] == "1" and env["PYTHONPATH"]
    assert env["D2FT_SERVICE_HOME"] == str(bench.settings.home)
    context = RunContext.model_validate_json(path.read_text())
    assert context.job_id == job_id and context.spec.steps == 3 and not context.use_gpu
    assert path.stat().st_mode & 0o077 == 0
    assert bench.job(job_id).status == "starting"


def test_a_sweep_becomes_a_driver_that_knows_where_to_ask_for_jobs(bench: Bench) -> None:
    spec = SweepSpec.model_validate({"job": {"steps": 3}, "space": {"seed": {"values": [1, 2]}}})
    sweep_id = bench.store.sweeps.create(spec, owner=FIRST_USER)[0].id
    job_id = bench.submit(steps=3)
    bench.looks(2)
    assert set(bench.ray.submits) == {sid(sweep_id), sid(job_id)}, "a sweep takes no place of a job"
    path = bench.settings.attempt_dir(sweep_id, 1) / "context.json"
    assert bench.ray.jobs[sid(sweep_id)]["entrypoint"].endswith(f"-m workers.sweep --context {path}")
    context = SweepContext.model_validate_json(path.read_text())
    assert context.sweep_id == sweep_id and context.spec == spec and path.stat().st_mode & 0o077 == 0
    assert context.post_url == f"{bench.settings.url}/v1/runs" and context.post_token
    bench.ray.set_status(sid(sweep_id), "FAILED", "exit code 9")
    bench.looks(4)
    again = SweepContext.model_validate_json((bench.settings.attempt_dir(sweep_id, 2) / "context.json").read_text())
    assert again.storage_path == context.storage_path and again.run_dir != context.run_dir
    assert again.post_token != context.post_token
    bench.store.sweeps.cancel(sweep_id)
    bench.looks(2)
    told = json.loads((bench.settings.attempt_dir(sweep_id, 2) / "control.json").read_text())
    assert told["want"] == "cancel" and bench.ray.stops == [sid(sweep_id, 2)]
    assert bench.store.sweeps.get(sweep_id).status == "cancelled"


def test_a_run_is_told_where_mlflow_is(settings: Settings, store: Store, ray: FakeRay) -> None:
    told = settings.model_copy(update={"mlflow_tracking_uri": "http://mlflow.example:5000"})
    for each, expected in ((told, "http://mlflow.example:5000"), (settings, None)):
        bench = Bench(each, store, ray)
        job_id = bench.submit(steps=3)
        bench.looks(3)
        env = ray.jobs[sid(job_id)]["runtime_env"]["env_vars"]
        assert env.get("MLFLOW_TRACKING_URI") == expected
        with bench.events(job_id) as events:
            events.emit("outcome", status="succeeded", error=None)
        ray.set_status(sid(job_id), "SUCCEEDED")
        bench.looks(3)


def test_a_run_is_followed_to_its_success_and_settled(bench: Bench) -> None:
    job_id = bench.submit(steps=2)
    bench.looks()
    with bench.events(job_id) as events:
        events.emit("phase", name="planning")
        events.emit("phase", name="running")
        bench.looks()
        assert bench.job(job_id).status == "running"
        events.emit("metrics", step=1, total_steps=2, loss=1.0)
        events.emit("outcome", status="succeeded", error=None)
    bench.looks()
    assert bench.job(job_id).status == "succeeded"
    assert bench.store.attempts.open()[0].state == "ended"  # Ray still runs the driver
    bench.ray.set_status(sid(job_id), "SUCCEEDED")
    bench.looks()
    assert bench.store.attempts.open() == []
    assert "last words" in (bench.settings.attempt_dir(job_id, 1) / "logs" / "driver.log").read_text()


def test_the_next_job_waits_until_the_devices_are_free(bench: Bench) -> None:
    first, second = bench.submit(), bench.submit()
    bench.looks()
    with bench.events(first) as events:
        events.emit("outcome", status="succeeded", error=None)
    bench.looks(2)
    assert bench.job(first).status == "succeeded" and bench.job(second).status == "queued"
    bench.ray.set_status(sid(first), "SUCCEEDED")
    bench.looks(2)
    assert bench.job(second).status == "starting"


def test_a_lost_reply_to_the_submit_makes_no_second_run(bench: Bench) -> None:
    job_id = bench.submit()
    bench.ray.lose_reply = True
    bench.looks()
    assert bench.job(job_id).status == "planning"
    bench.looks()  # "already exists" is success
    assert bench.job(job_id).status == "starting" and bench.job(job_id).status_reason is None
    assert list(bench.ray.jobs) == [sid(job_id)]


def test_a_crash_without_a_last_word_fails_with_the_end_of_the_log(bench: Bench) -> None:
    bench.store.attempts._max_faults = 0
    job_id = bench.submit()
    bench.looks()
    with bench.events(job_id) as events:
        events.emit("phase", name="running")
    bench.ray.set_status(sid(job_id), "FAILED", "exit code 13, last available logs: noise")
    bench.looks()
    error = bench.job(job_id).error
    assert error and error.code == "driver_died" and error.fault == "system"
    assert "exit code 13" in error.message and "last words" in error.message and "noise" not in error.message


def test_a_last_word_counts_even_when_ray_says_failed(bench: Bench) -> None:
    job_id = bench.submit()
    bench.looks()
    with bench.events(job_id) as events:
        events.emit(
            "outcome", status="failed", error={"code": "bad_image", "fault": "user", "message": "m", "param": "dataset"}
        )
    bench.ray.set_status(sid(job_id), "FAILED")
    bench.looks()
    error = bench.job(job_id).error
    assert error and (error.code, error.fault, error.param) == ("bad_image", "user", "dataset")


def test_a_run_that_goes_on_while_the_api_is_down_loses_nothing(bench: Bench) -> None:
    job_id = bench.submit(steps=50)
    bench.looks()
    with bench.events(job_id) as events:
        events.emit("phase", name="running")
        for step in range(1, 20):
            events.emit("metrics", step=step, total_steps=50)
        bench.looks()
        for step in range(20, 51):
            events.emit("metrics", step=step, total_steps=50)
        events.emit("outcome", status="succeeded", error=None)
    bench.ray.set_status(sid(job_id), "SUCCEEDED")
    bench.looks()
    assert bench.job(job_id).status == "succeeded"
    assert [row["step"] for row in bench.store.records.metrics(job_id, max_points=100).data] == list(range(1, 51))
    assert bench.ray.submits == [sid(job_id)]


def test_a_torn_last_line_waits_until_it_is_whole(bench: Bench) -> None:
    job_id = bench.submit()
    bench.looks()
    path = bench.settings.attempt_dir(job_id, 1) / "events.jsonl"
    whole = json.dumps(
        {"seq": 1, "at": 1.0, "type": "phase", "level": "info", "message": "", "data": {"name": "running"}}
    )
    path.write_text(whole[:30])
    bench.looks()
    assert bench.job(job_id).status == "starting"
    path.write_text(whole + "\n")
    bench.looks()
    assert bench.job(job_id).status == "running"


def test_a_line_that_is_no_event_does_not_hide_those_after_it(bench: Bench) -> None:
    path = bench.settings.home / "events.jsonl"
    path.write_bytes(b'{"seq":1,"type":"a"}\nnot json\n[1]\n{"seq":2,"type":"b"}\n\xff\n{"seq":3,"type":"c"}\n')
    seen, offset = [], 0
    while (batch := read_batch(path, offset)).offset != offset:
        seen += [event["type"] for event in batch.events]
        offset = batch.offset
    assert seen == ["a", "b", "c"] and offset == path.stat().st_size


def test_a_line_torn_by_a_kill_costs_no_line_after_it(bench: Bench) -> None:
    job_id = bench.submit()
    bench.looks()
    with bench.events(job_id) as events:
        events.emit("phase", name="running")
    with events.path.open("a") as file:
        file.write('{"seq":2,"at":1,"ty')
    bench.looks()
    with bench.events(job_id) as events:
        events.emit("outcome", status="succeeded", error=None)
    bench.looks()
    assert bench.job(job_id).status == "succeeded"


def test_what_json_cannot_carry_is_written_out(bench: Bench) -> None:
    path = bench.settings.home / "events.jsonl"
    path.write_text('{"seq":1,"type":"data.skipped","data":{"files":["a\\udcff.jpg"],"loss":NaN}}\n')
    (event,) = read_batch(path, 0).events
    assert event["data"] == {"files": ["a\\udcff.jpg"], "loss": None}


def test_cancel_stops_the_driver_and_is_done_when_it_is_gone(bench: Bench) -> None:
    job_id = bench.submit()
    bench.looks()
    bench.store.actions.cancel(job_id)
    bench.looks()
    assert bench.ray.stops == [sid(job_id)] and bench.job(job_id).status == "cancelling"
    bench.looks(2)
    assert bench.job(job_id).status == "cancelled" and bench.store.attempts.open() == []


def test_cancel_before_ray_has_heard_of_the_job_needs_no_stop(bench: Bench) -> None:
    job_id = bench.submit()
    attempt = bench.store.queue.claim(1)
    assert attempt
    bench.store.actions.cancel(job_id)
    bench.looks(2)
    assert bench.job(job_id).status == "cancelled" and bench.ray.submits == []


def test_a_run_that_finished_before_the_stop_reached_it_has_succeeded(bench: Bench) -> None:
    job_id = bench.submit()
    bench.looks()
    bench.store.actions.cancel(job_id)
    with bench.events(job_id) as events:
        events.emit("outcome", status="succeeded", error=None)
    bench.looks()
    assert bench.job(job_id).status == "succeeded"


def test_without_ray_jobs_wait_and_say_why_once(bench: Bench) -> None:
    job_id = bench.submit()
    bench.ray.down = True
    bench.looks(3)
    job = bench.job(job_id)
    assert job.status == "queued" and job.status_reason and "does not answer" in job.status_reason
    assert len(bench.store.records.events(job_id).data) == 3
    bench.ray.down = False
    bench.looks()
    assert bench.job(job_id).status == "starting" and bench.job(job_id).status_reason is None


def test_events_are_followed_while_ray_does_not_answer(bench: Bench) -> None:
    job_id = bench.submit()
    bench.looks()
    bench.ray.down = True
    with bench.events(job_id) as events:
        events.emit("phase", name="running")
    bench.looks()
    job = bench.job(job_id)
    assert job.status == "running" and job.status_reason
    bench.ray.down = False
    bench.looks()
    assert bench.job(job_id).status_reason is None


def test_a_driver_that_outlives_its_job_is_stopped(bench: Bench) -> None:
    bench.settings = bench.settings.model_copy(update={"settle_s": 0.0})
    job_id = bench.submit()
    bench.looks()
    with bench.events(job_id) as events:
        events.emit("outcome", status="succeeded", error=None)
    bench.looks(3)
    assert bench.ray.stops == [sid(job_id)] and bench.store.attempts.open() == []
    assert bench.job(job_id).status == "succeeded"


def test_a_driver_of_ours_that_nobody_follows_is_stopped_and_others_are_left(bench: Bench) -> None:
    ours = {"submission_id": "job-lost-a1", "status": "RUNNING", "metadata": {"home": str(bench.settings.home)}}
    others = {"submission_id": "job-other-a1", "status": "RUNNING", "metadata": {"home": "/elsewhere"}}
    bench.ray.jobs = {"job-lost-a1": ours, "job-other-a1": others}
    bench.looks()
    assert bench.ray.stops == ["job-lost-a1"]


def test_a_fault_in_one_look_is_said_on_the_job_and_harms_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench.settings = bench.settings.model_copy(update={"max_running": 2})
    first, second = bench.submit(), bench.submit()
    bench.looks()
    read_events = Supervisor._read_events

    def broken(self: Supervisor, attempt: Attempt) -> Awaitable[Attempt]:
        if attempt.job_id == first:
            raise ZeroDivisionError
        return read_events(self, attempt)

    monkeypatch.setattr(Supervisor, "_read_events", broken)
    with bench.events(second) as events:
        events.emit("phase", name="running")
    bench.looks()
    assert "ZeroDivisionError" in (bench.job(first).status_reason or "")
    assert bench.job(second).status == "running"


def test_the_loop_outlives_whatever_a_look_raises(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    async def broken(self: Supervisor) -> None:
        looked.append(1)
        raise MemoryError

    monkeypatch.setattr(Supervisor, "look", broken)

    async def run() -> None:
        jobs = RayJobs("http://ray", None, bench.ray.transport())
        loop = asyncio.create_task(Supervisor(bench.settings, bench.store, jobs).run())
        while len(looked) < 3:
            await asyncio.sleep(0.01)
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
        await jobs.close()

    asyncio.run(asyncio.wait_for(run(), 5))


def test_a_run_is_asked_to_pause_and_goes_on_from_its_checkpoint(bench: Bench) -> None:
    job_id = bench.submit(steps=8)
    bench.looks()
    with bench.events(job_id) as events:
        events.emit("phase", name="running")
        bench.looks()
        bench.store.actions.pause(job_id)
        bench.looks()
        control = bench.settings.attempt_dir(job_id, 1) / "control.json"
        assert json.loads(control.read_text()) == {"want": "pause"} and bench.ray.stops == []
        events.emit("checkpoint.saved", name="step-00000003", path="/c/3", step=3, bytes=9, sha256="00")
        events.emit("outcome", status="paused", error=None)
    bench.ray.set_status(sid(job_id), "SUCCEEDED")
    bench.looks(2)
    assert bench.job(job_id).status == "paused" and bench.store.attempts.open() == []
    bench.store.actions.resume(job_id)
    bench.looks()
    context = json.loads((bench.settings.attempt_dir(job_id, 2) / "context.json").read_text())
    assert context["resume_from"] == str(bench.settings.storage / "checkpoints" / job_id)
    first = json.loads((bench.settings.attempt_dir(job_id, 1) / "context.json").read_text())
    assert first["resume_from"] is None and first["post_token"] != context["post_token"]


def test_a_run_that_has_not_begun_is_stopped_to_be_paused(bench: Bench) -> None:
    job_id = bench.submit()
    bench.looks()
    bench.store.actions.pause(job_id)
    bench.looks(2)
    assert bench.ray.stops == [sid(job_id)] and bench.job(job_id).status == "paused"


def test_a_run_that_dies_while_it_pauses_is_paused_and_says_so(bench: Bench) -> None:
    job_id = bench.submit()
    bench.looks()
    with bench.events(job_id) as events:
        events.emit("phase", name="running")
    bench.looks()
    bench.store.actions.pause(job_id)
    bench.ray.set_status(sid(job_id), "FAILED")
    bench.looks()
    assert bench.job(job_id).status == "paused"
    assert "without a word" in bench.store.records.events(job_id).data[-1].message


def test_a_lower_job_makes_room_and_goes_on_afterwards(bench: Bench) -> None:
    bench.settings = bench.settings.model_copy(update={"preempt_after_s": 0.0})
    low, high = bench.submit(priority=-5), ""
    bench.looks()
    with bench.events(low) as events:
        events.emit("phase", name="running")
        bench.looks()
        high = bench.submit()
        bench.looks(2)
        assert bench.job(low).status == "pausing"
        events.emit("outcome", status="paused", error=None)
    bench.ray.set_status(sid(low), "SUCCEEDED")
    bench.looks(2)
    assert bench.job(low).status == "queued" and bench.job(high).status == "starting"
    bench.ray.set_status(sid(high), "SUCCEEDED")
    with bench.events(high) as events:
        events.emit("outcome", status="succeeded", error=None)
    bench.looks(3)
    assert list(bench.ray.jobs) == [sid(low), sid(high), sid(low, 2)]


def test_a_job_larger_than_the_cluster_waits_and_says_what_it_needs(bench: Bench) -> None:
    large, small = bench.submit(workers=100), bench.submit(workers=4)
    bench.looks(3)
    assert bench.job(small).status == "starting"
    assert bench.job(large).status_reason == (
        "100 workers need 50 CPU, and the whole cluster has 2; waits for more nodes."
    )


def test_a_nudge_brings_the_next_look_but_not_many(bench: Bench) -> None:
    async def run() -> int:
        jobs = RayJobs("http://ray", "token", bench.ray.transport())
        supervisor = Supervisor(bench.settings.model_copy(update={"poll_s": 60.0}), bench.store, jobs)
        looks = 0

        async def look() -> None:
            nonlocal looks
            looks += 1

        supervisor.look = look  # type: ignore[method-assign]
        running = asyncio.create_task(supervisor.run())
        for _ in range(50):
            await asyncio.sleep(0.01)
            supervisor.nudge()
        await asyncio.sleep(0.3)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await jobs.close()
        return looks

    assert 2 <= asyncio.run(run()) <= 5


def test_of_two_supervisors_on_one_store_one_looks(bench: Bench) -> None:
    async def run() -> None:
        jobs = RayJobs("http://ray", "token", bench.ray.transport())
        first, second = (Supervisor(bench.settings, bench.store, jobs) for _ in range(2))
        assert await first._leads() and not await second._leads() and await first._leads()
        await jobs.close()

    asyncio.run(run())


def test_gpus_are_used_where_the_cluster_has_them(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resources(self: RayJobs) -> dict[str, float]:
        return {"CPU": 2.0, "GPU": 2.0}

    monkeypatch.setattr(RayJobs, "resources", resources)
    bench.settings = bench.settings.model_copy(update={"use_gpu": None})
    job_id = bench.submit()
    bench.looks()
    context = json.loads((bench.settings.attempt_dir(job_id, 1) / "context.json").read_text())
    assert context["use_gpu"] and context["resources_per_worker"]["GPU"] == 1


@pytest.mark.parametrize(
    ("state", "job_state", "status", "step"),
    [
        ("created", JobState.PLANNING, None, Step.SUBMIT),
        ("created", JobState.PLANNING, "RUNNING", Step.SUBMIT),
        ("created", JobState.PLANNING, "FAILED", Step.DIED),
        ("created", JobState.CANCELLING, None, Step.CANCELLED),
        ("created", JobState.CANCELLING, "PENDING", Step.STOP),
        ("submitted", JobState.RUNNING, "PENDING", Step.WAIT),
        ("submitted", JobState.RUNNING, "RUNNING", Step.WAIT),
        ("submitted", JobState.RUNNING, "SUCCEEDED", Step.DIED),
        ("submitted", JobState.RUNNING, "STOPPED", Step.DIED),
        ("submitted", JobState.RUNNING, None, Step.DIED),
        ("submitted", JobState.CANCELLING, "RUNNING", Step.STOP),
        ("submitted", JobState.CANCELLING, "STOPPED", Step.CANCELLED),
        ("submitted", JobState.PAUSING, "RUNNING", Step.ASK_PAUSE),
        ("submitted", JobState.PAUSING, "SUCCEEDED", Step.PAUSED),
        ("created", JobState.PAUSING, None, Step.PAUSED),
        ("ended", JobState.SUCCEEDED, "RUNNING", Step.WAIT),
        ("ended", JobState.SUCCEEDED, "SUCCEEDED", Step.SETTLE),
        ("ended", JobState.FAILED, None, Step.SETTLE),
    ],
)
def test_what_is_decided(store: Store, state: str, job_state: JobState, status: str | None, step: Step) -> None:
    store.jobs.create(JobSpec(), owner=FIRST_USER)
    claimed = store.queue.claim(1)
    assert claimed
    attempt = dataclasses.replace(claimed, state=state, job_state=job_state, ended_at=99.0)
    ray_job = None if status is None else RayJob(attempt.submission_id, status, "", {})
    assert decide(attempt, ray_job, now=100.0, settle_s=30.0) is step
    if step is Step.ASK_PAUSE:
        idle = dataclasses.replace(attempt, want="stop")
        assert decide(idle, ray_job, now=100.0, settle_s=30.0) is Step.STOP
    if step is Step.SUBMIT and status is None:
        spoken = dataclasses.replace(attempt, events_offset=7)
        assert decide(spoken, None, now=100.0, settle_s=30.0) is Step.DIED
    if (state, status) == ("ended", "RUNNING"):
        assert decide(attempt, ray_job, now=200.0, settle_s=30.0) is Step.STOP
