"""The devices that jobs have measured, over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from scheduler.devices import DeviceRecord
from service.app import create_app
from service.home import read_secret
from service.settings import Settings
from tests.service.conftest import URL, FakeRay, write_book


def test_without_a_measured_device_the_list_is_empty_and_says_why(api: TestClient) -> None:
    found = api.get("/v1/devices").json()
    assert found["object"] == "list" and found["data"] == [] and "first job" in found["note"]


def test_a_measured_device_is_shown_with_its_rates_and_age(
    api: TestClient, settings: Settings, record: DeviceRecord
) -> None:
    write_book(settings.devices_file, record)
    found = api.get("/v1/devices").json()
    assert found["note"] is None and api.get("/devices").json()["data"][0]["id"] == "gpu-0"
    device = found["data"][0]
    assert device["id"] == "gpu-0" and device["node"] == "n1" and device["samples"] == 40
    assert device["rates"]["forward_flops_per_s"] == record.forward_flops_per_s
    assert device["links"] == {"gpu-1": {"latency_us": 20, "bytes_per_s": 10**9}}
    assert device["facts"] == {"name": "GPU", "cores": 8}
    assert 0 <= device["age_s"] < 60 and not device["stale"] and device["used_by"] == []


def test_an_old_measurement_is_called_stale(api: TestClient, settings: Settings, record: DeviceRecord) -> None:
    write_book(settings.devices_file, DeviceRecord(**{**vars(record), "measured_at": time.time() - 86_400}))
    device = api.get("/v1/devices").json()["data"][0]
    assert device["stale"] and device["age_s"] == pytest.approx(86_400, abs=60)


def test_a_torn_book_is_said(api: TestClient, settings: Settings) -> None:
    settings.devices_file.parent.mkdir()
    settings.devices_file.write_text('{"format": 1, "devi')
    found = api.get("/v1/devices").json()
    assert found["data"] == [] and "cannot be read" in found["note"]


def test_a_running_job_is_named_by_the_devices_that_it_uses(
    api: TestClient, settings: Settings, record: DeviceRecord, submit: Callable[..., str]
) -> None:
    write_book(settings.devices_file, record, DeviceRecord(**{**vars(record), "id": "gpu-0#2"}))
    job_id = submit()
    store = api.app.state.world.store  # type: ignore[attr-defined]
    attempt = store.queue.claim(1)
    plan = {"version": 1, "devices": [{"rank": n, "name": name} for n, name in enumerate(["gpu-0", "gpu-0", "x"])]}
    line = {"seq": 1, "type": "plan.created", "data": plan}
    store.attempts.absorb(attempt, [line], 10)
    assert [device["used_by"] for device in api.get("/v1/devices").json()["data"]] == [[job_id], [job_id]]
    store.attempts.absorb(attempt, [{"seq": 2, "type": "outcome", "data": {"status": "succeeded"}}], 20)
    assert api.get("/v1/devices").json()["data"][0]["used_by"] == []


def test_another_storage_path_has_another_book(
    tmp_path: Path, settings: Settings, models: object, ray: FakeRay, record: DeviceRecord
) -> None:
    settings = settings.model_copy(update={"storage_path": tmp_path / "shared"})
    write_book(tmp_path / "shared" / "scheduler" / "devices.json", record)
    with TestClient(create_app(settings, ray_transport=ray.transport(), supervise=False), base_url=URL) as client:
        client.headers["Authorization"] = f"Bearer {read_secret(settings.home / 'key')}"
        assert [device["id"] for device in client.get("/v1/devices").json()["data"]] == ["gpu-0"]
        assert json.loads(settings.devices_file.read_text())["devices"][0]["id"] == "gpu-0"
