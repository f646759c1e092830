"""Scripts and styles: what npm gave, unchanged; nothing of other hosts; compressed, and asked for by their etag."""

from __future__ import annotations

import gzip
import hashlib
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service.web.render import HERE, STATIC

VENDORED = STATIC / "vendor"
OURS = [*STATIC.glob("*.*"), *(HERE / "templates").glob("*.html")]


def test_what_came_from_npm_is_as_it_came() -> None:
    told = dict(reversed(line.split()) for line in (VENDORED / "SHA256SUMS").read_text().splitlines())
    assert set(told) == {path.name for path in VENDORED.iterdir()} - {"SHA256SUMS"}
    for name, digest in told.items():
        assert hashlib.sha256((VENDORED / name).read_bytes()).hexdigest() == digest, name
    script = (Path(__file__).parents[2] / "deploy" / "vendor.sh").read_text()
    assert all(name in script for name in told)


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_no_file_of_ours_names_another_host_or_needs_a_weaker_policy(path: Path) -> None:
    text = path.read_text()
    named = re.findall(r"(?:https?:)?//[\w-]+\.[\w.-]+", re.sub(r'xmlns="[^"]*"|http://www\.w3\.org/\S*', "", text))
    assert [host for host in named if "127.0.0.1" not in host] == []
    assert "eval(" not in text and "innerHTML" not in text and "insertAdjacentHTML" not in text
    if path.suffix == ".html":
        assert not re.search(r"<script(?![^>]*(src=|application/json))|<style|\son\w+=|\sstyle=|javascript:", text)


def test_they_are_compressed_and_known_by_their_etag(api: TestClient) -> None:
    del api.headers["Authorization"]
    plain = api.get("/ui/static/page.js", headers={"Accept-Encoding": "identity"})
    packed = api.get("/ui/static/page.js", headers={"Accept-Encoding": "gzip"})
    assert plain.text == packed.text == (STATIC / "page.js").read_text()
    assert "content-encoding" not in plain.headers and packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) == len(gzip.compress(plain.content, mtime=0)) < len(plain.content)
    assert packed.headers["content-type"].startswith(("text/javascript", "application/javascript"))
    etag = packed.headers["etag"]
    assert api.get("/ui/static/page.js", headers={"If-None-Match": etag}).status_code == 304


@pytest.mark.parametrize("path", ["none.js", "../render.py", "..%2frender.py", "%2e%2e/render.py", "vendor", "", "."])
def test_nothing_else_is_given_out(api: TestClient, path: str) -> None:
    del api.headers["Authorization"]
    answer = api.get(f"/ui/static/{path}")
    assert answer.status_code in (401, 404) and "Jinja" not in answer.text
