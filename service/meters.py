"""Meters: what the service counts and times of itself while it works, for Prometheus.

Every application has a registry of its own. Labels come from small closed sets (templates of routes, methods, statuses,
states, codes of ours), never from ids, names or users. What the store knows is not counted here but looked up when
somebody scrapes (`scrape`): so it survives a restart, and is the same in every process.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator
from contextlib import contextmanager

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from service.errors import UnavailableError

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
WORKS = ("lease", "look", "attempt", "reconcile")
RAY_CALLS = ("submit", "get", "list", "stop", "logs", "resources")
TRANSACTIONS = ("read", "write")
FAST_S = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SLOW_S = FAST_S[2:]

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call] # a series more for every one, which nobody reads


class Meters:
    """The instruments of one application. A part that is made without one gets one that nobody reads."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "d2ft_http_requests", "Requests answered.", ("method", "route", "status"), registry=registry
        )
        self._request_seconds = Histogram(
            "d2ft_http_request_duration_seconds",
            "Time until an answer began; a stream goes on after that.",
            ("method", "route"),
            buckets=SLOW_S,
            registry=registry,
        )
        self._refused = Counter(
            "d2ft_http_requests_refused", "Requests refused at the door.", ("reason",), registry=registry
        )
        self.loop_lag = Histogram(
            "d2ft_event_loop_lag_seconds", "How late the event loop woke a sleeper.", buckets=SLOW_S, registry=registry
        )
        self._make_supervisor_meters(registry)
        self._make_neighbour_meters(registry)
        Info("d2ft_build", "What this process runs.", registry=registry).info({"version": version()})
        ProcessCollector(registry=registry)

    def answered(self, method: str, route: str, status: int, head_s: float, refused: str | None) -> None:
        """One request is done; `refused` is the door's reason where it did not let the request in."""
        method = method if method in METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(method, route).observe(head_s)
        if refused is not None:
            self._refused.labels(refused).inc()

    @contextmanager
    def look(self) -> Iterator[None]:
        """Time one look of the supervisor."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._look_seconds.observe(time.perf_counter() - began)
            self._last_look.set_to_current_time()

    def failed(self, work: str) -> None:
        """The supervisor failed at a piece of work; what is none of `WORKS` is the following of an attempt."""
        self._work_failures.labels(work if work in WORKS else "attempt").inc()

    @contextmanager
    def ray_call(self, call: str) -> Iterator[None]:
        """Time a call of Ray, and count it where Ray does not answer as it should."""
        began = time.perf_counter()
        try:
            yield
        except UnavailableError as error:
            self._ray_failures.labels(call, error.code).inc()
            raise
        finally:
            self._ray_seconds.labels(call).observe(time.perf_counter() - began)

    @contextmanager
    def transaction(self, kind: str) -> Iterator[None]:
        """Time a transaction of the store with the wait for its turn, and count it where the store is away."""
        began = time.perf_counter()
        try:
            yield
        except UnavailableError:
            self._store_failures.labels(kind).inc()
            raise
        finally:
            self._store_seconds.labels(kind).observe(time.perf_counter() - began)

    def _make_supervisor_meters(self, registry: CollectorRegistry) -> None:
        self.leads = Gauge(
            "d2ft_supervisor_leads", "Whether this process is the one that supervises.", registry=registry
        )
        self._look_seconds = Histogram(
            "d2ft_supervisor_look_duration_seconds",
            "Time of the supervisor's looks.",
            buckets=SLOW_S,
            registry=registry,
        )
        self._last_look = Gauge(
            "d2ft_supervisor_last_look_timestamp_seconds",
            "When this process last finished a look, in Unix seconds; 0 where it never did.",
            registry=registry,
        )
        self._work_failures = Counter(
            "d2ft_supervisor_failures", "Work of the supervisor that failed.", ("work",), registry=registry
        )
        for work in WORKS:
            self._work_failures.labels(work)

    def _make_neighbour_meters(self, registry: CollectorRegistry) -> None:
        self._ray_seconds = Histogram(
            "d2ft_ray_call_duration_seconds",
            "Time of calls of Ray's API.",
            ("call",),
            buckets=SLOW_S,
            registry=registry,
        )
        self._ray_failures = Counter(
            "d2ft_ray_call_failures",
            "Calls that Ray did not answer as it should.",
            ("call", "reason"),
            registry=registry,
        )
        self._store_seconds = Histogram(
            "d2ft_store_transaction_duration_seconds",
            "Time of transactions, with the wait for their turn.",
            ("kind",),
            buckets=FAST_S,
            registry=registry,
        )
        self._store_failures = Counter(
            "d2ft_store_transaction_failures",
            "Transactions for which the store was away.",
            ("kind",),
            registry=registry,
        )
        for call in RAY_CALLS:
            self._ray_seconds.labels(call)
        for kind in TRANSACTIONS:
            self._store_seconds.labels(kind)
            self._store_failures.labels(kind)


def version() -> str:
    """This program's version; "unknown" in a checkout that is not installed."""
    try:
        return importlib.metadata.version("d2ft")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
