"""`weights: "job:ID"`: the result of an own earlier job as what a job begins with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.home import read_secret
from service.settings import Settings
from tests.service.conftest import URL
from tests.service.results import fill_result, tiny_spec
from tests.service.test_routes import problem
from tests.service.test_thumbnails import draw
from tests.service.walk import key_for, store_of

Submit = Callable[..., str]


@pytest.fixture
def succeeded(api: TestClient, settings: Settings) -> Callable[..., str]:
    """Submit a job and have it succeed, with a real result unless it leaves none; returns its id."""

    def run(*, leaves: bool = True, path: str | None = None, headers: dict[str, str] | None = None) -> str:
        body = tiny_spec(steps=2).model_dump(mode="json")
        job_id = str(api.post("/v1/jobs", json=body, headers=headers).json()["id"])
        attempt = store_of(api).queue.claim(10)
        assert attempt and attempt.job_id == job_id
        weights = fill_result(settings.attempt_dir(job_id, 1))
        artifact = {"name": "model.safetensors", "path": path or str(weights), "bytes": 1, "sha256": None}
        said: list[tuple[str, dict[str, Any]]] = [("artifact.ready", artifact)] if leaves else []
        said += [("outcome", {"status": "succeeded", "error": None})]
        lines = [{"seq": n, "at": 1.0, "type": type, "data": data} for n, (type, data) in enumerate(said, 1)]
        store_of(api).attempts.absorb(attempt, lines, len(lines))
        assert api.get(f"/v1/jobs/{job_id}").json()["status"] == "succeeded"
        return job_id

    return run


def refused(answer: Any, code: str) -> dict[str, Any]:
    found = problem(answer, 422)
    assert (found["code"], found["param"]) == (code, "weights"), found
    return found


def body(weights: str) -> dict[str, Any]:
    return {**tiny_spec().model_dump(mode="json"), "weights": weights}


def test_a_job_begins_with_what_another_has_learnt(
    api: TestClient, succeeded: Callable[..., str], settings: Settings
) -> None:
    earlier = succeeded()
    made = api.post("/v1/jobs", json=body(f"job:{earlier}"), headers={"Idempotency-Key": "k"})
    assert made.status_code == 201, made.text
    path = settings.attempt_dir(earlier, 1) / "result" / "model.safetensors"
    assert made.json()["spec"]["weights"] == str(path)
    path.unlink()  # what was accepted once is not looked at again
    again = api.post("/v1/jobs", json=body(f"job:{earlier}"), headers={"Idempotency-Key": "k"})
    assert again.json()["id"] == made.json()["id"]
    refused(api.post("/v1/jobs", json=body(f"job:{earlier}")), "bad_weights")


def test_a_job_that_has_not_succeeded_has_no_weights_yet(api: TestClient, submit: Submit) -> None:
    waits, ended = submit(steps=2), submit(steps=2)
    api.post(f"/v1/jobs/{ended}/cancel")
    found = refused(api.post("/v1/jobs", json=body(f"job:{waits}")), "weights_job_not_succeeded")
    assert "queued" in found["detail"] and "Wait" in found["detail"]
    found = refused(api.post("/v1/jobs", json=body(f"job:{ended}")), "weights_job_not_succeeded")
    assert "cancelled" in found["detail"] and "Retry" in found["detail"]


@pytest.mark.parametrize("name", ["", "none", "ftjob_" + "0" * 26, "../x", "x" * 300])
def test_an_id_that_is_none_is_refused_with_a_remedy(api: TestClient, name: str) -> None:
    found = refused(api.post("/v1/jobs", json=body(f"job:{name}")), "weights_job_not_found")
    assert "GET /v1/jobs" in found["detail"]


def test_what_is_anothers_is_not_there_not_even_for_an_administrator(
    api: TestClient, succeeded: Callable[..., str]
) -> None:
    ann, bob = key_for(api, "ann"), key_for(api, "bob")
    hers = succeeded(headers=ann)
    for headers in (bob, dict(api.headers)):
        asked = api.post("/v1/jobs", json=body(f"job:{hers}"), headers=headers)
        none = api.post("/v1/jobs", json=body(f"job:{hers[:-1]}x"), headers=headers)
        refused(asked, "weights_job_not_found")
        assert asked.json()["detail"].replace(hers, "") == none.json()["detail"].replace(f"{hers[:-1]}x", "")
    assert api.post("/v1/jobs", json=body(f"job:{hers}"), headers=ann).status_code == 201


def test_the_path_of_a_result_is_its_owners_alone(
    api: TestClient, succeeded: Callable[..., str], settings: Settings
) -> None:
    ann, bob = key_for(api, "ann"), key_for(api, "bob")
    hers = succeeded(headers=ann)
    path = settings.attempt_dir(hers, 1) / "result" / "model.safetensors"
    link = settings.home / "link.safetensors"
    link.symlink_to(path)
    for headers in (bob, dict(api.headers)):
        for given in (path, link, path.parent / "none.safetensors", settings.home / "jobs/../jobs" / hers / "a1/x"):
            found = refused(api.post("/v1/jobs", json=body(str(given)), headers=headers), "kept_by_service")
            assert "job:ID" in found["detail"]
    assert api.post("/v1/jobs", json=body(str(path)), headers=ann).status_code == 201  # a copied spec goes on working
    own = settings.home / "mine.safetensors"
    own.write_bytes(path.read_bytes())
    assert api.post("/v1/jobs", json=body(str(own)), headers=bob).status_code == 201


def test_nothing_that_the_service_keeps_is_weights_or_a_dataset(
    api: TestClient, succeeded: Callable[..., str], settings: Settings
) -> None:
    hers = succeeded(headers=key_for(api, "ann"))
    for kept in ("cache/x", "logs", "ray/x", "storage/x", f"storage/checkpoints/{hers}/step-1", "jobs", f"jobs/{hers}"):
        path = settings.home / kept
        refused(api.post("/v1/jobs", json=body(f"{path}/m.safetensors")), "kept_by_service")
        for uri in (f"folder://{path}", f"webdataset://{path}/x.tar", f"torchvision:MNIST?root={path}"):
            found = problem(api.post("/v1/jobs", json={"dataset": uri}), 422)
            assert (found["code"], found["param"]) == ("kept_by_service", "dataset")
            found = problem(api.post("/v1/datasets", json={"name": "x", "uri": uri}), 422)
            assert (found["code"], found["param"]) == ("kept_by_service", "uri")


def test_a_storage_of_its_own_is_open_but_for_its_checkpoints(settings: Settings, models: object, home: Path) -> None:
    shared = home.parent / "shared"
    told = settings.model_copy(update={"storage_path": shared, "roots": (shared,)})
    for folder in ("sets", "checkpoints/x"):
        draw(shared / folder / "train/cat/1.png")
        draw(shared / folder / "train/dog/1.png")
    with TestClient(create_app(told, supervise=False), base_url=URL) as api:
        api.headers["Authorization"] = f"Bearer {read_secret(home / 'key')}"
        assert api.post("/v1/jobs", json={"dataset": f"folder://{shared}/sets"}).status_code == 201
        found = problem(api.post("/v1/jobs", json={"dataset": f"folder://{shared}/checkpoints/x"}), 422)
        assert found["code"] == "kept_by_service"


def test_a_job_without_weights_and_a_path_that_leads_away_are_refused(
    api: TestClient, succeeded: Callable[..., str]
) -> None:
    bare = succeeded(leaves=False)
    refused(api.post("/v1/jobs", json=body(f"job:{bare}")), "weights_job_not_found")
    away = succeeded(path="/etc/passwd")
    refused(api.post("/v1/jobs", json=body(f"job:{away}")), "weights_job_not_found")
