"""The list of jobs as HTML: what it shows, of whom, and that names are text."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from service.home import read_secret
from service.settings import Settings
from service.web.jobs import ROWS
from service.web.render import duration, plain, size
from tests.web.conftest import HTML, OURS, sign_in

NASTY = ["<img src=x onerror=alert(1)>", '"><script>alert(1)</script>', "a\u202egnp.exe", "שלום", "nul\u0001bell\u0007"]


def _ids(text: str) -> list[str]:
    return re.findall(r'id="row-(ftjob_\w+)"', text)


def test_an_empty_list_says_how_to_begin(visitor: TestClient) -> None:
    text = visitor.get("/").text
    assert "No jobs yet" in text and "d2ft submit" in text


def test_names_are_text_wherever_they_stand(visitor: TestClient) -> None:
    for name in NASTY:
        answer = visitor.post("/v1/jobs", json={"name": name, "steps": 2}, headers=OURS)
        assert answer.status_code == 201, answer.text
    text = visitor.get("/").text
    assert "<img src=x" not in text and "<script>alert" not in text
    assert not set(text) & {"\u202e", "\u0001", "\u0007"}
    assert "a⟨202E⟩gnp.exe" in text and "nul␁bell␇" in text and "שלום" in text


def test_filters_sorting_and_pages_stand_in_the_address(visitor: TestClient) -> None:
    for n in range(ROWS + 5):
        body = {"steps": 2, "name": f"job-{n}", "model": "d2ft_digits" if n % 2 else "vit_tiny_patch16_224"}
        assert visitor.post("/v1/jobs", json=body, headers=OURS).status_code == 201
    first = visitor.get("/?search=job-&sort=model&order=asc").text
    assert len(_ids(first)) == ROWS and 'aria-sort="ascending"' in first
    more = re.search(r'href="(/\?[^"]*)" rel="next"', first)
    assert more is not None
    second = visitor.get(more.group(1).replace("&amp;", "&")).text
    assert len(_ids(second)) == 5 and not set(_ids(first)) & set(_ids(second))
    assert "First page" in second and 'rel="next"' not in second
    assert "No job is like that" in visitor.get("/?status=failed").text
    assert len(_ids(visitor.get("/?status=waiting&search=job-1").text)) == 11
    assert len(_ids(visitor.get("/?model=vit_tiny_patch16_224&search=job-2").text)) == 6


@pytest.mark.parametrize("query", ["sort=loss", "order=up", "after=ftjob_none", "search=" + "a" * 300])
def test_a_wrong_address_is_a_page_that_says_so(visitor: TestClient, query: str) -> None:
    answer = visitor.get(f"/?{query}")
    assert answer.status_code in (404, 422) and "<h1>" in answer.text


def test_nobody_sees_anothers_jobs(api: TestClient, settings: Settings, submit: Callable[..., str]) -> None:
    theirs = submit(steps=2, name="theirs")
    api.post("/v1/users", json={"name": "ann"})
    made = api.post("/v1/keys", json={"name": "k", "scopes": ["read", "write"], "user": "ann"}).json()
    sign_in(api, made["key"])
    api.headers.update(HTML)
    assert theirs not in api.get("/").text
    assert theirs not in api.get("/?owner=admin").text
    assert api.get(f"/ui/compare?job={theirs}").status_code == 404
    assert api.get(f"/ui/live?job={theirs}").status_code == 404


def test_a_comparison_shows_where_jobs_differ(visitor: TestClient) -> None:
    ids = [visitor.post("/v1/jobs", json={"steps": n, "seed": 1}, headers=OURS).json()["id"] for n in (2, 3)]
    text = visitor.get(f"/ui/compare?job={ids[0]}&job={ids[1]}").text
    assert "<th>steps</th>" in text and "<th>seed</th>" not in text


def test_every_page_forbids_what_it_does_not_need(visitor: TestClient, settings: Settings) -> None:
    for path in ("/", "/ui/sign-in", "/ui/compare?job=none"):
        policy = visitor.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert "frame-ancestors 'none'" in policy
    assert (read_secret(settings.home / "key") or "") not in visitor.get("/").text


def test_figures_are_short() -> None:
    spans = (None, 5, 300, 5 * 3600 + 720, 4 * 86400)
    assert [duration(s) for s in spans] == ["–", "5 s", "5 min", "5 h 12 min", "4 d"]
    assert [size(n) for n in (None, 0, 999, 1_500_000, 2e18)] == ["–", "0 B", "999 B", "1.5 MB", "2e+03 PB"]
    assert plain("a\tb\u2066c") == "a b⟨2066⟩c"
