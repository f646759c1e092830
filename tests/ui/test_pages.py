"""Every page, light, dark and on a phone: nothing serious for axe, nothing from elsewhere, no error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from service.client import Client
from service.home import read_secret
from service.web.job import TABS
from tests.ui.browse import Visit
from tests.ui.conftest import shoot

LOOKS = {"light": {}, "dark": {"dark": True}, "phone": {"phone": True}}
NO_WAY_SIDEWAYS = "document.documentElement.scrollWidth <= window.innerWidth"
PAGES = {
    "jobs": "/",
    **{tab: f"/ui/jobs/{{job}}/{tab}" for tab in TABS},
    "failed": "/ui/jobs/{failed}",
    "compare": "/ui/compare?job={job}&job={failed}",
    "new": "/ui/new?from={job}",
    "sweeps": "/ui/sweeps",
    "sweep": "/ui/sweeps/{sweep}",
    "devices": "/ui/devices",
    "what-if": "/ui/what-if?d=2x+fast:24GB@node1&d=slow&link=1Gbps&ratios=3,0,2",
}


@pytest.fixture
def places(server: str, home: Path) -> dict[str, str]:
    """A job that has succeeded, one that has failed, and a sweep."""
    with Client(server, read_secret(home / "key") or "") as client:
        job = client.submit({"name": "a job", "steps": 20})
        job.wait(timeout_s=30)
        failed = client.submit({"steps": 4, "metadata": {"outcome": "failed"}})
        failed.wait(timeout_s=30)
        sweep = client.submit_sweep({"job": {"steps": 2}, "space": {"seed": {"values": [1, 2]}}})
        client.wait_sweep(sweep.id, timeout_s=30)
        return {"job": job.id, "failed": failed.id, "sweep": sweep.id}


def test_every_page_is_as_it_should_be(
    server: str, tab: Callable[..., Visit], home: Path, places: dict[str, str]
) -> None:
    visits = {look: tab(server, **words) for look, words in LOOKS.items()}
    for visit in visits.values():
        visit.sign_in(read_secret(home / "key") or "")
    wrong = {}
    for name, path in PAGES.items():
        for visit in visits.values():
            visit.go(path.format(**places))
        visit.page.wait_for_timeout(400)  # what is drawn is drawn
        for look, visit in visits.items():
            shoot(visit, f"{name}-{look}")
            faults = [fault for kind in visit.faults().values() for fault in kind]
            if not visit.page.evaluate(NO_WAY_SIDEWAYS):
                faults.append("it can be scrolled sideways")
            if faults:
                wrong[name, look] = faults
    assert wrong == {}
