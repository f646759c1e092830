"""Expressions of dashboards and alerts: which series they ask for, and by which labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import promql_parser
import yaml

from tests.deploy.files import DEPLOY, dashboards, walk

FROM_PROMETHEUS = {"instance", "job", "le"}  # labels that a scrape or a histogram adds
INTERVALS = {"$__rate_interval": "5m"}


def expressions() -> list[tuple[str, str]]:
    """(where it stands, the expression) of all dashboards and alerts."""
    found = [
        (f"{name}: {panel['title']}", target["expr"])
        for name, dashboard in dashboards().items()
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
    return found + [(each["alert"], each["expr"]) for each in walk(rules) if isinstance(each, dict) and "alert" in each]


def parse(expression: str) -> Any:
    """The tree, after Grafana's variables have their values. Raises ValueError."""
    for name, value in INTERVALS.items():
        expression = expression.replace(name, value)
    return promql_parser.parse(expression)


def nodes(tree: Any) -> Iterator[Any]:
    """A tree's nodes, the root first."""
    yield tree
    for name in ("lhs", "rhs", "expr", "param", "vector_selector"):
        inside = getattr(tree, name, None)
        if inside is not None:
            yield from nodes(inside)
    for each in getattr(tree, "args", None) or []:
        yield from nodes(each)


def selectors(tree: Any) -> list[Any]:
    return [node for node in nodes(tree) if isinstance(node, promql_parser.VectorSelector)]


def grouped_by(tree: Any) -> set[str]:
    """Labels of all `by (…)`; `without` is not used."""
    found: set[str] = set()
    for node in nodes(tree):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            assert node.modifier.type == promql_parser.AggModifierType.By
            found |= set(node.modifier.labels)
    return found
