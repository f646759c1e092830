"""The meters, as Prometheus reads them: well named, of bounded size, and right."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from starlette.testclient import TestClient

import service
from service import watch
from service.errors import UnavailableError
from service.meters import Meters
from service.ray_jobs import RayJobs
from service.scrape import OPENMETRICS
from service.settings import Settings
from service.store import Store
from service.store.access import FIRST_USER
from service.store.census import Census
from service.supervisor import Supervisor
from tests.service.conftest import FakeRay
from workers.contract import JobSpec

README = (Path(service.__file__).parent / "README.md").read_text()
AN_ID = re.compile(r"(ftjob|req|user|key|run|evt|job-)_|[0-9A-HJKMNP-TV-Z]{26}|[0-9a-f]{16}", re.ASCII)
OWN_UNITS = ("_ms", "_us", "_milliseconds", "_minutes", "_hours", "_kb", "_mb", "_percent")


def scrape(api: TestClient) -> dict[str, Metric]:
    answer = api.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    return {family.name: family for family in parse(answer.text)}


def value(families: dict[str, Metric] | Meters, name: str, **labels: str) -> float:
    found = list(families.registry.collect()) if isinstance(families, Meters) else [*families.values()]
    samples = [sample for family in found for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def test_without_a_key_nothing_is_told(api: TestClient) -> None:
    del api.headers["Authorization"]
    assert api.get("/metrics").status_code == 401


def test_every_name_is_explained_and_has_a_base_unit(api: TestClient, submit: Callable[..., str]) -> None:
    submit()
    for name, family in scrape(api).items():
        assert family.documentation and family.type != "unknown", name
        assert name.startswith(("d2ft_", "process_")) and not name.endswith(OWN_UNITS), name
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples), name
        if family.type == "histogram":
            assert name.endswith("_seconds"), name


def test_every_metric_is_documented(api: TestClient) -> None:
    for name, family in scrape(api).items():
        told = f"{name}_total" if family.type == "counter" else name
        assert name.startswith("process_") or f"`{told}`" in README, told


def test_no_label_is_an_id_or_something_that_a_user_wrote(api: TestClient, submit: Callable[..., str]) -> None:
    job_id = submit(name="my-name", metadata={"team": "vision"})
    api.get(f"/v1/jobs/{job_id}")
    api.get(f"/v1/jobs/{job_id}/events")
    for family in scrape(api).values():
        for sample in family.samples:
            for label in sample.labels.values():
                assert not AN_ID.search(label) and label not in ("my-name", "vision", "first"), sample


def test_openmetrics_is_spoken_to_those_who_accept_it(api: TestClient) -> None:
    for accept in (f"{OPENMETRICS};version=1.0.0,text/plain;q=0.5", f"{OPENMETRICS};version=x\u00ff;;,"):
        answer = api.get("/metrics", headers={"Accept": accept.encode("latin-1")})  # type: ignore[dict-item]
        assert answer.headers["content-type"].startswith(OPENMETRICS)
        assert "d2ft_http_requests" in {family.name for family in parse_openmetrics(answer.text)}


def test_requests_count_by_the_template_of_their_route(api: TestClient, submit: Callable[..., str]) -> None:
    job_id = submit()
    before = scrape(api)
    api.get(f"/v1/jobs/{job_id}")
    api.get(f"/jobs/{job_id}")
    api.get("/v1/jobs/none?token=x")
    api.put("/v1/jobs")
    after = scrape(api)

    def added(**labels: str) -> float:
        name = "d2ft_http_requests_total"
        return value(after, name, **labels) - value(before, name, **labels)

    assert added(method="GET", route="/v1/jobs/{job_id}", status="200") == 1
    assert added(method="GET", route="/jobs/{job_id}", status="200") == 1
    assert added(method="GET", route="/v1/jobs/{job_id}", status="404") == 1
    assert added(method="PUT", route="/v1/jobs", status="405") == 1
    assert value(after, "d2ft_http_request_duration_seconds_count", route="/v1/jobs/{job_id}") == 2


def test_who_is_refused_at_the_door_counts_by_the_reason(api: TestClient) -> None:
    for headers in ({"Authorization": "Bearer no"}, {"Host": "evil.example"}):
        api.get("/v1/jobs", headers=headers)
    api.post("/v1/jobs", json={}, headers={"Origin": "https://evil.example"})
    found = scrape(api)
    for reason in ("unauthorised", "unknown_host", "foreign_origin"):
        assert value(found, "d2ft_http_requests_refused_total", reason=reason) == 1
    assert value(found, "d2ft_http_requests_total", route="refused") == 3


def test_paths_and_methods_that_anybody_makes_up_add_no_series(api: TestClient) -> None:
    def num_series() -> int:
        return sum(len(family.samples) for family in scrape(api).values())

    def wander() -> None:
        api.get(f"/{secrets.token_hex(8)}/{secrets.token_hex(4)}")
        api.get(f"/v1/jobs/{secrets.token_hex(8)}")
        api.request(f"X{secrets.token_hex(3)}".upper(), "/v1/jobs")
        api.get("/v1/jobs", headers={"Authorization": f"Bearer {secrets.token_hex(8)}"})

    wander()
    scrape(api)
    before = num_series()
    for _ in range(50):
        wander()
    assert num_series() == before


def test_a_bug_counts_as_500(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "ping", lambda self: 1 / 0)
    assert api.get("/readyz").status_code == 500
    assert value(scrape(api), "d2ft_http_requests_total", route="/readyz", status="500") == 1


def test_jobs_count_by_state_and_fault_from_the_store(
    api: TestClient, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.scrape.FRESH_S", 0.0)
    monkeypatch.setattr("service.scrape.REST", 0)
    store: Store = api.app.state.world.store  # type: ignore[attr-defined]
    submit(queue_timeout_s=0.001)
    store.queue.expire()
    ids = [submit() for _ in range(3)]
    store.actions.cancel(ids[0])
    store.queue.claim(1)
    found = scrape(api)
    for state, count in {"queued": 1, "planning": 1, "failed": 1, "cancelled": 1, "succeeded": 0}.items():
        assert value(found, "d2ft_jobs", state=state) == count, state
    assert value(found, "d2ft_jobs_failed", fault="capacity") == 1
    assert value(found, "d2ft_queue_length") == 1 and value(found, "d2ft_attempts_open") == 1
    assert 0 < value(found, "d2ft_queue_oldest_seconds") < 60
    assert value(found, "d2ft_store_transaction_duration_seconds_count", kind="write") > 4


def test_the_store_is_counted_once_for_many_who_ask(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    take = Census.take
    monkeypatch.setattr(Census, "take", lambda self: (taken.append(1), take(self))[1])
    for _ in range(5):
        scrape(api)
    assert len(taken) == 1


def test_while_the_store_is_away_the_rest_is_told(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(self: Census) -> None:
        raise UnavailableError("away", code="store_unavailable")

    monkeypatch.setattr(Census, "take", away)
    found = scrape(api)
    assert value(found, "d2ft_store_up") == 0 and "d2ft_jobs" not in found and "d2ft_streams_open" in found


def test_looks_calls_of_ray_and_their_failures_count(settings: Settings, store: Store, ray: FakeRay) -> None:
    store.jobs.create(JobSpec(), owner=FIRST_USER)
    meters = Meters()

    async def supervise() -> None:
        jobs = RayJobs("http://ray", None, ray.transport(), meters)
        running = asyncio.create_task(Supervisor(settings, store, jobs, meters).run())
        while value(meters, "d2ft_ray_call_duration_seconds_count", call="get") < 1:
            await asyncio.sleep(0.01)
        ray.down = True
        while value(meters, "d2ft_supervisor_failures_total", work="attempt") < 1:
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await jobs.close()

    asyncio.run(asyncio.wait_for(supervise(), 10))
    assert value(meters, "d2ft_supervisor_leads") == 1
    assert value(meters, "d2ft_supervisor_look_duration_seconds_count") > 1
    assert value(meters, "d2ft_supervisor_last_look_timestamp_seconds") > 1.7e9
    assert value(meters, "d2ft_ray_call_duration_seconds_count", call="submit") == 1
    assert value(meters, "d2ft_ray_call_failures_total", reason="ray_unreachable") >= 1


def test_a_loop_that_is_held_up_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LAG_EVERY_S", 0.01)
    meters = Meters()

    async def hold_up() -> None:
        measuring = asyncio.create_task(watch.measure_lag(meters))
        await asyncio.sleep(0)
        time.sleep(0.15)
        await asyncio.sleep(0.05)
        measuring.cancel()

    asyncio.run(hold_up())
    assert value(meters, "d2ft_event_loop_lag_seconds_count") >= 1
    assert value(meters, "d2ft_event_loop_lag_seconds_sum") >= 0.1
