"""Sweeps over HTTP: made, refused by field, read, ended; and what their drivers may ask with their tokens."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from service.settings import Settings
from service.store import Attempt
from tests.service.walk import key_for, store_of

TRIALS = "/v1/runs/trials"
BODY = {"job": {"steps": 4}, "space": {"seed": {"values": [1, 2]}}}


def make(api: TestClient, headers: dict[str, str] | None = None, **given: Any) -> dict[str, Any]:
    answer = api.post("/v1/sweeps", json={**BODY, **given}, headers=headers)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.fixture
def attempt(api: TestClient) -> Attempt:
    make(api)
    found = store_of(api).queue.claim_sweep(1)
    assert found
    return found


def run(attempt: Attempt) -> dict[str, str]:
    return {"Authorization": f"Bearer {attempt.token}"}


def body(key: str = "t-0", **given: Any) -> dict[str, Any]:
    return {"key": key, "setting": {"seed": 1}, "spec": {"steps": 4, "seed": 1}, **given}


def test_a_sweep_is_made_once_by_its_key_and_found(api: TestClient) -> None:
    once = {"Idempotency-Key": "k"}
    first = api.post("/v1/sweeps", json={**BODY, "name": "lr"}, headers=once)
    again = api.post("/v1/sweeps", json={**BODY, "name": "lr"}, headers=once)
    assert first.status_code == again.status_code == 201 and first.json() == again.json()
    assert "idempotency-replayed" not in first.headers and again.headers["idempotency-replayed"] == "true"
    other = api.post("/v1/sweeps", json=BODY, headers=once)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    made = api.get(first.headers["location"]).json()
    assert (made["object"], made["name"], made["status"]) == ("sweep", "lr", "queued")
    assert made["progress"] == {"done": 0, "failed": 0, "total": 4} and made["trials"] == made["points"] == []
    assert [each["id"] for each in api.get("/v1/sweeps").json()["data"]] == [made["id"]]
    assert api.get("/v1/jobs").json()["data"] == []


def test_sweeps_are_listed_page_by_page(api: TestClient) -> None:
    made = [make(api, name=f"n{number}", metadata={"n": str(number)})["id"] for number in range(3)]
    page = api.get("/v1/sweeps", params={"limit": 2}).json()
    assert [each["id"] for each in page["data"]] == made[:0:-1] and page["has_more"]
    rest = api.get("/v1/sweeps", params={"after": page["last_id"]}).json()
    assert [each["id"] for each in rest["data"]] == made[:1]
    assert [each["id"] for each in api.get("/v1/sweeps", params={"metadata[n]": "1"}).json()["data"]] == [made[1]]
    assert api.get("/v1/sweeps", params={"after": "ftjob_x"}).json()["code"] == "sweep_not_found"


@pytest.mark.parametrize(
    ("wrong", "param", "code"),
    [
        ({"job": {"model": "vit_nano"}}, "job.model", "unknown_model"),
        ({"job": {"dataset": "dataset:none"}}, "job.dataset", "dataset_not_registered"),
        ({"job": {"dataset": "folder:///nowhere"}}, "job.dataset", "outside_roots"),
        ({"job": {"weights": "/nowhere/x.safetensors"}}, "job.weights", "outside_roots"),
        ({"job": {"weights": "job:none"}}, "job.weights", "weights_job_not_found"),
        ({"job": {"priority": 5}}, "job.priority", "priority_too_high"),
        ({"job": {"steps": 0}}, "job.steps", "invalid_request"),
        ({"space": {"colour": {"values": [1]}}}, "space", "invalid_request"),
        ({"space": {}}, "space", "invalid_request"),
        ({"objectives": {"beauty": "max"}}, "objectives.beauty", "invalid_request"),
        ({"asha": {"grace_steps": 2}}, "asha", "invalid_request"),
    ],
)
def test_a_bad_sweep_is_refused_by_field(api: TestClient, wrong: dict[str, Any], param: str, code: str) -> None:
    headers = key_for(api, "ann")
    answer = api.post("/v1/sweeps", json={**BODY, **wrong}, headers=headers)
    found = answer.json()
    assert (answer.status_code, found["code"]) == (422, code), found
    assert str(found["param"]).startswith(param) and found["errors"][0]["pointer"].startswith(
        f"/{param.replace('.', '/')}"
    )


def test_impossible_ratios_are_refused_before_anything_runs(api: TestClient) -> None:
    ratios = [{"full": 3, "forward": 0, "skip": 2}, {"full": 9, "forward": 0, "skip": 0}]
    answer = api.post("/v1/sweeps", json={"space": {"method.ratios": {"values": ratios}}})
    told = answer.json()
    assert answer.status_code == 422 and "sum to 9" in told["detail"] and told["param"] == "space"


def test_a_sweeps_names_are_made_addresses_once_for_all_its_trials(api: TestClient, settings: Settings) -> None:
    folder = settings.home / "cats"
    for label in ("cat", "dog"):
        (folder / "train" / label).mkdir(parents=True)
        (folder / "train" / label / "0.jpg").write_bytes(b"jpg")
    api.post("/v1/datasets", json={"name": "cats", "uri": f"folder://{folder}"})
    made = make(api, job={"steps": 4, "dataset": "dataset:cats"})
    assert made["dataset"] == made["spec"]["job"]["dataset"] == f"folder://{folder}"


def test_a_driver_asks_for_trials_and_is_told_of_them(api: TestClient, attempt: Attempt) -> None:
    made = api.post(TRIALS, json=body(), headers=run(attempt))
    assert made.status_code == 200 and made.json()["status"] == "queued" and made.json()["job_id"]
    assert api.post(TRIALS, json=body(), headers=run(attempt)).json() == made.json()
    api.post(TRIALS, json=body("full", setting={}, baseline="full"), headers=run(attempt))
    listed = api.get(TRIALS, headers=run(attempt)).json()["data"]
    assert [(each["key"], each["baseline"]) for each in listed] == [("t-0", None), ("full", "full")]
    ended = api.post(f"{TRIALS}/t-0/cancel", headers=run(attempt)).json()
    assert ended["status"] == "cancelled" == api.get(f"/v1/jobs/{ended['job_id']}").json()["status"]
    assert api.post(f"{TRIALS}/none/cancel", headers=run(attempt)).json()["code"] == "trial_not_found"
    sweep = api.get(f"/v1/sweeps/{attempt.job_id}").json()
    assert sweep["progress"]["done"] == 1 and [each["key"] for each in sweep["trials"]] == ["t-0", "full"]
    jobs = api.get("/v1/jobs", params={"sweep": attempt.job_id}).json()["data"]
    assert {job["trial_key"] for job in jobs} == {"t-0", "full"}


@pytest.mark.parametrize(
    "wrong", [{"key": "a/b"}, {"key": ""}, {"key": "x" * 81}, {"baseline": "half"}, {"spec": None}]
)
def test_a_trial_that_makes_no_sense_is_refused(api: TestClient, attempt: Attempt, wrong: dict[str, Any]) -> None:
    answer = api.post(TRIALS, json={**body(), **wrong}, headers=run(attempt))
    assert answer.status_code == 422 and str(answer.json()["param"]).startswith(next(iter(wrong)))


def test_too_many_waiting_is_a_429_with_a_time(api: TestClient, attempt: Attempt) -> None:
    me = api.get("/v1/me").json()["user"]["id"]
    api.patch(f"/v1/users/{me}", json={"max_queued": 0})
    answer = api.post(TRIALS, json=body(), headers=run(attempt))
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0


def test_a_jobs_token_has_no_trials_and_a_sweeps_opens_nothing_else(api: TestClient, attempt: Attempt) -> None:
    api.post("/v1/jobs", json={})
    other = store_of(api).queue.claim(9)
    assert other
    for answer in (
        api.get(TRIALS, headers=run(other)),
        api.post(TRIALS, json=body(), headers=run(other)),
        api.post(f"{TRIALS}/t-0/cancel", headers=run(other)),
    ):
        assert (answer.status_code, answer.json()["code"]) == (403, "not_a_sweep")
    for path in ("/v1/jobs", "/v1/sweeps", f"/v1/sweeps/{attempt.job_id}", "/v1/me"):
        assert api.get(path, headers=run(attempt)).status_code == 401
    assert api.get(TRIALS).status_code == 401, "nor does a key open that"


def test_a_cancelled_sweep_tells_its_run_and_takes_no_more(api: TestClient, attempt: Attempt) -> None:
    trial = api.post(TRIALS, json=body(), headers=run(attempt)).json()
    assert api.post(f"/v1/sweeps/{attempt.job_id}/cancel").json()["status"] == "cancelling"
    assert api.get(f"/v1/jobs/{trial['job_id']}").json()["error"]["code"] == "sweep_cancelled"
    told = api.post("/v1/runs/events", json={"attempt": 1, "events": []}, headers=run(attempt)).json()
    assert told["want"] == "cancel"
    late = api.post(TRIALS, json=body("late"), headers=run(attempt))
    assert (late.status_code, late.json()["code"]) == (409, "sweep_is_ending")


def test_what_a_sweep_leaves_is_at_its_own_routes(api: TestClient, attempt: Attempt, settings: Settings) -> None:
    directory = settings.attempt_dir(attempt.job_id, 1)
    (directory / "logs").mkdir(parents=True)
    (directory / "logs" / "driver.log").write_text("tuned\n")
    (directory / "front.svg").write_text("<svg/>")
    artifact = {"name": "front.svg", "path": str(directory / "front.svg"), "bytes": 6}
    lines = [
        {
            "seq": 1,
            "at": 1.0,
            "type": "sweep.trial",
            "level": "warning",
            "message": "t-0 failed",
            "data": {"key": "t-0"},
        },
        {"seq": 2, "at": 1.0, "type": "artifact.ready", "data": artifact},
    ]
    answer = api.post("/v1/runs/events", json={"attempt": 1, "events": lines}, headers=run(attempt))
    assert answer.json()["offset"] == 2
    path = f"/v1/sweeps/{attempt.job_id}"
    events = api.get(f"{path}/events").json()["data"]
    assert events[-2]["type"] == "sweep.trial" and events[-2]["level"] == "warning"
    assert api.get(f"{path}/logs").text == "tuned\n"
    assert [each["name"] for each in api.get(f"{path}/artifacts").json()["data"]] == ["front.svg"]
    assert api.get(f"{path}/artifacts/front.svg").text == "<svg/>"
    for end in ("", "/events", "/logs", "/artifacts", "/artifacts/front.svg", "/plan", "/metrics"):
        assert api.get(f"/v1/jobs/{attempt.job_id}{end}").json()["code"] == "job_not_found", end
    job = api.post("/v1/jobs", json={}).json()["id"]
    for end in ("", "/events", "/logs", "/artifacts"):
        assert api.get(f"/v1/sweeps/{job}{end}").json()["code"] == "sweep_not_found", end


def test_a_sweep_has_no_pause(api: TestClient, attempt: Attempt) -> None:
    answer = api.post(f"/v1/jobs/{attempt.job_id}/pause")
    assert (answer.status_code, answer.json()["code"]) == (409, "sweep_no_pause")
    assert api.post(f"/v1/sweeps/{attempt.job_id}/retry").json()["code"] == "sweep_not_retryable"
