"""The service without Ray: a fake of its Jobs API behind the HTTP client; its drivers run in threads or not at all."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.home import read_secret
from service.settings import Settings
from service.store import Store
from tests.service import fake_driver
from workers.contract import JobSpec, RunContext
from workers.events import EventLog

URL = "http://127.0.0.1:7421"


class FakeRay:
    """Ray's Jobs API as a transport. With `drives`, submitted drivers run in threads; otherwise a test plays them."""

    def __init__(self, *, drives: bool = False) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.submits: list[str] = []
        self.stops: list[str] = []
        self.down = False
        self.lose_reply = False
        self._drives = drives
        self._threads: list[threading.Thread] = []

    def transport(self) -> httpx2.MockTransport:
        return httpx2.MockTransport(self._answer)

    def set_status(self, submission_id: str, status: str, message: str = "") -> None:
        self.jobs[submission_id].update(status=status, message=message)

    def join(self) -> None:
        for job in self.jobs.values():
            job["status"] = "STOPPED"
        for thread in self._threads:
            thread.join(10)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        if self.down:
            raise httpx2.ConnectError("refused", request=request)
        parts = [part for part in request.url.path.split("/") if part][2:]
        if request.url.path == "/api/cluster_status":
            return httpx2.Response(
                200, json={"data": {"clusterStatus": {"loadMetricsReport": {"usage": {"CPU": [0, 2]}}}}}
            )
        if not parts:
            if request.method == "GET":
                return httpx2.Response(200, json=list(self.jobs.values()))
            return self._submit(json.loads(request.content))
        job = self.jobs.get(parts[0])
        if job is None:
            return httpx2.Response(404, text="unknown")
        if parts[1:] == ["stop"]:
            self.stops.append(parts[0])
            job["status"] = "STOPPED"
            return httpx2.Response(200, json={"stopped": True})
        if parts[1:] == ["logs"]:
            return httpx2.Response(200, json={"logs": f"log of {parts[0]}\nlast words"})
        return httpx2.Response(200, json=job)

    def _submit(self, body: dict[str, Any]) -> httpx2.Response:
        key = body["submission_id"]
        self.submits.append(key)
        if key in self.jobs:
            return httpx2.Response(500, text=f"Job with submission_id {key} already exists")
        self.jobs[key] = {**body, "status": "RUNNING", "message": ""}
        if self._drives:
            thread = threading.Thread(target=self._drive, args=(key,), daemon=True)
            self._threads.append(thread)
            thread.start()
        if self.lose_reply:
            self.lose_reply = False
            raise httpx2.ReadError("reply lost")
        return httpx2.Response(200, json={"submission_id": key})

    def _drive(self, key: str) -> None:
        path = shlex.split(self.jobs[key]["entrypoint"])[-1]
        context = RunContext.model_validate_json(Path(path).read_text())
        with EventLog(context.run_dir) as events:
            fake_driver.run(context, events, stopped=lambda: self.jobs[key]["status"] == "STOPPED")
        if self.jobs[key]["status"] == "RUNNING":
            self.jobs[key]["status"] = "SUCCEEDED"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def settings(home: Path) -> Settings:
    return Settings(home=home, poll_s=0.02, reconcile_s=0.2, catalogue_wait_s=5, use_gpu=False)


@pytest.fixture
def ray() -> FakeRay:
    return FakeRay()


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    home.mkdir()
    store = Store(f"sqlite:///{home / 'd2ft.db'}")
    yield store
    store.close()


@pytest.fixture
def models(home: Path) -> dict[str, str | None]:
    """A catalogue that is already there, so that no child is started."""
    import importlib.metadata

    known: dict[str, str | None] = {
        "d2ft_digits": None,
        "vit_small_patch16_224": None,
        "vit_tiny_patch16_224": None,
        "resnet50": "architecture resnet is not a vision transformer",
    }
    home.mkdir(exist_ok=True)
    (home / "models.json").write_text(json.dumps({"timm": importlib.metadata.version("timm"), "models": known}))
    return known


@pytest.fixture
def api(settings: Settings, models: object, ray: FakeRay) -> Iterator[TestClient]:
    """The whole application with a valid key, and no supervisor."""
    app = create_app(settings, ray_transport=ray.transport(), supervise=False)
    with TestClient(app, base_url=URL, raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {read_secret(settings.home / 'key')}"
        yield client


@pytest.fixture
def submit(api: TestClient) -> Callable[..., str]:
    """Submit a job; returns its id."""

    def send(**body: Any) -> str:
        answer = api.post("/v1/jobs", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    return send


@pytest.fixture
def spec() -> JobSpec:
    return JobSpec(steps=4)
