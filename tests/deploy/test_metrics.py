"""Prometheus and Grafana: every expression parses, and asks for series that a live `/metrics` has."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from starlette.testclient import TestClient

from service.store import Store
from tests.deploy.files import DEPLOY, README, RUNBOOK, dashboards, walk
from tests.deploy.promql import FROM_PROMETHEUS, expressions, grouped_by, parse, selectors
from tests.deploy.test_kubernetes import OURS, pods
from tests.service.conftest import FakeRay

ALL = expressions()


@pytest.fixture
def live(
    api: TestClient, ray: FakeRay, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[Sample]]:
    """What the application tells after it was used and some of it has failed: its samples by name."""
    submit()
    api.get("/v1/jobs", headers={"Authorization": "Bearer no"})
    ray.down = True
    api.get("/readyz")
    with monkeypatch.context() as broken:
        broken.setattr(Store, "ping", lambda self: 1 / 0)
        assert api.get("/readyz").status_code == 500
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(api.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    up = Sample("up", {"job": "d2ft", "instance": "a"}, 1.0)  # Prometheus' own word about a scrape
    return {**found, "up": [up]}


def agrees(matcher: Any, value: str) -> bool:
    """Whether a label's value is one that a matcher takes."""
    if matcher.op in (promql_parser.MatchOp.Re, promql_parser.MatchOp.NotRe):
        found = re.fullmatch(matcher.value, value) is not None
    else:
        found = matcher.value == value
    return found == (matcher.op in (promql_parser.MatchOp.Re, promql_parser.MatchOp.Equal))


def chosen(samples: list[Sample], selector: Any) -> list[Sample]:
    """The samples that a selector takes."""
    return [
        sample
        for sample in samples
        if all(agrees(one, sample.labels.get(one.name, "")) for one in selector.matchers.matchers)
    ]


def test_every_expression_asks_for_series_that_are_there(live: dict[str, list[Sample]]) -> None:
    assert len(ALL) > 40
    for place, expression in ALL:
        tree = parse(expression)
        labels: set[str] = set()
        assert selectors(tree), place
        for selector in selectors(tree):
            assert selector.name in live, f"{place}: there is no {selector.name}"
            assert chosen(live[selector.name], selector), f"{place}: nothing is chosen by {selector}"
            labels |= set(live[selector.name][0].labels)
        assert grouped_by(tree) <= labels | FROM_PROMETHEUS, f"{place}: {grouped_by(tree)} of {labels}"


def test_counters_are_taken_as_rates_and_gauges_are_not() -> None:
    for place, expression in ALL:
        for function, name in re.findall(r"(rate|delta)\((\w+)", expression):
            counts = name.endswith(("_total", "_bucket", "_count", "_sum"))
            assert counts == (function == "rate"), f"{place}: {function} of {name}"
        assert not re.search(r"(?<!rate\()\b\w+_total\b", expression), place


def test_every_metric_of_ours_is_shown_or_watched(live: dict[str, list[Sample]]) -> None:
    shown = {re.sub(r"_(bucket|count|sum)$", "", one.name) for _, text in ALL for one in selectors(parse(text))}
    names = {re.sub(r"_(bucket|count|sum)$", "", name) for name in live if name.startswith("d2ft_")}
    assert names <= shown, names - shown


def test_the_parser_refuses_what_is_no_expression() -> None:
    with pytest.raises(ValueError):
        parse("rate(d2ft_jobs)")


def test_dashboards_are_whole() -> None:
    uids = set()
    for name, dashboard in dashboards().items():
        assert name == f"{dashboard['uid']}.json"
        uids.add(dashboard["uid"])
        assert [each["type"] for each in dashboard["templating"]["list"]] == ["datasource"]
        panels = dashboard["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        taken = set()
        for panel in panels:
            place = panel["gridPos"]
            for cell in ((x, y) for x in range(place["w"]) for y in range(place["h"])):
                at = (place["x"] + cell[0], place["y"] + cell[1])
                assert at not in taken and at[0] < 24, panel["title"]
                taken.add(at)
            if panel["type"] != "row":
                assert panel["datasource"]["uid"] == "${datasource}"
                assert panel["fieldConfig"]["defaults"]["unit"]
    assert len(uids) == len(dashboards()) >= 2


def test_alerts_lead_to_the_runbook() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in RUNBOOK.read_text().splitlines()
        if line.startswith("#")
    }
    for rule in walk(yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())):
        if isinstance(rule, dict) and "alert" in rule:
            assert rule["labels"]["severity"] in ("page", "ticket") and rule["annotations"]["summary"]
            file, _, heading = rule["annotations"]["runbook"].partition("#")
            assert file == RUNBOOK.name and heading in headings, rule["alert"]


@pytest.mark.parametrize("name", ["prometheus.yml", "kubernetes.yml"])
def test_the_scrape_sends_a_key_from_a_file(name: str, api: TestClient) -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / name).read_text())
    assert config["rule_files"] == ["alerts.yml"]
    job = next(each for each in config["scrape_configs"] if each["job_name"] == "d2ft")
    assert list(job["authorization"]) == ["credentials_file"]
    assert api.get(job["metrics_path"]).status_code == 200
    del api.headers["Authorization"]
    assert api.get(job["metrics_path"]).status_code == 401
    assert "keys add prometheus --scope read" in README.read_text()


def test_relabelling_keeps_pods_and_ports_that_are_there() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/kubernetes.yml").read_text())
    for job in config["scrape_configs"]:
        kept = {
            rule["source_labels"][0]: rule["regex"] for rule in job["relabel_configs"] if rule.get("action") == "keep"
        }
        name = kept["__meta_kubernetes_pod_label_app_kubernetes_io_name"]
        port = kept["__meta_kubernetes_pod_container_port_name"]
        templates = [
            template
            for _, template in pods([manifest for _, manifest in OURS])
            if template["metadata"]["labels"].get("app.kubernetes.io/name") == name
        ]
        assert templates
        for template in templates:
            ports = [each["name"] for container in template["spec"]["containers"] for each in container["ports"]]
            assert port in ports


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not here")
def test_the_alerts_go_off_when_they_should() -> None:
    command = ["promtool", "test", "rules", str(Path("alerts.test.yml"))]
    done = subprocess.run(command, cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
