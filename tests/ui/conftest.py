"""A service with drivers that run in threads, and a tab that is signed in to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from service.home import read_secret
from tests.service.conftest import home, models, server, settings
from tests.ui.browse import CHROMIUM, Visit, chromium

__all__ = ["home", "models", "server", "settings"]
SHOTS = Path(".bench") / "ui"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="no chromium here: install Debian's package, or set D2FT_CHROMIUM")
    for item in items:
        if "/ui/" in item.nodeid and CHROMIUM is None:
            item.add_marker(skip)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """While it is open its loop is the thread's, where no test beyond this folder could run one of its own."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def tab(browser: Browser) -> Callable[..., Visit]:
    """Open a tab of its own, `dark` or on a `phone`; asked for after the service, it is closed before it."""
    contexts = []

    def opened(url: str, *, dark: bool = False, phone: bool = False) -> Visit:
        size = {"width": 390, "height": 800} if phone else {"width": 1300, "height": 850}
        context = browser.new_context(viewport=size, color_scheme="dark" if dark else "light", reduced_motion="reduce")
        contexts.append(context)
        return Visit(context.new_page(), url)

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture
def visit(server: str, tab: Callable[..., Visit], home: Path) -> Visit:
    """Signed in with the first key."""
    made = tab(server)
    made.sign_in(read_secret(home / "key") or "")
    return made


def shoot(visit: Visit, name: str) -> None:
    """Keep a picture where `make test-ui` asks for them."""
    if os.environ.get("D2FT_SHOTS"):
        SHOTS.mkdir(parents=True, exist_ok=True)
        visit.page.screenshot(path=SHOTS / f"{name}.png")
