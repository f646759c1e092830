"""Every route, well asked and badly asked; every failure is a problem document."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service.lifecycle import JobState
from service.store import Store
from tests.service.conftest import FakeRay
from tests.service.walk import key_for

FIELDS = {"type", "title", "status", "detail", "instance", "code", "param", "errors", "request_id"}


def problem(answer, status: int) -> dict:  # type: ignore[no-untyped-def, type-arg]
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert set(body) == FIELDS and body["status"] == status and body["detail"] and body["request_id"]
    assert "Traceback" not in answer.text
    return body


def write_safetensors(path: Path, *, cut: int = 0) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    path.write_bytes(content[: len(content) - cut])


@pytest.fixture
def data(home: Path, api: TestClient) -> Path:
    """An image folder under the roots."""
    for name in ("cat", "dog"):
        folder = home / "data" / "train" / name
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(b"jpg")
    return home / "data"


def test_a_job_is_made_and_read_back(api: TestClient) -> None:
    answer = api.post("/v1/jobs", json={"name": "first", "method": {"ratios": {"full": 3, "skip": 2}}})
    assert answer.status_code == 201
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["object"] == "job" and job["status"] == "queued" and job["method"]["ratios"]["full"] == 3
    seen = api.get(f"/v1/jobs/{job['id']}").json()
    assert seen.pop("queue_position") == 1 and seen.pop("estimated_start_at") >= job["created_at"]
    assert seen.items() <= job.items()
    assert api.get(f"/jobs/{job['id']}").json() == api.get(f"/v1/jobs/{job['id']}").json()
    listed = api.get("/jobs").json()
    assert listed["data"] == [api.get(f"/v1/jobs/{job['id']}").json()] and not listed["has_more"]
    assert listed["first_id"] == listed["last_id"] == job["id"]


def test_lists_page_by_cursor_and_filter_by_status(api: TestClient, submit: Callable[..., str]) -> None:
    ids = [submit() for _ in range(3)]
    first = api.get("/v1/jobs", params={"limit": 2}).json()
    rest = api.get("/v1/jobs", params={"limit": 2, "after": first["last_id"]}).json()
    assert [job["id"] for job in first["data"] + rest["data"]] == ids[::-1]
    assert first["has_more"] and not rest["has_more"]
    api.post(f"/v1/jobs/{ids[0]}/cancel")
    assert [job["id"] for job in api.get("/v1/jobs", params={"status": "cancelled"}).json()["data"]] == [ids[0]]


@pytest.mark.parametrize("params", [{"limit": 0}, {"limit": 101}, {"order": "up"}, {"status": "lost"}])
def test_bad_list_questions_name_the_parameter(api: TestClient, params: dict[str, str]) -> None:
    assert problem(api.get("/v1/jobs", params=params), 422)["param"] == next(iter(params))


def test_the_same_idempotency_key_answers_with_the_same_job(api: TestClient) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = api.post("/v1/jobs", json={"seed": 1}, headers=headers)
    again = api.post("/v1/jobs", json={"seed": 1}, headers=headers)
    assert first.status_code == again.status_code == 201 and first.content == again.content
    assert first.headers["location"] == again.headers["location"]
    assert again.headers["idempotency-replayed"] == "true" and "idempotency-replayed" not in first.headers
    body = problem(api.post("/v1/jobs", json={"seed": 2}, headers=headers), 422)
    assert body["code"] == "idempotency_key_reused"


def test_a_replay_is_answered_even_when_the_data_has_moved_since(api: TestClient, data: Path) -> None:
    body, headers = {"dataset": f"folder://{data}"}, {"Idempotency-Key": "k"}
    first = api.post("/v1/jobs", json=body, headers=headers)
    data.rename(data.with_name("elsewhere"))
    again = api.post("/v1/jobs", json=body, headers=headers)
    assert again.status_code == 201 and again.json()["id"] == first.json()["id"]


@pytest.mark.parametrize(
    ("body", "param", "code", "word"),
    [
        ({"model": "vit_smal_patch16_224"}, "model", "unknown_model", "vit_small_patch16_224"),
        ({"model": "zzzz"}, "model", "unknown_model", "timm"),
        ({"model": "resnet50"}, "model", "model_refused", "not a vision transformer"),
        ({"weights": "model.safetensors"}, "weights", "bad_weights", "absolute"),
        ({"weights": "/etc/passwd"}, "weights", "outside_roots", "roots"),
        ({"weights": "HOME/none.safetensors"}, "weights", "bad_weights", "No such file"),
        ({"weights": "HOME/models.json"}, "weights", "bad_weights", "not a safetensors file"),
        ({"weights": "HOME/../../../../etc/passwd"}, "weights", "outside_roots", "roots"),
        ({"dataset": "folder:///etc"}, "dataset", "outside_roots", "D2FT_ROOTS"),
        ({"dataset": "folder:///HOME/../../etc"}, "dataset", "outside_roots", "roots"),
        ({"dataset": "folder://HOME/none"}, "dataset", "dataset_not_found", "no folder"),
        ({"dataset": "folder://HOME/logs"}, "dataset", "kept_by_service", "job:ID"),
        ({"dataset": "s3://bucket"}, "dataset", "invalid_request", "folder:///absolute/path"),
        ({"method": {"ratios": {"full": 3, "skip": 1}}}, "method.ratios", "invalid_request", "5 micro-batches"),
        ({"method": {"ratios": {"full": -1}}}, "method.ratios.full", "invalid_request", "greater"),
        ({"method": {"ratios": {"full": 5}, "budgets": {"compute": 0.5}}}, "method", "invalid_request", "one of"),
        ({"method": {"schedule": [{"share": 0.5}]}}, "method", "invalid_request", "sum to 0.5"),
        ({"method": {"budgets": {"compute": 1.5}}}, "method.budgets.compute", "invalid_request", "less"),
        ({"workers": 0}, "workers", "invalid_request", "greater"),
        ({"model_args": {"no_such": 1}}, "model_args", "invalid_request", "not a model argument"),
        ({"colour": 1}, "colour", "invalid_request", "permitted"),
        ({"name": "\ud800"}, "name", "invalid_request", ""),
        ({"metadata": {"a": "\ud800"}}, "metadata.a", "invalid_request", ""),
        ({"optimiser": {"clip_norm": float("inf")}}, "optimiser.clip_norm", "invalid_request", "finite"),
    ],
)
def test_a_bad_job_is_refused_by_field_and_with_a_remedy(
    api: TestClient, home: Path, body: dict[str, object], param: str, code: str, word: str
) -> None:
    text = json.dumps(body).replace("HOME", str(home))
    found = problem(api.post("/v1/jobs", content=text, headers={"Content-Type": "application/json"}), 422)
    assert (found["param"], found["code"]) == (param, code)
    assert word in found["detail"]
    assert found["errors"][0]["pointer"] == "/" + param.replace(".", "/")
    assert api.get("/v1/jobs").json()["data"] == []


def test_an_empty_class_folder_is_named(api: TestClient, data: Path) -> None:
    (data / "train" / "mouse").mkdir()
    found = problem(api.post("/v1/jobs", json={"dataset": f"folder://{data}"}), 422)
    assert found["code"] == "empty_class" and "mouse" in found["detail"]


def test_a_link_out_of_the_roots_is_refused(api: TestClient, home: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "train" / "cat").mkdir(parents=True)
    (home / "link").symlink_to(outside)
    found = problem(api.post("/v1/jobs", json={"dataset": f"folder://{home}/link"}), 422)
    assert found["code"] == "outside_roots"


def test_whole_weights_are_taken_and_cut_ones_refused(api: TestClient, home: Path, data: Path) -> None:
    path = home / "w.safetensors"
    write_safetensors(path)
    body = {"model": "vit_tiny_patch16_224", "weights": str(path), "dataset": f"folder://{data}"}
    assert api.post("/v1/jobs", json=body).status_code == 201
    write_safetensors(path, cut=1)
    assert "cut short" in problem(api.post("/v1/jobs", json=body), 422)["detail"]
    path.write_bytes((5).to_bytes(8, "little") + b"\xff\xfe\xfd[[")
    assert "not a safetensors" in problem(api.post("/v1/jobs", json=body), 422)["detail"]
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert "not a safetensors" in problem(api.post("/v1/jobs", json=body), 422)["detail"]


def test_everything_wrong_is_said_at_once(api: TestClient) -> None:
    body = {"model": "resnet50", "weights": "/etc/passwd", "dataset": "folder:///etc"}
    found = problem(api.post("/v1/jobs", json=body), 422)
    assert [error["pointer"] for error in found["errors"]] == ["/model", "/weights", "/dataset"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"{\xff}", b"[" * 5000, b'{"epochs": NaN}'])
def test_a_body_that_is_no_job_is_a_problem(api: TestClient, content: bytes) -> None:
    answer = api.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    problem(answer, answer.status_code)
    assert answer.status_code in (400, 422)


def test_unknown_routes_methods_and_jobs_are_problems(api: TestClient, submit: Callable[..., str]) -> None:
    problem(api.get("/v1/nothing"), 404)
    problem(api.get("/docs"), 404)
    assert problem(api.delete("/v1/jobs"), 405)
    parts = ("events", "metrics", "plan", "timeline", "ledger", "artifacts", "artifacts/x", "checkpoints", "logs")
    for path in ("", *(f"/{part}" for part in parts)):
        assert problem(api.get(f"/v1/jobs/ftjob_none{path}"), 404)["code"] == "job_not_found"
    for verb in ("cancel", "pause", "resume", "retry"):
        assert problem(api.post(f"/v1/jobs/ftjob_none/{verb}"), 404)["code"] == "job_not_found"
    job_id = submit()
    for part in ("plan", "ledger"):
        assert problem(api.get(f"/v1/jobs/{job_id}/{part}"), 404)["code"] == f"{part}_not_found"
    assert problem(api.get(f"/v1/jobs/{job_id}/timeline"), 404)["code"] == "plan_not_found"
    assert problem(api.get(f"/v1/jobs/{job_id}/logs"), 404)["code"] == "attempt_not_found"


def test_a_fault_of_ours_is_a_problem_without_its_cause(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret cause")

    monkeypatch.setattr(api.app.state.world.store.jobs, "get", broken)  # type: ignore[attr-defined]
    answer = api.get("/v1/jobs/x")
    assert problem(answer, 500)["code"] == "internal" and "secret cause" not in answer.text


def test_a_store_that_does_not_answer_is_a_503(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    from sqlalchemy.exc import OperationalError

    from service.store import database

    def locked(*_: object, **__: object) -> None:
        raise OperationalError("x", {}, sqlite3.OperationalError("database is locked"))

    monkeypatch.setattr(database.Session, "get", locked)
    answer = api.get("/v1/jobs/x")
    assert problem(answer, 503)["code"] == "store_unavailable" and answer.headers["retry-after"]


def test_cancelling_an_ended_job_is_a_conflict(api: TestClient, submit: Callable[..., str]) -> None:
    job_id = submit()
    store: Store = api.app.state.world.store  # type: ignore[attr-defined]
    attempt = store.queue.claim(1)
    assert attempt
    assert api.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelling"
    store.attempts.finish(attempt, JobState.SUCCEEDED)
    assert problem(api.post(f"/v1/jobs/{job_id}/cancel"), 409)["code"] == "job_is_final"


def test_lists_are_narrowed_by_what_a_job_is(api: TestClient, submit: Callable[..., str]) -> None:
    first = submit(name="Alpha", metadata={"team": "vision", "a[b]": "x y"})
    second = submit(model="vit_tiny_patch16_224", metadata={"team": "speech"})
    third = submit(name="50%_off")
    api.post(f"/v1/jobs/{first}/cancel")
    api.post(f"/v1/jobs/{second}/pause")
    now = time.time()

    def ids(**params: object) -> list[str]:
        answer = api.get("/v1/jobs", params=params)
        assert answer.status_code == 200, answer.text
        return [job["id"] for job in answer.json()["data"]]

    assert ids(status=["cancelled", "paused"]) == [second, first] and ids(status="queued") == [third]
    assert ids(model="vit_tiny_patch16_224") == [second] and ids(model="vit_tiny") == []
    assert ids(search="ALPHA") == [first] and ids(search="SPEECH") == [second] and ids(search=third[-9:]) == [third]
    assert ids(search="%_") == [third] and ids(search="zzz") == []
    assert ids(order="asc") == [first, second, third] and ids(order="asc", after=first, limit=1) == [second]
    assert ids(created_after=now + 5) == ids(created_before=now - 60) == []
    assert len(ids(created_after=now - 60, created_before=now + 5)) == 3
    assert ids(**{"metadata[team]": "vision"}) == ids(**{"metadata[a[b]]": "x y"}) == [first]
    assert ids(**{"metadata[team]": "vision", "metadata[a[b]]": "z"}) == [] and ids(**{"metadata[none]": ""}) == []
    assert ids(owner=api.get("/v1/me").json()["user"]["name"]) == [third, second, first] and ids(owner="nobody") == []


def test_jobs_are_paused_resumed_and_retried(api: TestClient, submit: Callable[..., str]) -> None:
    root = f"/v1/jobs/{submit()}"
    assert api.post(f"{root}/pause").json()["status"] == api.post(f"{root}/pause").json()["status"] == "paused"
    assert api.post(f"{root}/resume").json()["status"] == api.post(f"{root}/resume").json()["status"] == "queued"
    assert problem(api.post(f"{root}/retry"), 409)["code"] == "job_not_retryable"
    assert api.post(f"{root}/cancel").json()["status"] == api.post(f"{root}/cancel").json()["status"] == "cancelled"
    assert problem(api.post(f"{root}/pause"), 409)["code"] == "job_not_pausable"
    assert problem(api.post(f"{root}/resume"), 409)["code"] == "job_not_paused"
    again = api.post(f"{root}/retry").json()
    assert again["status"] == "queued" and root.endswith(again["id"])


def test_a_user_has_so_many_jobs_waiting_and_of_such_priority(api: TestClient) -> None:
    ann = key_for(api, "ann", max_queued=2, max_priority=3)
    ids = [api.post("/v1/jobs", json={"priority": 3}, headers=ann).json()["id"] for _ in range(2)]
    answer = api.post("/v1/jobs", json={}, headers=ann)
    assert problem(answer, 429)["code"] == "queue_full" and int(answer.headers["retry-after"]) > 0
    assert api.post("/v1/jobs", json={}).status_code == 201, "another user's queue is another's"
    api.post(f"/v1/jobs/{ids[0]}/cancel", headers=ann)
    found = problem(api.post("/v1/jobs", json={"priority": 4}, headers=ann), 422)
    assert (found["param"], found["code"]) == ("priority", "priority_too_high")
    assert api.post("/v1/jobs", json={}, headers=ann).status_code == 201


def test_health_is_open_and_ready_names_its_parts(api: TestClient, ray: FakeRay) -> None:
    del api.headers["Authorization"]
    assert api.get("/healthz").json()["status"] == "ok"
    assert api.get("/readyz").json() == {"status": "ok", "checks": {"store": "ok", "ray": "ok"}}
    ray.down = True
    answer = api.get("/readyz")
    assert answer.status_code == 200 and answer.json()["checks"]["ray"] == "ray_unreachable"


def test_openapi_describes_the_jobs_routes_once(api: TestClient) -> None:
    described = api.get("/openapi.json").json()["paths"]
    assert "/v1/jobs" in described and "/jobs" not in described
