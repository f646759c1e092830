"""The list of jobs in a browser: live, by keyboard, with names that try to be more than text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.client import Client
from service.home import read_secret
from service.web import live
from tests.ui.browse import Visit

NASTY = ["<img src=x onerror=alert(1)>", '"><script>alert(1)</script>', "a\u202egnp.exe", "שלום", "nul\u0001bell\u0007"]


@pytest.fixture
def client(server: str, home: Path) -> Iterator[Client]:
    with Client(server, read_secret(home / "key") or "") as client:
        yield client


def test_jobs_come_and_go_without_a_reload(visit: Visit, client: Client) -> None:
    page = visit.page
    page.get_by_text("No jobs yet").wait_for()
    job = client.submit({"name": "first", "steps": 40, "metadata": {"pause_s": "0.05"}})
    page.get_by_role("link", name="first").wait_for(timeout=5000)
    page.locator(f"#row-{job.id} .state", has_text="succeeded").wait_for(timeout=15000)
    assert "40/40" in page.locator(f"#row-{job.id}").inner_text()
    visit.check()


def test_names_are_text(visit: Visit, client: Client) -> None:
    for name in NASTY:
        client.submit({"name": name, "steps": 1})
    visit.go("/")
    shown = visit.page.locator("tbody tr a").all_inner_texts()
    assert set(shown) == {*NASTY[:2], "a⟨202E⟩gnp.exe", NASTY[3], "nul␁bell␇"}
    visit.check()


def test_filters_are_in_the_address_and_come_back_with_it(visit: Visit, client: Client) -> None:
    for name in ("cat", "dog"):
        outcome = {"outcome": "failed"} if name == "dog" else {}
        client.submit({"name": name, "steps": 1, "metadata": outcome}).wait(timeout_s=20)
    visit.go("/")
    page = visit.page
    page.fill("#search", "dog")
    page.wait_for_url("**/?search=dog*")
    page.get_by_role("link", name="cat").wait_for(state="detached")
    page.get_by_label("failed").check()
    page.wait_for_url("**status=failed*")
    visit.page.reload()
    assert page.input_value("#search") == "dog" and page.get_by_label("failed").is_checked()
    assert page.locator("tbody tr").count() == 1
    page.get_by_label("failed").uncheck()
    page.fill("#search", "neither")
    page.get_by_text("No job is like that").wait_for()
    page.get_by_role("link", name="Clear the filters").click()
    page.wait_for_url(visit.url + "/")
    visit.check()


def test_all_of_it_by_keyboard(visit: Visit, client: Client) -> None:
    jobs = [client.submit({"name": f"n{n}", "steps": 2, "seed": n}).id for n in range(3)]
    visit.go("/")
    page = visit.page
    press = page.keyboard.press
    press("?")
    page.get_by_role("heading", name="Keys").wait_for()
    press("Escape")
    press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    press("Escape")
    for key in ("j", "x", "j", "x"):
        press(key)
    page.get_by_text("2 selected").wait_for()
    press("c")
    page.wait_for_url("**/ui/compare?**")
    assert page.get_by_role("heading", name="Compare 2 jobs").is_visible()
    page.locator("canvas").first.wait_for()
    press("g")
    press("j")
    page.wait_for_url(visit.url + "/")
    press("j")
    press("Enter")
    page.wait_for_url(f"**/ui/jobs/{jobs[-1]}")
    visit.check()


def test_what_is_selected_stays_selected_while_the_list_lives(visit: Visit, client: Client) -> None:
    first = client.submit({"name": "one", "steps": 1}).id
    visit.go("/")
    page = visit.page
    page.locator(f"#row-{first} input").check()
    client.submit({"name": "two", "steps": 1})
    page.get_by_role("link", name="two").wait_for(timeout=5000)
    assert page.locator(f"#row-{first} input").is_checked() and page.get_by_text("1 selected").is_visible()


def test_a_silent_service_is_said_to_be_silent(visit: Visit, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    banner = visit.page.locator("#stale")
    monkeypatch.setattr(live, "BEAT_S", 60.0)
    visit.go("/")
    banner.wait_for(state="visible", timeout=9000)
    client.submit({"steps": 1})
    banner.wait_for(state="hidden", timeout=5000)


def test_the_theme_is_kept(visit: Visit) -> None:
    page = visit.page
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    before = page.evaluate(ground)
    page.get_by_label("Light or dark").click()
    after = page.evaluate(ground)
    visit.go("/ui/sign-in")
    assert before != after == page.evaluate(ground)
    assert page.locator("html").get_attribute("data-theme") == "dark"


def test_on_a_phone_the_page_does_not_scroll_sideways(
    server: str, tab: Callable[..., Visit], home: Path, client: Client
) -> None:
    client.submit({"name": "a name that is long and has no end that anybody has seen so far", "steps": 1})
    phone = tab(server, phone=True)
    phone.sign_in(read_secret(home / "key") or "")
    phone.page.locator("tbody tr").first.wait_for()
    time.sleep(0.3)
    assert phone.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    phone.check()
