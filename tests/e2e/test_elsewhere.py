"""Runs on a cluster of Ray that is not the service's: submitted in one word, listed, paused, resumed, cancelled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.client import Client
from service.home import read_secret
from service.settings import Settings
from tests.e2e.ray_head import ROOT, Head, ray_head, run
from tests.service.conftest import FakeRay, free_port, serving, sizes, write_catalogue
from tests.waiting import until
from workers.events import read_events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FEW = {"steps": 6, "images_per_class": 12, "window": 5}
LONG = {**FEW, "steps": 60}
D2FT = (sys.executable, "-c", "from service.cli import main; main()")


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    """Its machines find Python, and this package only where it has been uploaded."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    with ray_head(dashboard=True) as head:
        yield head


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A service with a cluster of its own, on which nothing of this runs."""
    home, ray = tmp_path / "home", FakeRay()
    home.mkdir()
    write_catalogue(home, {"d2ft_digits": sizes(img_size=28)})
    with serving(Settings(home=home, port=free_port(), use_gpu=False, poll_s=0.2), ray) as url:
        yield url
    assert not ray.submits and not ray.stops


class User:
    """Somebody with a key of the service and the token of the cluster."""

    def __init__(self, head: Head, url: str, folder: Path) -> None:
        self.head, self.url, self.folder = head, url, folder
        self.key = read_secret(folder / "home" / "key") or ""
        self.env = {name: value for name, value in head.env.items() if name != "RAY_ADDRESS"}
        self.env |= {"D2FT_URL": url, "D2FT_API_KEY": self.key, "PYTHONPATH": str(ROOT)}

    def d2ft(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*D2FT, *words], env={**self.env, **env}, cwd=self.folder, capture_output=True, text=True, timeout=400
        )

    def submit(self, spec: dict[str, object], out: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "spec.json").write_text(json.dumps(spec))
        given = ("--spec", "spec.json", "--ray-address", self.head.dashboard, "--out", str(out))
        return self.d2ft("submit", *given, *words, **env)

    def ray_status(self, submission_id: str) -> str:
        token = (self.head.folder / "token").read_text()
        address = f"{self.head.dashboard}/api/jobs/{submission_id}"
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(json.loads(answer.read())["status"])


def reached(done: Callable[[], bool], seconds: float) -> None:
    """Wait without hurry: the training is to have the processor."""
    until(lambda: time.sleep(0.3) or done(), seconds)  # type: ignore[func-returns-value]


def outcomes(out: Path) -> list[str]:
    """What the driver has said in the end; a worker may still have written a step behind it."""
    events = (event for _, event in read_events(out / "events.jsonl", 0))
    return [str(event["data"]["status"]) for event in events if event["type"] == "outcome"]


def test_a_run_elsewhere_is_listed_watched_paused_gone_on_with_and_cancelled(
    head: Head, url: str, tmp_path: Path
) -> None:
    user = User(head, url, tmp_path)
    with Client(url, user.key) as client:
        refused = user.submit(FEW, head.folder / "no", RAY_AUTH_TOKEN="f" * 64, RAY_AUTH_TOKEN_PATH="")
        assert refused.returncode == 4 and "RAY_AUTH_TOKEN_PATH" in refused.stderr, refused.stderr
        bare = user.submit(FEW, head.folder / "no", RAY_AUTH_MODE="disabled")
        assert bare.returncode == 4 and "RAY_AUTH_MODE=token" in bare.stderr, bare.stderr
        assert [(job.status, job.error and job.error.code) for job in client.list().data] == [
            ("failed", "not_submitted")
        ] * 2

        done = user.submit(FEW, head.folder / "a", "--watch")
        assert done.returncode == 0 and "step 6/6" in done.stdout and "compute fraction" in done.stdout, done.stdout
        job = client.list().data[0]
        assert (job.status, job.outside, job.progress.step) == ("succeeded", True, 6) and job.where
        assert job.where["run_dir"] == str(head.folder / "a") and client.ledger(job.id)["steps"] == 6
        lies = user.d2ft("logs", job.id)
        assert lies.returncode == 3 and str(head.folder / "a") in lies.stderr

        out = head.folder / "b"
        sent = user.submit({**LONG, "steps": 100_000}, out)
        assert sent.returncode == 0, sent.stderr
        job = client.list().data[0]
        reached(lambda: client.get(job.id).progress.step > 5, 120)
        assert client.get(job.id).status == "running" and user.ray_status(sent.stdout.strip()) == "RUNNING"
        began = time.monotonic()
        assert user.d2ft("cancel", job.id).returncode == 0
        reached(lambda: client.get(job.id).status == "cancelled", 30)
        print(f"cancelled after {time.monotonic() - began:.1f} s")
        reached(lambda: user.ray_status(sent.stdout.strip()) == "FAILED", 30)
        assert outcomes(out) == ["cancelled"]

        out = head.folder / "c"
        assert user.submit(LONG, out).returncode == 0
        job = client.list().data[0]
        reached(lambda: client.get(job.id).progress.step > 5, 120)
        assert user.d2ft("pause", job.id).returncode == 0
        reached(lambda: client.get(job.id).status == "paused", 60)
        resumed = user.d2ft("resume", job.id)
        assert resumed.returncode == 6 and f"--out {out}" in resumed.stderr
        step = client.checkpoints(job.id).data[0].step

        (tmp_path / "again.json").write_text(json.dumps(LONG))
        words = ("workers.loop", "--spec", str(tmp_path / "again.json"), "--out", str(out))
        again = run(head, *words, D2FT_URL=url, D2FT_API_KEY=user.key)
        assert again.returncode == 0 and "goes on from the checkpoints" in again.stderr, again.stderr
        newest = client.list().data[0]
        assert newest.id != job.id and newest.id in again.stderr and newest.status == "succeeded"
        resumed_at = [event.data["step"] for event in client.events(newest.id) if event.type == "checkpoint.resumed"]
        assert resumed_at == [step] and client.get(job.id).status == "paused"
        for path in (*head.folder.rglob("*.log"), *head.folder.rglob("*.out"), *head.folder.rglob("*.json")):
            assert user.key not in path.read_text(errors="replace"), path
