"""From signing in to a file on one's own disk, by mouse and by keyboard alone, with a real Ray and real jobs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page
from safetensors import safe_open

from tests.served import Served, served
from tests.ui.browse import Visit
from tests.ui.conftest import shoot

ENDED_MS = 120_000
STEPS = "24"


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served() as service:
        yield service


def press_until(page: Page, key: str, wanted: str) -> None:
    """Press a key until the focus is on what this selector means."""
    for _ in range(120):
        if page.evaluate("wanted => document.activeElement.matches(wanted)", wanted):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{key} does not lead to {wanted}")


def by_mouse(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("link", name="New job").first.click()
    page.get_by_label("or steps").fill(STEPS)
    page.get_by_label("Name", exact=True).last.fill("by mouse")
    page.get_by_role("button", name="Start the job").click()


def by_keyboard(page: Page, key: str) -> None:
    keyboard = page.keyboard
    keyboard.type(key)
    keyboard.press("Enter")
    page.wait_for_load_state()
    page.get_by_role("heading", name="Jobs", exact=True).wait_for()
    page.wait_for_load_state("load")  # a key that comes before the page's script is heard by nobody
    keyboard.press("g")
    keyboard.press("n")
    page.wait_for_url("**/ui/new")
    press_until(page, "Tab", "[data-path='steps']")
    keyboard.type(STEPS)
    press_until(page, "Tab", "#name")
    keyboard.type("by keyboard")
    press_until(page, "Tab", "#submit")
    keyboard.press("Enter")


def downloaded_by_mouse(page: Page, to: Path) -> Path:
    page.get_by_role("link", name="Files").click()
    with page.expect_download() as found:
        page.get_by_role("link", name="model.safetensors").click()
    found.value.save_as(to / "model.safetensors")
    return to / "model.safetensors"


def downloaded_by_keyboard(page: Page, to: Path) -> Path:
    page.keyboard.press("8")
    page.wait_for_url("**/files")
    press_until(page, "Tab", "a[href$='model.safetensors']")
    with page.expect_download() as found:
        page.keyboard.press("Enter")
    found.value.save_as(to / "model.safetensors")
    return to / "model.safetensors"


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("begin", "fetch"), [(by_mouse, downloaded_by_mouse), (by_keyboard, downloaded_by_keyboard)], ids=["mouse", "keys"]
)
def test_the_whole_way(
    service: Served,
    tab: Callable[..., Visit],
    tmp_path: Path,
    begin: Callable[[Page, str], None],
    fetch: Callable[[Page, Path], Path],
) -> None:
    visit = tab(service.url)
    page = visit.page
    visit.go("/")
    begin(page, service.key)
    page.wait_for_url(re.compile(r"/ui/jobs/ftjob_\w+$"), timeout=30_000)
    page.locator("#standing .state", has_text="running").wait_for(timeout=ENDED_MS)
    page.get_by_text(re.compile(rf"step \d+ of {STEPS}")).wait_for(timeout=ENDED_MS)
    page.locator("#standing .state", has_text="succeeded").wait_for(timeout=ENDED_MS)
    job_id = page.url.rpartition("/")[2]
    for part in ("heads", "timeline", "placement", "charts"):
        visit.go(f"/ui/jobs/{job_id}/{part}")
        page.locator("canvas, svg, table").first.wait_for(timeout=5000)
        shoot(visit, f"real-{part}")
    visit.go(f"/ui/jobs/{job_id}")
    shoot(visit, "real-overview")
    with safe_open(fetch(page, tmp_path), framework="numpy") as weights:
        assert "patch_embed.proj.weight" in weights.keys()  # noqa: SIM118 - it is no dict
    visit.check()
