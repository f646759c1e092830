"""A browser's side of the service, without a browser: who is signed in by a cookie alone."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from service.home import read_secret
from service.settings import Settings
from tests.service.conftest import URL, api, home, models, ray, settings, spec, store, store_url, submit

__all__ = ["api", "home", "models", "ray", "settings", "spec", "store", "store_url", "submit"]
HTML = {"Accept": "text/html,application/xhtml+xml", "Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}
OURS = {"Origin": URL, "Sec-Fetch-Site": "same-origin"}


def sign_in(client: TestClient, key: str) -> None:
    """Have the client hold a cookie in place of its key."""
    client.headers.pop("Authorization", None)
    answer = client.post("/ui/sign-in", data={"key": key}, headers=OURS, follow_redirects=False)
    assert answer.status_code == 303, answer.text


@pytest.fixture
def visitor(api: TestClient, settings: Settings) -> TestClient:
    """Signed in with the first key."""
    sign_in(api, read_secret(settings.home / "key") or "")
    api.headers.update(HTML)
    return api
