"""Sweeps as HTML: the list with its filters and pages, one with its files; names are text, and of the owner alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.web import sweeps as pages
from tests.service.walk import key_for, store_of
from tests.web.conftest import OURS, sign_in
from tests.web.test_jobs_page import NASTY

BODY = {
    "job": {"steps": 4},
    "space": {"seed": {"values": [1, 2]}, "optimiser.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}},
    "search": {"type": "random", "samples": 3},
}


def make(visitor: TestClient, **given: Any) -> str:
    answer = visitor.post("/v1/sweeps", json={**BODY, **given}, headers=OURS)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def ids(text: str) -> list[str]:
    return re.findall(r'id="row-(sweep_\w+)"', text)


def test_an_empty_list_says_how_to_begin(visitor: TestClient) -> None:
    assert "d2ft sweep --ratios" in visitor.get("/ui/sweeps").text


def test_sweeps_are_filtered_and_paged_by_the_address(visitor: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "ROWS", 2)
    made = [make(visitor, name=f"number {n}") for n in range(3)]
    first = visitor.get("/ui/sweeps").text
    assert ids(first) == made[:0:-1] and 'hx-get="/ui/sweeps"' in first
    more = re.search(r'href="([^"]+)" rel="next"', first)
    assert more and ids(visitor.get(more.group(1).replace("&amp;", "&")).text) == made[:1]
    assert ids(visitor.get("/ui/sweeps", params={"search": "number 1"}).text) == [made[1]]
    assert ids(visitor.get("/ui/sweeps", params={"order": "asc"}).text) == made[:2]
    assert "No sweep is like that" in visitor.get("/ui/sweeps", params={"status": "failed"}).text
    assert ids(visitor.get("/ui/sweeps", params={"status": "waiting"}).text) == made[:0:-1]


def test_names_are_text_in_the_list_and_on_their_page(visitor: TestClient) -> None:
    for name in NASTY:
        sweep_id = make(visitor, name=name, metadata={"k": name})
        for text in (visitor.get("/ui/sweeps").text, visitor.get(f"/ui/sweeps/{sweep_id}").text):
            assert "<img src=x" not in text and "<script>alert" not in text and "style=" not in text
            assert not set(text) & {"\u202e", "\u0001", "\u0007"}


def test_a_page_says_what_is_tried_and_from_where_its_script_goes_on(visitor: TestClient) -> None:
    sweep_id = make(visitor)
    text = visitor.get(f"/ui/sweeps/{sweep_id}").text
    newest, _ = store_of(visitor).records.end(sweep_id)
    assert f'data-id="{sweep_id}"' in text and f'data-after="{newest}"' in text and 'data-page="sweep"' in text
    assert "0 of 5 trials are over" in text and "by random" in text


def test_files_that_are_there_can_be_downloaded(visitor: TestClient) -> None:
    sweep_id = make(visitor)
    store = store_of(visitor)
    attempt = store.queue.claim_sweep(1)
    assert attempt and "download=" not in visitor.get(f"/ui/sweeps/{sweep_id}").text
    told = {"name": "front.svg", "path": "result/front.svg", "bytes": 3, "sha256": "0" * 64}
    store.attempts.absorb(attempt, [{"seq": 1, "type": "artifact.ready", "data": told}], 10)
    assert f'href="/v1/sweeps/{sweep_id}/artifacts/front.svg"' in visitor.get(f"/ui/sweeps/{sweep_id}").text


def test_a_sweep_is_its_owners_and_a_job_is_none(visitor: TestClient) -> None:
    sweep_id = make(visitor)
    job_id = visitor.post("/v1/jobs", json={"steps": 2}, headers=OURS).json()["id"]
    assert visitor.get(f"/ui/sweeps/{job_id}").status_code == 404
    visitor.headers.update(OURS)
    bob = key_for(visitor, "bob")["Authorization"].removeprefix("Bearer ")
    sign_in(visitor, bob)
    assert visitor.get(f"/ui/sweeps/{sweep_id}").status_code == 404
    assert ids(visitor.get("/ui/sweeps").text) == []
