"""The log: one JSON object a line, which nobody forges, and in which no secret stands."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service import host, logs
from service.app import create_app, known_secrets
from service.home import KEY_FILE, SECRET_FILE, ensure_ray_token, make_home, read_secret
from service.settings import Settings
from service.store import Store
from tests.service.conftest import URL, FakeRay, free_port
from tests.service.logged import Log
from tests.waiting import until
from workers.contract import RunContext

ROOT = Path(__file__).parents[2]
HOSTILE = 'x"}\n{"level": "CRITICAL"}\r\x1b[31mred\x9b2J\u2028\u202egnp.exe\ud800'


@pytest.fixture
def ray_token(settings: Settings) -> str:
    make_home(settings.home)
    return ensure_ray_token(settings.token_file)


@pytest.fixture
def log(settings: Settings, ray_token: str) -> Iterator[Log]:
    with Log(known_secrets(settings)) as log:
        yield log


def test_a_line_says_who_asked_for_what_and_how_it_went(log: Log, api: TestClient) -> None:
    api.get("/v1/jobs/ftjob_x?token=secret", headers={"X-Request-ID": "mine"})
    (line,) = log.of(logger="service.watch", request_id="mine")
    assert line["message"] == "GET /v1/jobs/ftjob_x 404" and line["level"] == "INFO"
    assert line["time"].endswith("Z") and len(line["time"]) == 24
    assert (line["method"], line["path"], line["status"]) == ("GET", "/v1/jobs/ftjob_x", 404)
    assert line["route"] == "/v1/jobs/{job_id}" and line["job_id"] == "ftjob_x" and line["user"] == "user_first"
    assert 0 < line["duration_ms"] < 60_000 and "secret" not in log.text


def test_every_request_has_one_line_refused_ones_and_health_too(log: Log, api: TestClient) -> None:
    api.get("/healthz")
    api.get("/v1/jobs", headers={"Authorization": "Bearer no"})
    api.get("/nothing")
    told = [(line["route"], line["status"]) for line in log.of(logger="service.watch")]
    assert told == [("/healthz", 200), ("refused", 401), ("unmatched", 404)]


def test_what_is_logged_within_a_request_names_it(log: Log, api: TestClient, ray: FakeRay) -> None:
    ray.down = True
    api.get("/readyz", headers={"X-Request-ID": "mine"})
    api.app.state.world.store.ping = lambda: 1 / 0  # type: ignore[attr-defined]
    api.get("/readyz", headers={"X-Request-ID": "bug-1"})
    (line,) = log.of(logger="service.problems")
    assert line["request_id"] == "bug-1" and "ZeroDivisionError" in line["exception"]


def test_what_is_logged_about_an_attempt_names_its_job(log: Log) -> None:
    async def follow(job_id: str) -> None:
        with logs.about(job_id=job_id, attempt=2):
            await asyncio.sleep(0)
            await asyncio.to_thread(logging.getLogger("d2ft.test").info, "looked")

    async def both() -> None:
        await asyncio.gather(follow("ftjob_a"), follow("ftjob_b"))

    asyncio.run(both())
    assert {line["job_id"] for line in log.of(message="looked", attempt=2)} == {"ftjob_a", "ftjob_b"}
    logging.getLogger("d2ft.test").info("after")
    assert "job_id" not in log.of(message="after")[0]


def test_text_of_users_forges_no_line_and_moves_no_cursor(log: Log) -> None:
    logger = logging.getLogger("d2ft.test")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logger.exception("failed on %s", HOSTILE, extra={"job_name": HOSTILE})
    assert log.text.count("\n") == 1
    (line,) = log.lines
    assert line["level"] == "ERROR"
    for text in (line["message"], line["job_name"], line["exception"]):
        assert not set(text) & set("\r\x1b\x9b\u2028\u202e\ud800") and "red" in text
    log.text.encode()


def test_a_record_that_cannot_be_written_is_said_without_its_arguments(log: Log, ray_token: str) -> None:
    log.handler.handle(logging.LogRecord("d2ft.test", logging.INFO, __file__, 1, "%d of them", (ray_token,), None))
    (line,) = log.lines
    assert line["level"] == "ERROR" and "d2ft.test" in line["message"] and ray_token not in log.text


@pytest.mark.parametrize(
    "text",
    [
        "Bearer {}",
        "{{'authorization': 'Bearer {}'}}",
        "(b'Authorization', b'Bearer {}')",
        "Authorization: Basic {}",
        "postgresql+psycopg://d2ft:{}@db/d2ft",
        "https://hooks.example/x?a=1&token={}",
        'HTTP Request: GET https://hooks.example/x?sig={} "HTTP/1.1 200"',
        "d2ft_{}",
        "run_{}",
        "whsec_{}",
    ],
)
def test_what_looks_like_a_secret_is_taken_out(text: str) -> None:
    secret = secrets.token_urlsafe(32)
    given = f"before {text.format(secret)} after"
    found = logs.Redactor([])(given)
    assert secret not in found and found.startswith("before ") and "[redacted]" in found


def test_what_only_looks_a_little_like_one_stays() -> None:
    text = "run_in_executor failed in d2ft_digits at https://docs.example/a#b: the bearer is gone; run_1 of run_sync"
    assert logs.Redactor(["", None, "short"])(text) == text


def test_no_secret_reaches_log_metrics_events_or_jobs(
    log: Log, settings: Settings, models: object, ray_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook_token = secrets.token_urlsafe(32)
    hook = {"url": f"http://127.0.0.1:{free_port()}/in?token={hook_token}", "types": ["job.failed"]}
    changes = {"settle_s": 0.2, "webhooks": True, "webhook_networks": (IPv4Network("127.0.0.0/8"),)}
    ray = FakeRay(drives=True)
    app = create_app(settings.model_copy(update=changes), ray_transport=ray.transport())
    with TestClient(app, base_url=URL, raise_server_exceptions=False) as api:
        key = read_secret(settings.home / KEY_FILE) or ""
        api.headers["Authorization"] = f"Bearer {key}"
        second = api.post("/v1/keys", json={"name": "ci"}).json()["key"]
        canaries = [
            key,
            second,
            ray_token,
            read_secret(settings.home / SECRET_FILE) or "",
            api.post("/v1/webhooks", json=hook).json()["secret"],
        ]
        for canary in canaries:
            api.get(f"/v1/jobs/{canary}?key={canary}", headers={"X-Request-ID": canary[:64]})
            api.get("/v1/jobs", headers={"Authorization": f"Bearer {canary}x"})
        ids = [api.post("/v1/jobs", json={"steps": 2, "metadata": {"outcome": o}}).json()["id"] for o in ("failed", "")]
        until(lambda: all(api.get(f"/v1/jobs/{job_id}").json()["finished_at"] for job_id in ids))
        canaries += [token_of(job["entrypoint"]) for job in ray.jobs.values()]

        def broken(self: Store) -> None:
            raise RuntimeError(f"{canaries} Authorization: Bearer {key} {hook['url']} postgresql://d2ft:{ray_token}@db")

        monkeypatch.setattr(Store, "ping", broken)
        assert api.get("/readyz").status_code == 500
        ray.down = True
        logging.getLogger("httpcore2.http11").debug(
            "send_request_headers %r", [(b"Authorization", b"Bearer " + key.encode())]
        )
        logging.getLogger("d2ft.test").warning("posting to %s with %s", hook["url"], {"token": canaries[-1]})
        shown = [api.get("/metrics").text, api.get("/v1/jobs").text]
        shown += [
            api.get(f"/v1/jobs/{job_id}{part}").text for job_id in ids for part in ("", "/events", "/plan", "/ledger")
        ]
    ray.join()
    assert len(canaries) == 7 and all(len(canary) > 30 for canary in canaries)
    assert "RuntimeError" in log.text and "bad_image" in str(shown) and len(log.lines) > 30
    for canary in (*canaries, hook_token):
        assert canary not in log.text
        assert canary not in str(shown)


def test_the_server_writes_nothing_but_lines_of_json(home: Path, models: object) -> None:
    port = free_port()
    given = {"D2FT_HOME": str(home), "D2FT_PORT": str(port), "D2FT_LOG_LEVEL": "INFO", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "service.app"]
    with subprocess.Popen(command, env={**os.environ, **given}, stderr=subprocess.PIPE) as server:
        until(lambda: host._answers(f"http://127.0.0.1:{port}"))
        server.send_signal(signal.SIGTERM)
        assert server.stderr is not None
        written = server.stderr.read().decode()
    told = [json.loads(line) for line in written.splitlines()]
    assert {"uvicorn.error", "service.watch"} <= {line["logger"] for line in told}
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in told)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("", "it printed nothing"),
        ('Traceback\nValueError: {"a": 1}\n', 'ValueError: {"a": 1}'),
        ('{"level": "ERROR", "message": "a\\nport in use"}\n{"level": "INFO", "message": "bye"}\n', "port in use"),
        ('ImportError: no x\n{"level": "INFO", "message": "bye"}\n', "ImportError: no x"),
        ("[1]\n", "[1]"),
    ],
)
def test_what_ended_the_api_is_found_in_its_log(tmp_path: Path, written: str, told: str) -> None:
    (tmp_path / "api.log").write_text(written)
    assert host._last_line(tmp_path / "api.log") == told


def token_of(entrypoint: str) -> str:
    context = RunContext.model_validate_json(Path(entrypoint.split()[-1]).read_text())
    return context.post_token or ""
