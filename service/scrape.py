"""A scrape: the meters of this process, and what the store and the rooms hold at the moment, as Prometheus reads it.

The store is counted at most once in `FRESH_S`, however many ask, and more rarely where counting takes long: it has a
twentieth of the time. While the store is away, the rest is told without it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from service.errors import UnavailableError
from service.lifecycle import JobState
from service.meters import Meters
from service.planners import Planners
from service.store import Store
from service.store.census import Counts
from service.streams import Room

FRESH_S = 1.0
REST = 20  # times as long as the last count took
OPENMETRICS = "application/openmetrics-text"


class Scrape(Collector):
    """What `GET /metrics` answers."""

    def __init__(self, meters: Meters, store: Store, streams: Room, planners: Planners) -> None:
        self._registry = meters.registry
        self._store = store
        self._streams = streams
        self._planners = planners
        self._lock = threading.Lock()
        self._counts: Counts | None = None
        self._stale_at = 0.0
        meters.registry.register(self)

    def text(self, accept: str) -> tuple[bytes, str]:
        """(the metrics, their media type): OpenMetrics for those who accept it, else Prometheus' own text."""
        if OPENMETRICS in accept:
            return openmetrics.generate_latest(self._registry), openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "d2ft_streams_open", "Streams of events and logs that are open.", self._streams.num_open
        )
        yield GaugeMetricFamily("d2ft_planners_busy", "Dry runs that are being planned.", self._planners.num_busy)
        yield GaugeMetricFamily("d2ft_planners_waiting", "Dry runs that wait for it.", self._planners.num_waiting)
        counts = self._count()
        yield GaugeMetricFamily("d2ft_store_up", "Whether the store could be counted.", int(counts is not None))
        if counts is not None:
            yield from _of_store(counts)

    def _count(self) -> Counts | None:
        with self._lock:
            began = time.monotonic()
            if began >= self._stale_at:
                try:
                    self._counts = self._store.census.take()
                except UnavailableError:
                    self._counts = None
                ended = time.monotonic()
                self._stale_at = ended + max(FRESH_S, REST * (ended - began))
            return self._counts


def _of_store(counts: Counts) -> Iterator[Metric]:
    yield _labelled("d2ft_jobs", "Jobs by state, all that there ever were.", "state", counts.jobs)
    yield _labelled("d2ft_jobs_failed", "Jobs that have failed, by whose fault it was.", "fault", counts.failed)
    yield GaugeMetricFamily("d2ft_queue_length", "Jobs that wait for their turn.", counts.jobs[JobState.QUEUED])
    age_s = 0.0 if counts.oldest_queued_at is None else max(0.0, time.time() - counts.oldest_queued_at)
    yield GaugeMetricFamily("d2ft_queue_oldest_seconds", "How long the oldest of them has waited.", age_s)
    yield GaugeMetricFamily("d2ft_attempts_open", "Attempts that hold the cluster.", counts.attempts_open)
    yield GaugeMetricFamily(
        "d2ft_webhook_deliveries_pending", "Messages to webhooks that are still to be sent.", counts.deliveries_pending
    )


def _labelled(name: str, text: str, label: str, values: Mapping[Any, int]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
