"""The pages in Debian's chromium: how soon they show something, how soon something new, and what they weigh.

    python -m tests.bench.ui

The service runs in this process, over SQLite with 10,000 jobs; its drivers run in threads, so that Ray takes no part.
Paint is the browser's own first contentful paint. A page's weight is all that it fetched, each answer compressed by
gzip. Faults are counted on every page: what axe-core calls serious or critical, light and dark; requests to other
hosts; violations of the policy; errors in the console.
"""

from __future__ import annotations

import functools
import gzip
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Request
from sqlalchemy import create_engine, insert
from sqlalchemy.orm import Session
from ulid import ULID

from service.client import Client
from service.home import ensure_key, make_home
from service.lifecycle import JobState
from service.settings import Settings
from service.store import Store
from service.store.access import FIRST_USER
from service.store.views import fold_metrics
from service.tables import JobRow
from tests.bench.report import publish, target
from tests.service import fake_driver
from tests.service.conftest import FakeRay, free_port, serving, sizes, write_catalogue
from tests.ui.browse import Visit, chromium
from workers.contract import JobSpec

JOBS, LOADS, WATCHED_S = 10_000, 7, 10
TABS = ("overview", "charts", "heads", "timeline", "placement", "logs", "events", "files", "config")
MOST_PAINT_MS, MOST_SEEN_S, MOST_MAP_MS, MOST_KB = 1000.0, 2.0, 200.0, 150.0
WATCH = """
    window.seen = {};
    const look = () => {
        const found = /(\\d+) of \\d+ steps/.exec(document.getElementById("overview")?.innerText ?? "");
        if (found) window.seen[found[1]] ??= Date.now();
    };
    new MutationObserver(look).observe(document.body, { subtree: true, childList: true, characterData: true });
    look();
"""
FAULTS = ("axe serious", "other hosts", "policy", "console")
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="d2ft-ui-") as home, chromium() as browser:
        settings = Settings(home=Path(home), port=free_port(), poll_s=0.2, use_gpu=False)
        emitted = prepare(settings)
        ray, key = FakeRay(drives=True), ensure_key(settings.home)
        with serving(settings, ray) as url, Client(url, key) as client:
            fake_driver.plan = lambda: large_plan(client)  # type: ignore[assignment]
            visit = Visit(browser.new_page(), url)
            visit.sign_in(key)
            job = client.submit({"name": "watched", "steps": 10_000, "metadata": {"pause_s": "0.25"}}).id
            while not client.get(job).progress.step:
                time.sleep(0.1)
            paths = {"jobs": "/", "jobs by model": "/?sort=model&order=asc", "jobs searched": "/?search=job-9"}
            paths |= {tab: f"/ui/jobs/{job}/{tab}" for tab in TABS}
            paths |= {name: f"/ui/{name}" for name in ("new", "sweeps", "devices", "what-if")}
            rows = [{"page": name, **loaded(visit, path)} for name, path in paths.items()]
            seen = latencies(visit, f"/ui/jobs/{job}", emitted)
            maps = [heat_map(visit, f"/ui/jobs/{job}/heads") for _ in range(LOADS)]
            visit.check()
            client.cancel(job)
            visit.page.goto("about:blank")  # lets go of its stream, for which the service would wait
        ray.join()
    checks = [
        target("first paint of 10,000 jobs, median ms", rows[0]["paint ms"], "<=", MOST_PAINT_MS),
        target("until a metric is seen, slowest s", max(seen), "<=", MOST_SEEN_S),
        target("heat map of 24 x 16 heads x 16 micro-batches, median ms", statistics.median(maps), "<=", MOST_MAP_MS),
        target("the heaviest page, kB", max(row["kB"] for row in rows), "<=", MOST_KB),
        *(target(f"{name}, all pages", sum(row[name] for row in rows), "==", 0) for name in FAULTS),
    ]
    note = f"a metric is seen after a median of {statistics.median(seen):.2f} s ({len(seen)} steps)"
    publish("ui", rows, checks, note)


def prepare(settings: Settings) -> dict[int, float]:
    """A home with many jobs; filled later with when each step was told by the job that is watched."""
    make_home(settings.home)
    known = {
        "d2ft_digits": sizes(img_size=28, patch_size=4, in_chans=1, embed_dim=96, depth=6, num_heads=6),
        "vit_large_patch16_224": sizes(embed_dim=1024, num_heads=16, depth=24),
    }
    write_catalogue(settings.home, known)
    draw = random.Random(0)
    store = Store(settings.store_url)
    made, _ = store.jobs.create(JobSpec(steps=100), owner=FIRST_USER)
    with Session(create_engine(settings.store_url)) as session:
        first = session.get_one(JobRow, made.id)
        columns = {column.key: getattr(first, column.key) for column in JobRow.__table__.columns}
        ended = [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED]
        rows = [
            {
                **columns,
                "id": f"ftjob_{ULID()}",
                "state": draw.choice(ended),
                "search": f"job-{number}",
                "live": fold_metrics(None, {**fake_driver.metrics(100, 100), "loss": draw.random()}),
                "created_at": time.time() - draw.random() * 1e6,
            }
            for number in range(JOBS)
        ]
        session.execute(insert(JobRow), rows)
        session.delete(first)
        session.commit()
    store.close()
    emitted: dict[int, float] = {}
    metrics = fake_driver.metrics

    def timed(step: int, steps: int) -> dict[str, Any]:
        emitted[step] = time.time()
        return metrics(step, steps)

    fake_driver.metrics = timed
    return emitted


@functools.cache
def large_plan(client: Client) -> dict[str, Any]:
    """What a job of a ViT-L with 16 micro-batches on four devices would be told."""
    found = client.plans(
        {
            "model": "vit_large_patch16_224",
            "devices": ["4x fast:64GB@node1"],
            "micro_batches": 16,
            "method": {"ratios": {"full": 8, "forward": 4, "skip": 4}, "strategy": "hull"},
            "gantt": True,
        }
    ).model_dump()
    return {**found["plan"], **{name: found[name] for name in ("heads", "devices", "gantt")}}


def loaded(visit: Visit, path: str) -> dict[str, float]:
    """Median first paint of a page in ms, in kB the weight of all that it gets, and its faults."""
    paints: list[float] = []
    fetched: set[str] = set()

    def take(request: Request) -> None:
        if request.method == "GET" and request.resource_type != "eventsource" and "follow=true" not in request.url:
            fetched.add(request.url)

    visit.page.on("request", take)
    for _ in range(LOADS):
        visit.go(path)
        visit.page.wait_for_timeout(500)
        paints.append(float(visit.page.evaluate(PAINT)))
    visit.page.remove_listener("request", take)
    again = visit.page.context.request
    weight = sum(len(gzip.compress(again.get(url).body())) for url in fetched)
    return {"paint ms": statistics.median(paints), "kB": weight / 1000, **faults(visit)}


def faults(visit: Visit) -> dict[str, int]:
    """How many of each kind the page has, light and dark."""
    visit.page.emulate_media(color_scheme="dark")
    in_the_dark = len(visit.axe())
    visit.page.emulate_media(color_scheme="light")
    found = {kind: len(of_kind) for kind, of_kind in visit.faults().items()}
    found["axe serious"] += in_the_dark
    return found


def latencies(visit: Visit, path: str, emitted: dict[int, float]) -> list[float]:
    """Seconds from when the driver told a step to when the page showed it, or a later one."""
    visit.go(path)
    visit.page.evaluate(WATCH)
    visit.page.wait_for_timeout(1000 * WATCHED_S)
    shown = {int(step): at / 1000 for step, at in visit.page.evaluate("window.seen").items()}
    steps = [step for step in emitted if min(shown) < step <= max(shown)]
    return [min(at for of, at in shown.items() if of >= step) - emitted[step] for step in steps]


def heat_map(visit: Visit, path: str) -> float:
    """Milliseconds that the page says it took to draw all heads."""
    visit.go(path)
    canvas = visit.page.locator("canvas[data-drawn-ms]").first
    canvas.wait_for()
    return float(canvas.get_attribute("data-drawn-ms") or "inf")


if __name__ == "__main__":
    main()
