"""The page of a job while it goes on: what comes is seen without a reload, drawings can be read by keyboard."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.client import Client, JobHandle
from service.home import read_secret
from tests.ui.browse import Visit


@pytest.fixture
def client(server: str, home: Path) -> Iterator[Client]:
    with Client(server, read_secret(home / "key") or "") as client:
        yield client


@pytest.fixture
def going(client: Client) -> JobHandle:
    """A job that goes on for as long as a test looks at it."""
    job = client.submit({"name": "going", "steps": 10_000, "metadata": {"pause_s": "0.2"}})
    yield job
    client.cancel(job.id)


def step_of(visit: Visit) -> int:
    found = re.search(r"step (\d+) of", visit.page.locator("#standing").inner_text())
    return int(found.group(1)) if found else 0


def test_steps_and_a_measured_step_come_by_themselves(visit: Visit, going: JobHandle) -> None:
    visit.go(f"/ui/jobs/{going.id}/timeline")
    page = visit.page
    page.get_by_text(re.compile(r"step \d+ of")).wait_for()
    page.locator("#timeline[data-measured-step='3']").wait_for(timeout=10_000)
    before = step_of(visit)
    page.wait_for_timeout(2500)
    assert step_of(visit) > before
    visit.check()


def test_a_pause_and_a_cancel_are_asked_for_by_buttons(visit: Visit, going: JobHandle) -> None:
    visit.go(f"/ui/jobs/{going.id}")
    page = visit.page
    page.locator("#standing .state", has_text="running").wait_for()
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Let it go on").click()
    assert going.refresh().status == "running"
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Cancel the job").click()
    page.locator("#standing .state", has_text="cancelled").wait_for(timeout=15_000)
    page.get_by_role("button", name="Retry").wait_for()
    visit.check()


def test_heads_are_read_by_arrow_keys_and_as_a_table(visit: Visit, client: Client) -> None:
    job = client.submit({"steps": 4})
    job.wait(timeout_s=20)
    visit.go(f"/ui/jobs/{job.id}/heads")
    page = visit.page
    page.locator("#heads canvas[data-drawn-ms]").focus()
    page.keyboard.press("ArrowRight")
    tip = page.locator(".tip")
    tip.wait_for()
    assert "FULL" in tip.inner_text() and "worker 0" in tip.inner_text().lower()
    page.get_by_role("button", name="Table").click()
    cells = page.locator("#heads table tbody td").all_inner_texts()
    assert any("It is fast" in cell for cell in cells)
    visit.check()


def test_a_chart_has_its_numbers_and_gives_them_away(visit: Visit, client: Client, tmp_path: Path) -> None:
    job = client.submit({"steps": 12})
    job.wait(timeout_s=20)
    visit.go(f"/ui/jobs/{job.id}/charts")
    page = visit.page
    loss = page.locator("figure.chart", has_text="Loss").first
    loss.get_by_role("button", name="Table").click()
    assert loss.locator(".data tbody tr").count() == 12
    with page.expect_download() as found:
        loss.get_by_role("button", name="CSV").click()
    found.value.save_as(tmp_path / "loss.csv")
    lines = (tmp_path / "loss.csv").read_text().splitlines()
    assert lines[0].split(",")[0].startswith("step") and len(lines) == 13
    with page.expect_download() as found:
        loss.get_by_role("button", name="PNG").click()
    found.value.save_as(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    visit.check()
