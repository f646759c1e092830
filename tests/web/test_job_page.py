"""The page of a job as HTML: what each tab has, what may be asked in which state, and that all of it is text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from starlette.testclient import TestClient

from service.lifecycle import JobState
from service.store import Attempt, Store
from service.web.job import ACTIONS, ROWS, TABS, form_of
from service.web.render import brief, lines, pretty
from tests.service.walk import key_for, store_of
from tests.web.conftest import OURS, sign_in
from tests.web.test_jobs_page import NASTY

SHA = "ab" * 32
Events = list[dict[str, Any]]


@pytest.fixture
def store(visitor: TestClient) -> Store:
    return store_of(visitor)


@pytest.fixture
def attempt(visitor: TestClient, store: Store) -> Attempt:
    """A job that runs."""
    body = {
        "name": NASTY[0],
        "steps": 40,
        "workers": 3,
        "method": {"ratios": {"full": 3, "skip": 2}},
        "metadata": {"a": "<b>"},
    }
    assert visitor.post("/v1/jobs", json=body, headers=OURS).status_code == 201
    found = store.queue.claim(1)
    assert found
    return found


@pytest.fixture
def say(store: Store, attempt: Attempt) -> Callable[..., None]:
    """Have the run say what its file would have."""
    told: Events = []

    def send(type: str, message: str = "", *, level: str = "info", **data: Any) -> None:
        told.append({"seq": len(told) + 1, "at": 1.0, "type": type, "level": level, "message": message, "data": data})
        store.attempts.absorb(attempt, told[-1:], len(told))

    return send


def page_of(visitor: TestClient, job_id: str, tab: str = "", status: int = 200) -> str:
    answer = visitor.get(f"/ui/jobs/{job_id}{tab and '/'}{tab}")
    assert answer.status_code == status, answer.text
    return answer.text


def offered(text: str) -> list[str]:
    return re.findall(r'data-act="(\w+)"', text)


def test_every_tab_of_a_job_that_waits_says_what_is_not_there_yet(
    visitor: TestClient, submit: Callable[..., str]
) -> None:
    visitor.headers.update(OURS)
    job_id = submit(name="waits")
    for tab, title in TABS.items():
        text = page_of(visitor, job_id, tab)
        assert "<title>queued · waits · d2ft</title>" in text and 'data-page="job"' in text
        assert re.search(rf'aria-current="page">{title}</a>', text) and f'data-tab="{tab}"' in text
        assert "place 1 in the queue" in text and 'data-planned="0"' in text
    assert page_of(visitor, job_id) == page_of(visitor, job_id, "overview").replace(f"{job_id}/overview", job_id)


def test_a_tab_or_a_job_that_is_not_there_is_a_page_that_says_so(
    visitor: TestClient, submit: Callable[..., str]
) -> None:
    visitor.headers.update(OURS)
    assert "There are overview, charts" in page_of(visitor, submit(), "loss", 404)
    assert "<h1>Not found</h1>" in page_of(visitor, "ftjob_none", status=404)
    assert "<h1>" in page_of(visitor, submit(), "events?before=0", 422)


def test_anothers_job_is_not_there_on_any_tab(visitor: TestClient, store: Store, submit: Callable[..., str]) -> None:
    visitor.headers.update(OURS)
    job_id = submit(name="mine")
    sign_in(visitor, key_for(visitor, "guest")["Authorization"].removeprefix("Bearer "))
    for tab in TABS:
        assert "mine" not in page_of(visitor, job_id, tab, 404)


def test_what_may_be_asked_goes_with_the_state(visitor: TestClient, store: Store, submit: Callable[..., str]) -> None:
    visitor.headers.update(OURS)
    job_id = submit()
    assert offered(page_of(visitor, job_id)) == ["pause", "cancel"]
    for action, then in (("pause", ["resume", "cancel"]), ("resume", ["pause", "cancel"]), ("cancel", ["retry"])):
        assert visitor.post(f"/v1/jobs/{job_id}/{action}").status_code == 200
        assert offered(page_of(visitor, job_id, "logs")) == then
    refused = {state for action, states in ACTIONS.items() for state in states if action in ("pause", "cancel")}
    assert not refused & {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    assert [action for action, states in ACTIONS.items() if JobState.SUCCEEDED in states] == []


def test_the_overview_has_the_ledger_once_there_is_one(
    visitor: TestClient, attempt: Attempt, say: Callable[..., None]
) -> None:
    say("phase", name="running")
    say("evaluation", when="before", accuracy=0.125, loss=2.3, num_images=8)
    say(
        "metrics",
        step=10,
        total_steps=40,
        epoch=0.5,
        loss=1.25,
        step_seconds=0.5,
        compute_fraction=0.6,
        bytes_fraction=0.5,
    )
    text = page_of(visitor, attempt.job_id)
    assert 'id="fact-progress">25.0 %' in text and 'id="fact-eta">15 s' in text and 'id="fact-loss">1.25' in text
    assert 'id="fact-compute">60.0 %' in text and "12.5 % before training" in text and "Not known yet" in text
    row = {"name": "step seconds", "unit": "s", "predicted": 0.4, "measured": 0.42, "all_full": None}
    say(
        "ledger",
        rows=[row],
        accuracy={"before": 0.125, "after": 0.9},
        phases={"training": 84.0},
        steps=40,
        migrations=[],
    )
    text = page_of(visitor, attempt.job_id)
    assert "0.4 s" in text and "0.42 s" in text and "90.0 %" in text and "84 s" in text and "Not known yet" not in text


@pytest.mark.parametrize("fault", ["user", "system", "capacity"])
def test_an_error_says_its_cause_and_what_to_do(
    visitor: TestClient, attempt: Attempt, say: Callable[..., None], fault: str
) -> None:
    error = {
        "code": "not_finite",
        "fault": fault,
        "message": "<b>first</b>\nsecond\u202e",
        "param": "optimiser.learning_rate",
    }
    say("phase", name="running")
    say("outcome", status="failed", error=error)
    text = page_of(visitor, attempt.job_id)
    assert "&lt;b&gt;first&lt;/b&gt;\nsecond⟨202E⟩" in text and "optimiser.learning_rate" in text
    assert "What to do:" in text and ("Correct and run again" in text) == (fault == "user")
    assert offered(text) == ["retry"]


def test_a_trial_names_its_sweep(visitor: TestClient, store: Store) -> None:
    body = {"job": {"steps": 4}, "space": {"seed": {"values": [1, 2]}}, "baselines": False}
    made = visitor.post("/v1/sweeps", json=body, headers=OURS).json()
    sweep = store.queue.claim_sweep(1)
    assert sweep
    asked = {"key": "t1", "setting": {"seed": 1}, "spec": {"steps": 4, "seed": 1}, "baseline": None}
    trial = visitor.post("/v1/runs/trials", json=asked, headers={"Authorization": f"Bearer {sweep.token}"})
    assert trial.status_code in (200, 201), trial.text
    text = page_of(visitor, trial.json()["job_id"])
    assert f'href="/ui/sweeps/{made["id"]}"' in text and "Tried: seed" in text


def test_charts_know_evaluations_and_restarts(visitor: TestClient, attempt: Attempt, say: Callable[..., None]) -> None:
    say("evaluation", when="before", accuracy=0.1, loss=2.3, num_images=8)
    for step in (1, 2, 3):
        say("metrics", step=step, loss=1.0)
    say("attempt.lost", attempt=1, code="driver_died")
    say("checkpoint.resumed", name="step-2", step=2)
    text = page_of(visitor, attempt.job_id, "charts")
    found = re.search(r'<script id="marks" type="application/json">(.*?)</script>', text)
    assert found
    marks = json.loads(found.group(1))
    assert [mark["type"] for mark in marks] == ["evaluation", "attempt.lost", "checkpoint.resumed"]
    assert marks[1]["step"] == 3 and marks[2]["data"]["step"] == 2
    assert "uPlot.iife.min.js" in text and "uPlot" not in page_of(visitor, attempt.job_id)


def test_the_placement_is_told_what_was_measured(
    visitor: TestClient, attempt: Attempt, say: Callable[..., None]
) -> None:
    say("plan.created", version=1, window=0)
    say("window", window=1, busy=[0.1, 0.2])
    say("ledger", rows=[], memory={"predicted_bytes": [1], "measured_bytes": [7]})
    text = page_of(visitor, attempt.job_id, "placement")
    found = re.search(r'<script id="measured" type="application/json">(.*?)</script>', text)
    assert found and json.loads(found.group(1)) == {"busy": [0.1, 0.2], "predicted_bytes": [1], "measured_bytes": [7]}


def test_the_history_is_narrowed_and_paged_newest_first(
    visitor: TestClient, attempt: Attempt, say: Callable[..., None]
) -> None:
    for step in range(ROWS + 5):
        say("metrics", step=step + 1, loss=1.0)
    say("data.skipped", "two <i>", level="warning", count=2, files=["<u>"])
    seen = page_of(visitor, attempt.job_id, "events")
    assert "two &lt;i&gt;" in seen and "&lt;u&gt;" in seen and "All but metrics" in seen
    assert not re.search(r"<td[^>]*>metrics</td>", seen) and 'value="metrics"' in seen
    warned = page_of(visitor, attempt.job_id, "events?level=warning&level=nonsense")
    assert len(re.findall(r'<tr id="event-', warned)) == 1
    steps = page_of(visitor, attempt.job_id, "events?type=metrics")
    numbers = [int(seq) for seq in re.findall(r'<tr id="event-(\d+)"', steps)]
    assert len(numbers) == ROWS and numbers == sorted(numbers, reverse=True)
    older = re.search(r'href="(\?[^"]*)" rel="next"', steps)
    assert older
    rest = page_of(visitor, attempt.job_id, "events" + unescape(older.group(1)))
    assert len(re.findall(r'<tr id="event-', rest)) == 5 and ">Newest</a>" in rest and 'rel="next"' not in rest
    assert "No event is like that" in page_of(visitor, attempt.job_id, "events?type=never")


def test_files_have_size_hash_and_a_link(visitor: TestClient, attempt: Attempt, say: Callable[..., None]) -> None:
    say("artifact.ready", name="tensorboard/events.out.tfevents.1", path="x", bytes=1500, sha256=SHA)
    say("artifact.ready", name='odd "name"?.onnx', path="x", bytes=7, sha256=SHA)
    say("checkpoint.saved", name="step-00000010", step=10, path="x", bytes=10**6, sha256=SHA)
    text = page_of(visitor, attempt.job_id, "files")
    root = f"/v1/jobs/{attempt.job_id}/artifacts"
    assert f'href="{root}/tensorboard/events.out.tfevents.1"' in text and "1.5 kB" in text
    assert f'href="{root}/odd%20%22name%22%3F.onnx"' in text and text.count(SHA) == 3 and "step-00000010" in text
    forms = [form_of(name) for name in ("a/tfevents.1", "m.onnx", "w.safetensors", "x")]
    assert forms == ["TensorBoard", "ONNX", "weights", "file"]


def test_the_config_can_be_copied_and_run_again(visitor: TestClient) -> None:
    body = {"name": NASTY[2], "steps": 4, "workers": 3, "train_embed": False, "metadata": {"k": "שלום\u2066"}}
    made = visitor.post("/v1/jobs", json=body, headers=OURS).json()
    text = page_of(visitor, made["id"], "config")
    found = re.search(r'<code id="spec">(.*?)</code>', text, re.DOTALL)
    assert found and "\u202e" not in text
    spec = json.loads(unescape(found.group(1)))
    again = visitor.post("/v1/jobs", json=spec, headers=OURS).json()
    assert again["spec"] == made["spec"] and again["name"] == NASTY[2]
    changed = re.findall(r'<th scope="row">([\w.]+)</th><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td>', text)
    assert {(path, own, usual) for path, own, usual in changed} >= {
        ("workers", "3", "2"),
        ("train_embed", "False", "True"),
    }
    assert {path for path, *_ in changed} == {"name", "steps", "workers", "train_embed", "metadata.k"}


def test_what_a_job_and_its_run_say_is_text_on_every_tab(
    visitor: TestClient, attempt: Attempt, say: Callable[..., None]
) -> None:
    for nasty in NASTY:
        say("note", nasty, text=nasty, **{f"key {nasty}": nasty})
        say("evaluation", when=nasty, accuracy=0.5, loss=1, num_images=1)
        say("artifact.ready", name=nasty, path="x", bytes=1, sha256=SHA)
        say("checkpoint.saved", name=nasty, step=1, path="x", bytes=1, sha256=SHA)
    for tab in TABS:
        text = page_of(visitor, attempt.job_id, tab)
        assert "<img src=x" not in text and "<script>alert" not in text and "<b>" not in text
        assert not set(text) & {"\u202e", "\u0001", "\u0007"}, tab


def test_texts_keep_their_lines_and_json_stays_json() -> None:
    assert lines("a\n<b>\u202e") == Markup("a\n&lt;b&gt;⟨202E⟩")
    value = {"a": ["\u202e", "𝒳", "é", "\n", "\U000e0001"], "b": 1.5}
    assert json.loads(unescape(pretty(value))) == value and "\u202e" not in pretty(value)
    assert brief({"when": "before", "accuracy": 0.123456, "files": []}) == "when before, accuracy 0.1235"


def test_the_page_follows_from_the_event_that_it_has_seen(
    visitor: TestClient, attempt: Attempt, say: Callable[..., None]
) -> None:
    say("note", "one")
    newest = visitor.get(f"/v1/jobs/{attempt.job_id}/events").json()["data"][-1]["seq"]
    assert f'data-after="{newest}"' in page_of(visitor, attempt.job_id)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_KINDS = st.sampled_from(["metrics", "plan.created", "ledger", "window", "evaluation", "phase", "timeline", "outcome"])
_NUMBERS = ["memory", "steps", "busy", "loss", "step", "total_steps", "epoch", "step_seconds", "compute_fraction"]
_PARTS = ["rows", "accuracy", "phases", "migrations", "placement", "forecast", "cycle", "heads", "devices", "when"]
_FIELDS = st.sampled_from([*_NUMBERS, *_PARTS, "error"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(told=st.lists(st.tuples(_KINDS, st.dictionaries(_FIELDS, _VALUES, max_size=5)), max_size=3))
def test_whatever_a_run_tells_of_itself_is_a_page(
    visitor: TestClient, store: Store, told: list[tuple[str, dict[str, Any]]]
) -> None:
    job_id = visitor.post("/v1/jobs", json={"steps": 3}, headers=OURS).json()["id"]
    attempt = store.queue.claim(10_000)
    assert attempt and attempt.job_id == job_id
    lines = [
        {"seq": number, "at": 1.0, "type": kind, "level": "info", "message": "", "data": json_of(data)}
        for number, (kind, data) in enumerate(told, 1)
    ]
    store.attempts.absorb(attempt, lines, len(lines))
    for tab in TABS:
        assert visitor.get(f"/ui/jobs/{job_id}/{tab}").status_code == 200, (tab, told)
    assert visitor.get("/").status_code == 200
    assert visitor.get(f"/ui/compare?job={job_id}").status_code == 200


def json_of(data: dict[str, Any]) -> dict[str, Any]:
    """As a line of a file would have it."""
    found: dict[str, Any] = json.loads(json.dumps(data).replace("\\\\u0000", ""))
    return found


def test_a_run_outside_says_where_it_is_and_is_not_started_again_from_here(visitor: TestClient) -> None:
    where = {"run_dir": "/shared/<b>run1", "submission_id": "raysubmit_1"}
    body = {"spec": {"steps": 3}, "where": where}
    job_id = visitor.post("/v1/runs", json=body, headers=OURS).json()["job_id"]
    text = page_of(visitor, job_id)
    assert "outside" in text and "/shared/&lt;b&gt;run1" in text and "raysubmit_1" in text and "<b>run1" not in text
    assert visitor.post(f"/v1/jobs/{job_id}/pause", headers=OURS).status_code == 200
    assert 'data-act="resume"' not in page_of(visitor, job_id)
    assert "/shared/&lt;b&gt;run1/result" in page_of(visitor, job_id, "files")
