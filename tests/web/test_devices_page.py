"""Devices as HTML: rates, drift, links, age, and the caller's jobs that use them."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from scheduler.devices import DeviceRecord
from scheduler.domain import LinkProfile
from service.fleet import read_devices
from service.settings import Settings
from service.web.devices import HEIGHT, WIDTH, drift, line
from tests.service.conftest import record, write_book
from tests.service.walk import key_for, store_of
from tests.web.conftest import OURS, sign_in

__all__ = ["record"]


def test_without_devices_the_page_says_how_to_measure_them(visitor: TestClient) -> None:
    text = visitor.get("/ui/devices").text
    assert "first job" in text and "d2ft submit --steps 20" in text and "/ui/what-if" in text


def test_a_device_is_shown_with_what_has_become_of_it(
    visitor: TestClient, settings: Settings, record: DeviceRecord
) -> None:
    now = time.time()
    slowed = replace(record, history=((now - 300, 1000), (now - 200, 1000), (now - 100, 1010), (now, 600)))
    other = replace(record, id="<gpu> 1", measured_at=now - 86_400, links={"gpu-0": LinkProfile(30, 2 * 10**9)})
    write_book(settings.devices_file, slowed, other)
    text = visitor.get("/ui/devices").text
    assert "▼ -40 % of its median" in text and "measured once" in text
    assert "&lt;gpu&gt; 1" in text and "<gpu>" not in text and "style=" not in text
    assert "it may be another by now" in text and "2 GB/s" in text and "30 µs" in text
    assert text.count("<polyline") == 1


def test_a_line_stays_in_its_picture_and_starts_at_no_rate(settings: Settings, record: DeviceRecord) -> None:
    points = [tuple(map(float, point.split(","))) for point in line([(0.0, 50), (50.0, 100), (100.0, 0)]).split()]
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in points)
    assert points[0][0] < points[1][0] < points[2][0] and points[1][1] < points[0][1] < points[2][1]
    assert points[0][1] == pytest.approx((points[1][1] + points[2][1]) / 2, abs=0.1)
    write_book(settings.devices_file, record, replace(record, id="b", history=((1.0, 100), (2.0, 100), (3.0, 120))))
    gpu, other = sorted(read_devices(settings.devices_file, {}).data, key=lambda device: device.id, reverse=True)
    assert drift(gpu) is None and drift(other) == pytest.approx(0.2)


def test_only_the_callers_jobs_are_named(visitor: TestClient, settings: Settings, record: DeviceRecord) -> None:
    write_book(settings.devices_file, record)
    job_id = visitor.post("/v1/jobs", json={"steps": 2, "name": "mine <b>"}, headers=OURS).json()["id"]
    store = store_of(visitor)
    attempt = store.queue.claim(1)
    assert attempt
    line_ = {"seq": 1, "type": "plan.created", "data": {"version": 1, "devices": [{"name": "gpu-0"}]}}
    store.attempts.absorb(attempt, [line_], 10)
    text = visitor.get("/ui/devices").text
    assert f'href="/ui/jobs/{job_id}"' in text and "mine &lt;b&gt;" in text
    visitor.headers.update(OURS)
    sign_in(visitor, key_for(visitor, "bob")["Authorization"].removeprefix("Bearer "))
    text = visitor.get("/ui/devices").text
    assert job_id not in text and "mine" not in text and "gpu-0" in text
