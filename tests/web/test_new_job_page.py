"""The form for a job, and the one for a plan: what they offer, what they copy, and of whom."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

from starlette.testclient import TestClient

from scheduler.devices import DeviceRecord
from service.home import read_secret
from service.settings import Settings
from service.web.new_job import SCORES, STRATEGIES, given
from tests.service.conftest import record, write_book
from tests.service.walk import key_for
from tests.web.conftest import OURS, sign_in
from tests.web.test_jobs_page import NASTY
from workers.contract import DIGITS_MODEL, DIGITS_RATE, JobSpec
from workers.method import Method

__all__ = ["record"]


def known(text: str) -> dict[str, Any]:
    """What the page hands its script."""
    found = re.search(r'<script type="application/json" id="known">(.*?)</script>', text, re.DOTALL)
    assert found
    told: dict[str, Any] = json.loads(found.group(1))
    return told


def words_of(name: str) -> list[str]:
    """The words that a field of a job's method takes."""
    parts = get_args(Method.model_fields[name].annotation)
    return [word for part in parts for word in get_args(part)]


def test_every_word_of_the_contract_is_offered_and_explained() -> None:
    assert list(STRATEGIES) == words_of("strategy") and list(SCORES) == words_of("score")


def test_an_empty_form_says_what_is_usual(visitor: TestClient) -> None:
    answer = visitor.get("/ui/new")
    told = known(answer.text)
    assert told["spec"] == {} and told["measured"] == 0 and told["digits"] == {"train": 800, "test": 997}
    assert told["usual"]["model"] == DIGITS_MODEL and told["usual"]["learning_rates"]["digits"] == DIGITS_RATE
    assert "script-src 'self'" in answer.headers["content-security-policy"] and "style=" not in answer.text
    assert 'value="live"' not in answer.text


def test_every_field_of_the_form_is_one_of_a_job(visitor: TestClient) -> None:
    schema = JobSpec.model_json_schema()
    for path in re.findall(r'data-path="([^"]+)"', visitor.get("/ui/new").text):
        at: dict[str, Any] = schema
        for part in path.split("."):
            at = next(way["properties"][part] for way in _ways(schema, at) if part in way.get("properties", {}))


def _ways(schema: dict[str, Any], at: dict[str, Any]) -> list[dict[str, Any]]:
    """What a field's schema may be, references resolved."""
    found = [at, *at.get("anyOf", ())]
    return [schema["$defs"][each["$ref"].rpartition("/")[2]] if "$ref" in each else each for each in found]


def test_a_job_is_copied_without_what_is_usual_and_as_text(visitor: TestClient) -> None:
    body = {"name": NASTY[1], "steps": 9, "method": {"ratios": {"full": 3, "skip": 2}, "lora": {"rank": 4}}}
    made = visitor.post("/v1/jobs", json=body, headers=OURS).json()
    text = visitor.get("/ui/new", params={"from": made["id"]}).text
    spec = known(text)["spec"]
    assert spec.pop("method") == {"ratios": {"full": 3, "skip": 2}, "lora": {"rank": 4}}
    assert spec == {"name": NASTY[1], "steps": 9}
    assert "&lt;script&gt;alert" in text and "<script>alert" not in text
    again = visitor.post("/v1/jobs", json=known(text)["spec"], headers=OURS)
    assert again.status_code == 201 and again.json()["spec"] == made["spec"]


def test_a_spec_of_another_version_is_handed_on_as_it_is() -> None:
    assert given({"steps": 3, "unheard_of": 1}) == {"steps": 3, "unheard_of": 1}
    assert given(JobSpec(steps=3).model_dump(mode="json")) == {"steps": 3}


def test_anothers_job_cannot_be_copied(api: TestClient, settings: Settings) -> None:
    job_id = api.post("/v1/jobs", json={"steps": 2}).json()["id"]
    bob = key_for(api, "bob")["Authorization"].removeprefix("Bearer ")
    sign_in(api, bob)
    assert api.get("/ui/new", params={"from": job_id}).status_code == 404
    assert api.get("/ui/new", params={"from": "ftjob_nobodys"}).status_code == 404
    sign_in(api, read_secret(settings.home / "key") or "")
    assert api.get("/ui/new", params={"from": job_id}).status_code == 200


def test_measured_devices_are_offered_for_the_forecast(
    visitor: TestClient, settings: Settings, record: DeviceRecord
) -> None:
    write_book(settings.devices_file, record)
    text = visitor.get("/ui/new").text
    assert "the 1 measured device<" in text and known(text)["measured"] == 1


def test_the_page_for_plans_names_kinds_and_links_that_the_planner_knows(visitor: TestClient) -> None:
    text = visitor.get("/ui/what-if").text
    kinds = re.search(r'<datalist id="kinds">(.*?)</datalist>', text, re.DOTALL)
    links = re.search(r'<datalist id="links">(.*?)</datalist>', text, re.DOTALL)
    assert kinds and links and "style=" not in text
    body = {"devices": re.findall(r'value="([^"]+)"', kinds.group(1))[:3]}
    for link in re.findall(r'value="([^"]+)"', links.group(1)):
        assert visitor.post("/v1/plans", json={**body, "link": link}, headers=OURS).status_code == 200
