"""Planner processes: bounded, killed when they hang or nobody waits for them, and made again when they die."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import psutil
import pytest

from scheduler.errors import UserError
from service.errors import TooManyError, UnavailableError
from service.home import make_home
from service.planners import Planners
from service.settings import Settings
from tests.service.fake_planner import SLOW_S

FAKE = [sys.executable, "-m", "tests.service.fake_planner"]
DIES, HANGS, REFUSES, SLOW, BABBLES = 1, 2, 3, 4, 5

Play = Callable[[Callable[[Planners], Awaitable[Any]]], Any]


def request(seed: int = 0) -> dict[str, Any]:
    return {"plan": {"seed": seed}}


@pytest.fixture
def play(settings: Settings) -> Play:
    """Run a scene with planners, one process and two places before it, and end them."""
    settings = settings.model_copy(update={"plan_queue": 2, "plan_timeout_s": 20})
    make_home(settings.home)

    def run(scene: Callable[[Planners], Awaitable[Any]], **changes: Any) -> Any:
        async def whole() -> Any:
            planners = Planners(settings.model_copy(update=changes), FAKE)
            try:
                return await scene(planners)
            finally:
                await planners.close()

        return asyncio.run(asyncio.wait_for(whole(), 60))

    return run


def test_one_process_answers_one_request_after_the_other(play: Play) -> None:
    async def scene(planners: Planners) -> None:
        answers = [await planners.what_if(request()) for _ in range(3)]
        assert len({answer["pid"] for answer in answers}) == 1
        assert answers[0]["asked"] == request()

    play(scene)


def test_more_than_the_bound_are_refused_at_once_and_the_others_served(play: Play) -> None:
    async def scene(planners: Planners) -> None:
        await planners.what_if(request())
        began = time.monotonic()
        asked = [asyncio.create_task(planners.what_if(request(SLOW))) for _ in range(50)]
        done = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(answer, dict) for answer in done) == 3
        assert sum(isinstance(answer, TooManyError) for answer in done) == 47
        assert time.monotonic() - began >= 3 * SLOW_S
        assert "pid" in await planners.what_if(request())

    play(scene)


def test_a_process_that_dies_is_said_and_another_takes_its_place(play: Play) -> None:
    async def scene(planners: Planners) -> None:
        first = await planners.what_if(request())
        with pytest.raises(UnavailableError) as died:
            await planners.what_if(request(DIES))
        assert died.value.code == "planner_died"
        assert (await planners.what_if(request()))["pid"] != first["pid"]

    play(scene)


def test_a_process_killed_while_idle_costs_at_most_one_request(play: Play) -> None:
    async def scene(planners: Planners) -> None:
        psutil.Process((await planners.what_if(request()))["pid"]).kill()
        await asyncio.sleep(0.1)
        assert "pid" in await planners.what_if(request())

    play(scene)


def test_one_that_hangs_is_ended_in_time(play: Play) -> None:
    async def scene(planners: Planners) -> None:
        with pytest.raises(UnavailableError) as late:
            await planners.what_if(request(HANGS))
        assert late.value.code == "plan_timeout" and "D2FT_PLAN_TIMEOUT_S" in str(late.value.remedy)
        planners._timeout_s = 20
        assert "pid" in await planners.what_if(request())

    play(lambda planners: scene(_hasty(planners)))


def _hasty(planners: Planners) -> Planners:
    planners._timeout_s = 0.8
    return planners


def test_a_cancelled_request_frees_its_place_whether_it_runs_or_waits(play: Play) -> None:
    async def scene(planners: Planners) -> None:
        pid = (await planners.what_if(request()))["pid"]
        running = asyncio.create_task(planners.what_if(request(HANGS)))
        waiting = [asyncio.create_task(planners.what_if(request())) for _ in range(2)]
        await asyncio.sleep(0.1)
        with pytest.raises(TooManyError):
            await planners.what_if(request())
        waiting[0].cancel()
        await asyncio.sleep(0)
        last = asyncio.create_task(planners.what_if(request()))
        running.cancel()
        assert "pid" in await waiting[1] and "pid" in await last
        assert not psutil.pid_exists(pid)
        assert planners._inside == 0

    play(scene)


def test_the_planners_errors_come_back_in_the_words_of_the_request(play: Play) -> None:
    async def scene(planners: Planners) -> None:
        with pytest.raises(UserError) as refused:
            await planners.what_if(request(REFUSES))
        assert refused.value.param == "devices" and refused.value.code == "memory"

    play(scene)


def test_an_answer_that_is_none_ends_the_process_that_gave_it(play: Play) -> None:
    async def scene(planners: Planners) -> None:
        with pytest.raises(UnavailableError):
            await planners.what_if(request(BABBLES))
        assert (await planners.what_if(request()))["plan"] == {"version": 1}

    play(scene)


def test_two_processes_plan_two_at_once(play: Play) -> None:
    async def scene(planners: Planners) -> None:
        answers = await asyncio.gather(*(planners.what_if(request(SLOW)) for _ in range(2)))
        assert len({answer["pid"] for answer in answers}) == 2

    play(scene, plan_workers=2)  # type: ignore[call-arg]


def test_closing_leaves_no_process(play: Play) -> None:
    async def scene(planners: Planners) -> int:
        hanging = asyncio.create_task(planners.what_if(request(HANGS)))
        await asyncio.sleep(0.3)
        process = planners._all[0]._process
        assert process is not None
        pid = process.pid
        await planners.close()
        with pytest.raises(UnavailableError):
            await hanging
        return pid

    assert not psutil.pid_exists(play(scene))


def test_the_real_child_answers_lines_and_loads_neither_torch_nor_the_server() -> None:
    code = (
        "import sys, service.planner_child; "
        "print([n for n in ('torch', 'timm', 'ray', 'fastapi', 'sqlalchemy', 'pydantic') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    lines = json.dumps({"shape": {}}) + "\n" + json.dumps({"colour": 1}) + "\nno json\n"
    done = subprocess.run(
        [sys.executable, "-m", "service.planner_child"],
        input=lines,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["error"]["fault"] for answer in answers] == ["user", "user", "system"]
