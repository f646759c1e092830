"""The pages in Debian's chromium: how soon they show something, how soon something new, and what they weigh.

    python -m tests.bench.ui

The service runs in this process, over SQLite with 10,000 jobs; its drivers run in threads, so that Ray takes no part.
Paint is the browser's own first contentful paint. A page's weight is all that it fetched, each answer compressed by
gzip.
"""

from __future__ import annotations

import gzip
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Response
from sqlalchemy import insert

from service.client import Client
from service.home import make_home, read_secret
from service.lifecycle import JobState
from service.settings import Settings
from service.store import Store
from service.store.access import FIRST_USER
from service.tables import JobRow
from tests.bench.report import publish, target
from tests.service.conftest import FakeRay, free_port, serving, sizes, write_catalogue
from tests.ui.browse import Visit, chromium
from workers.contract import JobSpec

JOBS, LOADS, HEARD = 10_000, 7, 10
MOST_PAINT_MS, MOST_SEEN_S, MOST_MAP_MS, MOST_KB = 1000.0, 2.0, 200.0, 150.0
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="d2ft-ui-") as home, chromium() as browser:
        settings = Settings(home=Path(home), port=free_port(), poll_s=0.2, use_gpu=False)
        prepare(settings)
        ray = FakeRay(drives=True)
        with serving(settings, ray) as url, Client(url, read_secret(settings.home / "key") or "") as client:
            visit = Visit(browser.new_page(), url)
            visit.sign_in(read_secret(settings.home / "key") or "")
            job = client.submit({"name": "watched", "steps": 200, "metadata": {"pause_s": "0.25"}}).id
            paths = {"jobs": "/", "jobs, by model": "/?sort=model&order=asc", "jobs, searched": "/?search=digits"}
            paths |= {"job": f"/ui/jobs/{job}"}
            for name, path in paths.items():
                rows.append({"page": name, **loaded(visit, path)})
            seen = [latency for _ in range(HEARD) if (latency := _latency(visit, client, job)) is not None]
            visit.check()
        ray.join()
    checks = [
        target("first paint of 10,000 jobs, ms", rows[0]["paint ms"], "<=", MOST_PAINT_MS),
        target("a metric is seen, slowest s", max(seen), "<=", MOST_SEEN_S),
        target("the heaviest page, kB", max(row["kB"] for row in rows), "<=", MOST_KB),
    ]
    publish("ui", rows, checks, f"a metric is seen after a median of {statistics.median(seen):.2f} s")
