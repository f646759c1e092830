"""Weights from a hub: a fake one on loopback, asked by the real client in a process with an environment of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError

from scheduler.errors import UserError
from tests.listening import listening
from tests.workers.test_artifact import TINY
from workers.contract import JobSpec
from workers.model import build_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import json, sys, time
from scheduler.errors import D2ftError
from workers.hub import located
time.sleep = lambda _: None  # between tries
try:
    print(json.dumps({"path": str(located(sys.argv[1]))}))
except D2ftError as error:
    print(json.dumps(error.to_dict()))
"""
KEY = "blocks.0.attn.qkv.weight"
Ask = Callable[..., Any]


def spec(seed: int, weights: str | None = None) -> JobSpec:
    return JobSpec(model="vit_tiny_patch16_224", model_args=TINY, weights=weights, seed=seed)  # type: ignore[arg-type]


class Hub(BaseHTTPRequestHandler):
    """What the client asks of a hub for one file of one commit; `files` by path."""

    files: dict[str, bytes] = {}  # noqa: RUF012 - a class of the test's own
    asked: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self._answer(whole=False)

    def do_GET(self) -> None:
        self._answer(whole=True)

    def _answer(self, *, whole: bool) -> None:
        self.asked.append(self.path)
        content = self.files.get(self.path)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if "/ann/tiny/" in self.path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if whole:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    """(its address, what it has and was asked)."""
    model = build_model(spec(7), 5)
    content = safetensors.torch.save({key: value.contiguous() for key, value in model.state_dict().items()})
    files = {f"/ann/tiny/resolve/{COMMIT}/model.safetensors": content}
    handler: type[Hub] = type("Own", (Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with listening(server):
        yield f"http://127.0.0.1:{server.server_port}", handler


@pytest.fixture
def ask(tmp_path: Path, hub: tuple[str, type[Hub]]) -> Ask:
    """Look for weights in a process that knows this hub; what it says."""

    def build(weights: str, **env: str) -> Any:
        own = {"HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", SCRIPT, weights]
        done = subprocess.run(command, env={**os.environ, **own, **env}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return build


def test_weights_come_from_the_hub_once_and_then_from_the_cache(hub: tuple[str, type[Hub]], ask: Ask) -> None:
    weights = f"hf-hub:ann/tiny@{COMMIT}"
    path = ask(weights)["path"]
    assert torch.equal(build_model(spec(1, path), 5).state_dict()[KEY], build_model(spec(7), 5).state_dict()[KEY])
    fetched = [path for path in hub[1].asked if "/resolve/" in path]
    assert fetched and all(path.endswith(f"{COMMIT}/model.safetensors") for path in fetched)
    hub[1].asked.clear()
    assert ask(weights, HF_HUB_OFFLINE="1")["path"] == path
    assert hub[1].asked == []


def test_a_model_is_built_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("workers.model.located", lambda weights: asked.append(weights) or tmp_path / "none")
    address = f"hf-hub:ann/tiny@{COMMIT}"
    with pytest.raises(UserError, match="no weights file"):
        build_model(spec(1, address), 5)
    assert asked == [address]


def test_without_leave_to_download_what_is_not_in_the_cache_is_refused(hub: tuple[str, type[Hub]], ask: Ask) -> None:
    told = ask(f"hf-hub:ann/tiny@{COMMIT}", HF_HUB_OFFLINE="1")
    assert (told["code"], told["fault"], told["param"]) == ("hub_offline", "user", "weights")
    assert "D2FT_HUB_DOWNLOADS" in told["message"] and hub[1].asked == []


def test_a_repository_that_is_not_there_and_one_without_safetensors_are_the_users_fault(
    hub: tuple[str, type[Hub]], ask: Ask
) -> None:
    hub[1].files[f"/ann/tiny/resolve/{'f' * 40}/pytorch_model.bin"] = b"a pickle"
    for weights in (f"hf-hub:ann/none@{COMMIT}", f"hf-hub:ann/tiny@{'f' * 40}"):
        told = ask(weights)
        assert (told["code"], told["fault"], told["param"]) == ("hub_not_found", "user", "weights"), told
    assert not [path for path in hub[1].asked if path.endswith(".bin")]


def test_a_hub_that_is_away_is_nobodys_fault(ask: Ask) -> None:
    told = ask(f"hf-hub:ann/tiny@{COMMIT}", HF_ENDPOINT="http://127.0.0.1:9")
    assert (told["code"], told["fault"]) == ("hub_unreachable", "system")


@pytest.mark.parametrize(
    "address",
    ["ann/tiny", "ann/tiny@main", "ann/tiny@v1.0", f"tiny@{COMMIT}", f"../x@{COMMIT}", f"ann/../x@{COMMIT}",
     f"ann/tiny@{COMMIT}x", f"ann/tiny@{COMMIT.upper()}", f"http://x/y@{COMMIT}", f"ann/tiny/x@{COMMIT}", ""],
)  # fmt: skip
def test_only_a_commit_of_a_repository_is_an_address(address: str) -> None:
    with pytest.raises(ValidationError, match="ORG/NAME@REVISION"):
        JobSpec(weights=f"hf-hub:{address}")
