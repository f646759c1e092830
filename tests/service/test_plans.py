"""Dry runs over HTTP: what is asked, what is refused, and how many at once."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from starlette.testclient import TestClient

from scheduler.devices import DeviceRecord
from service.client import ApiBusyError, Client
from service.home import read_secret
from service.planners import Planners
from service.schemas import DeviceBody, PreviewBody
from service.settings import Settings
from tests.service.conftest import write_book
from tests.service.test_routes import problem
from workers.contract import JobSpec
from workers.partition import model_shape
from workers.precision import step_shape

FAKE = [sys.executable, "-m", "tests.service.fake_planner"]
HANGS, SLOW, DIES = 2, 4, 1
FLEET = {"devices": ["2x fast"]}


@pytest.fixture
def fake_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planner processes that do what the seed says; request it before `api` or `server`."""
    monkeypatch.setattr("service.app.Planners", lambda settings: Planners(settings, FAKE))


@pytest.fixture
def ask(fake_planner: None, api: TestClient) -> Callable[..., dict[str, Any]]:
    """What the planner is asked for a body."""

    def send(**body: Any) -> dict[str, Any]:
        answer = api.post("/v1/plans", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["object"] == "plan_preview"
        return dict(answer.json()["asked"])

    return send


def test_the_planner_is_asked_for_the_models_shape_and_the_jobs_method(ask: Callable[..., dict[str, Any]]) -> None:
    from workers.model import build_model

    method = {"ratios": {"full": 2, "forward": 2}, "hold": "all", "grain": "scattered", "strategy": "two_stage"}
    body = {"model": "vit_tiny_patch16_224", "img_size": 96, "num_classes": 7, "model_args": {"depth": 2}}
    asked = ask(**body, method=method, micro_batches=4, micro_batch_size=8, seed=0, train_embed=False, **FLEET)
    spec = JobSpec(model="vit_tiny_patch16_224", img_size=96, model_args={"depth": 2})
    built = model_shape(build_model(spec, num_classes=7, load=False))
    assert asked["shape"] == json.loads(json.dumps(vars(built)))
    assert {name: asked["step"][name] for name in ("num_micro_batches", "micro_batch_size")} == {
        "num_micro_batches": 4,
        "micro_batch_size": 8,
    }
    plan = asked["plan"]
    assert plan["ratios"] == {"full": 2, "forward": 2, "skip": 0} and plan["embed_grad"] is False
    assert (plan["hold"], plan["grain"], plan["strategy"]) == ("all", "scattered", "two_stage")
    assert asked["devices"] == ["2x fast"] and asked["link"] is None and asked["gantt"] is False


def test_the_planner_is_asked_for_the_jobs_own_step(ask: Callable[..., dict[str, Any]]) -> None:
    words = {"compute": "bf16", "wire": "bf16", "recompute": True}
    spec = JobSpec.model_validate({"precision": words, "micro_batches": 3})
    expected = asdict(step_shape(spec.micro_batches, spec.micro_batch_size, spec.precision, bf16=True))
    assert ask(precision=words, micro_batches=3, **FLEET)["step"] == expected
    assert expected["wire_itemsize"] == expected["compute_itemsize"] == 2 and expected["recompute"]
    assert "compute_itemsize" not in ask(**FLEET)["step"]  # the devices decide


def test_devices_and_links_are_words_or_objects(ask: Callable[..., dict[str, Any]]) -> None:
    devices = ["slow:8GB", {"kind": "a100", "count": 2, "node": "n1"}, {"tflops": 12.5, "memory_bytes": 10**10}]
    asked = ask(devices=devices, link="1Gbps/50us", links=[{"a": 0, "b": 1, "bytes_per_s": 10**9}], gantt=True)
    assert asked["devices"] == [
        "slow:8GB",
        {"kind": "a100", "count": 2, "memory_bytes": None, "node": "n1"},
        {"kind": "12.5TFLOPS", "count": 1, "memory_bytes": 10**10, "node": None},
    ]
    assert asked["link"] == "1Gbps/50us" and asked["gantt"] is True
    assert asked["links"] == [{"latency_us": 100, "bytes_per_s": 10**9, "a": 0, "b": 1}]
    assert ask(devices=["fast"], link={"bytes_per_s": 5})["link"] == {"latency_us": 100, "bytes_per_s": 5}


def test_live_plans_for_the_measured_devices_and_warns_of_old_ones(
    ask: Callable[..., dict[str, Any]], api: TestClient, settings: Settings, record: DeviceRecord
) -> None:
    write_book(settings.devices_file, record)
    asked = ask(devices="live")
    assert asked["records"] == [json.loads(json.dumps(record.to_dict()))] and "devices" not in asked
    assert api.post("/v1/plans", json={"devices": "live"}).json()["warnings"] == []
    old = DeviceRecord(**{**vars(record), "measured_at": time.time() - 30 * 3600})
    write_book(settings.devices_file, old)
    assert "gpu-0 was measured 30 h ago" in api.post("/v1/plans", json={"devices": "live"}).json()["warnings"][0]


def test_live_without_a_measured_device_is_a_conflict_that_says_what_to_do(api: TestClient) -> None:
    found = problem(api.post("/v1/plans", json={"devices": "live"}), 409)
    assert found["code"] == "no_devices" and found["param"] == "devices" and "Run a job first" in found["detail"]


@pytest.mark.parametrize(
    ("body", "param", "code", "word"),
    [
        ({}, "devices", "invalid_request", "required"),
        ({"devices": []}, "devices", "invalid_request", "at least 1"),
        ({"devices": "all"}, "devices", "invalid_request", "live"),
        ({"devices": [{"count": 2}]}, "devices", "invalid_request", "kind or tflops"),
        ({"devices": [{"kind": "fast", "count": 0}]}, "devices", "invalid_request", "greater"),
        ({**FLEET, "model": "vit_smal_patch16_224"}, "model", "unknown_model", "vit_small_patch16_224"),
        ({**FLEET, "model": "resnet50"}, "model", "model_refused", "not a vision transformer"),
        ({**FLEET, "model_args": {"depth": 0}}, "model_args.depth", "bad_model_args", "whole number"),
        ({**FLEET, "model_args": {"no_such": 1}}, "model_args", "invalid_request", "not a model argument"),
        ({**FLEET, "img_size": 1}, "img_size", "invalid_request", "greater"),
        ({**FLEET, "method": {"ratios": {"full": 3}}}, "method.ratios", "invalid_request", "5 micro-batches"),
        ({**FLEET, "precision": {"compute": "fp16"}}, "precision.compute", "invalid_request", "bf16"),
        ({**FLEET, "micro_batches": 0}, "micro_batches", "invalid_request", "greater"),
        ({**FLEET, "seed": -1}, "seed", "invalid_request", "greater"),
        ({**FLEET, "dataset": "digits"}, "dataset", "invalid_request", "permitted"),
        ({**FLEET, "links": [{"a": 0, "b": 64, "bytes_per_s": 1}]}, "links.0.b", "invalid_request", "less"),
    ],
)
def test_a_bad_question_is_refused_by_field(
    api: TestClient, body: dict[str, Any], param: str, code: str, word: str
) -> None:
    found = problem(api.post("/v1/plans", json=body), 422)
    assert found["param"].startswith(param) and found["code"] == code and word in found["detail"]
    assert found["errors"][0]["pointer"].startswith("/" + param.replace(".", "/"))


def test_plans_are_behind_the_key_and_have_their_alias(fake_planner: None, api: TestClient) -> None:
    assert api.post("/plans", json=FLEET).json()["model"] == "d2ft_digits"
    api.headers.pop("Authorization")
    problem(api.post("/v1/plans", json=FLEET), 401)
    problem(api.get("/v1/devices"), 401)


def test_a_planner_that_dies_is_a_503_and_the_next_is_served(fake_planner: None, api: TestClient) -> None:
    answer = api.post("/v1/plans", json={**FLEET, "seed": DIES})
    assert problem(answer, 503)["code"] == "planner_died" and answer.headers["retry-after"]
    assert api.post("/v1/plans", json=FLEET).status_code == 200


def test_fifty_at_once_are_bounded_and_the_api_stays_awake(
    fake_planner: None, server: str, home: Path, settings: Settings
) -> None:
    places = settings.plan_workers + settings.plan_queue

    async def storm() -> tuple[list[httpx2.Response], list[float]]:
        headers = {"Authorization": f"Bearer {read_secret(home / 'key')}"}
        async with httpx2.AsyncClient(base_url=server, headers=headers, timeout=60, trust_env=False) as client:
            assert (await client.post("/v1/plans", json=FLEET)).status_code == 200
            body = {**FLEET, "seed": SLOW}
            asked = [asyncio.create_task(client.post("/v1/plans", json=body)) for _ in range(50)]
            waits = []
            while not all(each.done() for each in asked):
                began = time.monotonic()
                assert (await client.get("/healthz")).status_code == 200
                waits.append(time.monotonic() - began)
                await asyncio.sleep(0.02)
            return [each.result() for each in asked], waits

    answers, waits = asyncio.run(storm())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(answers) - len(refused) == sum(answer.status_code == 200 for answer in answers)
    assert len(refused) >= 50 - 3 * places and len(answers) - len(refused) >= places
    assert all(problem(answer, 429)["code"] == "too_many_plans" for answer in refused)
    assert all(answer.headers["retry-after"] for answer in refused)
    assert sorted(waits)[len(waits) // 2] < 0.5


def test_a_client_that_goes_away_frees_its_place(fake_planner: None, server: str, home: Path) -> None:
    body = json.dumps({**FLEET, "seed": HANGS}).encode()
    lines = [
        "POST /v1/plans HTTP/1.1",
        f"Host: {urlsplit(server).netloc}",
        f"Authorization: Bearer {read_secret(home / 'key')}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    address = (urlsplit(server).hostname, urlsplit(server).port)
    with Client(server, read_secret(home / "key")) as client:
        client.plans(FLEET)
        with socket.create_connection(address) as hasty:
            hasty.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            time.sleep(0.3)
        assert client.plans({**FLEET, "seed": 0}).plan == {"version": 1}


def test_the_client_says_busy_after_its_retries(
    fake_planner: None, server: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.planners.Planners.what_if", _refuse)
    with Client(server, read_secret(home / "key"), retries=0) as client, pytest.raises(ApiBusyError):
        client.plans(PreviewBody(devices=["fast"]))


async def _refuse(self: Planners, request: dict[str, Any]) -> dict[str, Any]:
    from service.errors import TooManyError

    raise TooManyError("full", code="too_many_plans")


def test_a_typed_body_is_what_the_wire_carries(fake_planner: None, server: str, home: Path) -> None:
    body = PreviewBody(devices=[DeviceBody(kind="fast", count=2)], micro_batches=3)
    with Client(server, read_secret(home / "key")) as client:
        asked = client.plans(body).model_dump()["asked"]
    assert asked["devices"][0]["count"] == 2 and asked["step"]["num_micro_batches"] == 3


def preview(api: TestClient, **body: Any) -> dict[str, Any]:
    answer = api.post("/v1/plans", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_small_model_gets_a_whole_plan_with_its_reasons(api: TestClient) -> None:
    method = {"ratios": {"full": 2, "forward": 2, "skip": 1}}
    found = preview(api, devices=["fast", "slow:8GB"], link="1Gbps", method=method, gantt=True)
    owners = found["plan"]["placement"]["owners"]
    assert len(owners) == 6 and all(len(row) == 6 for row in owners)
    assert {"step_us", "idle_share", "busy_us"} <= set(found["plan"]["forecast"])
    assert {"status", "bound", "gap"} <= set(found["plan"]["placement_report"])
    assert [device["rank"] for device in found["devices"]] == [0, 1]
    assert all(device["binding"] for device in found["devices"])
    assert found["heads"][0][0]["reason"] and found["rounding_loss"] is not None
    assert found["gantt"]["step_us"] > 0 and len(found["gantt"]["workers"]) == 2
    again = preview(api, devices=["fast", "slow:8GB"], link="1Gbps", method=method, gantt=True)
    assert again["plan"]["placement"] == found["plan"]["placement"] and again["plan"]["cycle"] == found["plan"]["cycle"]


def test_a_narrow_wire_and_passes_run_again_show_in_bytes_and_memory(api: TestClient) -> None:
    body = {"devices": ["2x fast"], "placement": "split"}
    plain, other = preview(api, **body), preview(api, **body, precision={"wire": "bf16", "recompute": True})
    totals = [sum(map(sum, found["plan"]["forecast"]["link_bytes"])) for found in (plain, other)]
    assert 0.5 < totals[1] / totals[0] < 0.6  # trunk gradients and tallies stay
    peaks = [max(device["peak_bytes"] for device in found["devices"]) for found in (plain, other)]
    assert peaks[1] < 0.8 * peaks[0]
    halved = preview(api, **body, precision={"compute": "bf16"})
    assert max(device["peak_bytes"] for device in halved["devices"]) < 0.8 * peaks[0]


def test_a_fleet_without_memory_is_refused_with_the_tight_constraint(api: TestClient) -> None:
    body = {"model": "vit_large_patch16_224", "devices": ["2x fast:1MB"]}
    found = problem(api.post("/v1/plans", json=body), 422)
    assert "GB" in found["detail"] and found["code"] != "internal"


def test_an_unknown_kind_of_device_is_named_where_it_stands(api: TestClient) -> None:
    found = problem(api.post("/v1/plans", json={"devices": ["fast", "2x abacus"]}), 422)
    assert found["errors"][0]["pointer"].startswith("/devices/1") and "abacus" in found["detail"]


def test_a_large_model_on_sixteen_devices_is_answered_in_time(api: TestClient) -> None:
    preview(api, devices=["fast"])
    began = time.monotonic()
    found = preview(
        api,
        model="vit_large_patch16_224",
        num_classes=100,
        devices=["8x fast:24GB", "8x slow:8GB"],
        link="10Gbps",
        method={"ratios": {"full": 2, "forward": 3}},
    )
    assert len(found["devices"]) == 16
    # About 2 s on a quiet machine; this one may be busy.
    assert time.monotonic() - began < 20
