"""The service without Ray: a fake of its Jobs API behind the HTTP client; its drivers run in threads or not at all."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import shlex
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from starlette.testclient import TestClient
from typer.testing import CliRunner, Result

from scheduler.book import Book
from scheduler.devices import DeviceRecord
from scheduler.domain import LinkProfile
from scheduler.fleets import parse_device, records_of
from service.app import create_app, uvicorn_options
from service.catalogue import FORMAT
from service.cli import app
from service.home import read_secret
from service.settings import Settings
from service.store import Store
from tests.service import fake_driver, fake_sweep
from tests.service.postgres import empty_database, running_postgres
from workers.contract import JobSpec, RunContext
from workers.events import EventLog
from workers.sweeps.contract import SweepContext

URL = "http://127.0.0.1:7421"


class FakeRay:
    """Ray's Jobs API as a transport. With `drives`, submitted drivers run in threads; otherwise a test plays them."""

    def __init__(self, *, drives: bool = False) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.started: list[dict[str, Any]] = []  # the jobs of this cluster and of those before a restart
        self.restarts = 0
        self.submits: list[str] = []
        self.stops: list[str] = []
        self.down = False
        self.lose_reply = False
        self._drives = drives
        self._threads: list[threading.Thread] = []

    def transport(self) -> httpx2.MockTransport:
        return httpx2.MockTransport(self.answer)

    def set_status(self, submission_id: str, status: str, message: str = "") -> None:
        ended = None if status in ("PENDING", "RUNNING") else time.time()
        self.jobs[submission_id].update(status=status, message=message, end_time=ended)

    def join(self) -> None:
        for job in self.jobs.values():
            job["stopping"] = True
        for thread in self._threads:
            thread.join(10)

    def restart(self) -> None:
        """The cluster ends with all its drivers, and one that knows none of them takes its place."""
        self.join()
        for job in self.jobs.values():
            job["end_time"] = job["end_time"] or time.time()
        self.jobs = {}
        self.restarts += 1

    def answer(self, request: httpx2.Request) -> httpx2.Response:
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
            job["stopping"] = True
            if not self._drives:
                self.set_status(parts[0], "STOPPED")
            return httpx2.Response(200, json={"stopped": True})
        if parts[1:] == ["logs"]:
            return httpx2.Response(200, json={"logs": f"log of {parts[0]}\nlast words"})
        return httpx2.Response(200, json=job)

    def _submit(self, body: dict[str, Any]) -> httpx2.Response:
        key = body["submission_id"]
        self.submits.append(key)
        if key in self.jobs:
            return httpx2.Response(500, text=f"Job with submission_id {key} already exists")
        times = {"start_time": time.time(), "end_time": None, "cluster": self.restarts}
        job = self.jobs[key] = {**body, "status": "RUNNING", "message": "", "stopping": False, **times}
        self.started.append(job)
        if self._drives:
            thread = threading.Thread(target=self._drive, args=(job,), daemon=True)
            self._threads.append(thread)
            thread.start()
        if self.lose_reply:
            self.lose_reply = False
            raise httpx2.ReadError("reply lost")
        return httpx2.Response(200, json={"submission_id": key})

    def _drive(self, job: dict[str, Any]) -> None:
        *_, module, _, path = shlex.split(job["entrypoint"])
        kind, run = (SweepContext, fake_sweep.run) if module == "workers.sweep" else (RunContext, fake_driver.run)
        context = kind.model_validate_json(Path(path).read_text())
        with EventLog(context.run_dir) as events:
            run(context, events, stopped=lambda: bool(job["stopping"]))  # type: ignore[operator]
        job.update(status="STOPPED" if job["stopping"] else "SUCCEEDED", end_time=time.time())


def sizes(**given: Any) -> dict[str, Any]:
    """A line of the catalogue: a plain vision transformer with these arguments."""
    plain = {"img_size": 224, "patch_size": 16, "in_chans": 3, "depth": 12, "mlp_ratio": 4.0, "init_values": 0.0}
    on = {"qkv_bias": True, "proj_bias": True, "class_token": True, "final_norm": True}
    off = {"qk_norm": False, "no_embed_class": False, "reg_tokens": 0}
    return {**plain, **on, **off, "global_pool": "token", **given}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def settings(home: Path) -> Settings:
    return Settings(home=home, poll_s=0.02, reconcile_s=0.2, catalogue_wait_s=5, use_gpu=False)


@pytest.fixture
def ray() -> FakeRay:
    return FakeRay()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A real PostgreSQL for the whole session; yields the URL of its maintenance database."""
    with running_postgres() as url:
        yield url


@pytest.fixture
def database(postgres: str) -> Iterator[str]:
    """An empty database of its own; yields its URL."""
    with empty_database(postgres) as url:
        yield url


@pytest.fixture
def store_url(home: Path) -> str:
    """SQLite in home; a file that is to run on PostgreSQL, too, has a `store_url` of its own."""
    furnish(home)
    return f"sqlite:///{home / 'd2ft.db'}"


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    store = Store(store_url)
    yield store
    store.close()


@pytest.fixture
def models(home: Path) -> dict[str, dict[str, Any] | str]:
    """A catalogue that is already there, so that no child is started; so are the tables."""
    known: dict[str, dict[str, Any] | str] = {
        "d2ft_digits": sizes(img_size=28, patch_size=4, in_chans=1, embed_dim=96, depth=6, num_heads=6),
        "vit_tiny_patch16_224": sizes(embed_dim=192, num_heads=3),
        "vit_small_patch16_224": sizes(embed_dim=384, num_heads=6),
        "vit_large_patch16_224": sizes(embed_dim=1024, num_heads=16, depth=24),
        "resnet50": "architecture resnet is not a vision transformer",
    }
    furnish(home)
    write_catalogue(home, known)
    return known


def furnish(home: Path) -> None:
    """Make a home with a store in it that has tables, and no rows: they come faster by a copy than by migrations."""
    home.mkdir(exist_ok=True)
    if not (home / "d2ft.db").exists():
        (home / "d2ft.db").write_bytes(_tables())


@functools.cache
def _tables() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "d2ft.db"
        Store(f"sqlite:///{path}").close()
        return path.read_bytes()


def write_catalogue(home: Path, models: Mapping[str, dict[str, Any] | str]) -> None:
    """The catalogue of models as a service has it that has run before."""
    content = {"format": FORMAT, "timm": importlib.metadata.version("timm"), "models": models}
    (home / "models.json").write_text(json.dumps(content))


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def server(settings: Settings, models: object) -> Iterator[str]:
    """The service on a real socket, with drivers that run; yields its URL."""
    ray = FakeRay(drives=True)
    with serving(settings.model_copy(update={"port": free_port()}), ray) as url:
        yield url
    ray.join()


@contextmanager
def serving(settings: Settings, ray: FakeRay) -> Iterator[str]:
    """The service on its port while the block lasts; yields its URL."""
    app = create_app(settings, ray_transport=ray.transport())
    server = uvicorn.Server(uvicorn.Config(app, **uvicorn_options(settings)))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended at once"
        time.sleep(0.01)
    try:
        yield settings.url
    finally:
        server.should_exit = True
        thread.join(10)
        logging.getLogger("uvicorn").handlers.clear()


@pytest.fixture
def record() -> DeviceRecord:
    """A device that was measured just now."""
    invented = records_of([parse_device("fast")])[0]
    links = {"gpu-1": LinkProfile(20, 10**9)}
    facts = {"name": "GPU", "cores": 8}
    changes = {"id": "gpu-0", "node": "n1", "measured_at": time.time(), "samples": 40, "links": links, "facts": facts}
    return DeviceRecord(**{**vars(invented), **changes})


def write_book(path: Path, *records: DeviceRecord) -> None:
    """The scheduler's file, as its own book writes it."""
    book = Book(path)
    book._records = {record.id: record for record in records}
    book.hear([], None, None)  # type: ignore[arg-type]


@pytest.fixture
def run(server: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command as a user of the server's machine does."""
    monkeypatch.setenv("D2FT_HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("D2FT_URL", server)
    runner = CliRunner()
    return lambda *words: runner.invoke(app, list(words))
