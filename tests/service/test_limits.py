"""Too much, too slow, too many at once: refused within bounds, while the others are answered as ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import psutil
import pytest
from starlette.testclient import TestClient

from service import host
from service.home import ensure_key, make_home
from service.settings import Settings
from service.store import Store
from tests.service.conftest import FakeRay, free_port, serving
from tests.service.test_routes import problem
from tests.service.walk import head, key_for, raw, received, status_of, store_of
from workers.contract import JobSpec

BODY_TIMEOUT_S = 1.5
P99_S = 0.25


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={"body_timeout_s": BODY_TIMEOUT_S, "port": free_port(), "max_body_bytes": 100_000}
    )


@pytest.fixture
def bearer(settings: Settings) -> dict[str, str]:
    make_home(settings.home)
    return {"Authorization": f"Bearer {ensure_key(settings.home)}"}


@pytest.fixture
def server(settings: Settings, models: object, bearer: dict[str, str]) -> Iterator[str]:
    with serving(settings, FakeRay()) as url:
        yield url


def connect(url: str, timeout_s: float = 10.0) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout_s)


def slow_post(bearer: dict[str, str], *, length: int = 1000) -> bytes:
    """The head of a POST whose body is to follow."""
    told = {**bearer, "Content-Type": "application/json", "Content-Length": str(length)}
    return head("POST", "/v1/jobs", told).replace(b"Connection: close\r\n", b"")


@pytest.fixture
def process(settings: Settings, models: object, bearer: dict[str, str]) -> Iterator[str]:
    """The server in a process of its own, so that what is measured is not the test's own work."""
    env = {**os.environ, **settings.as_env()}
    with subprocess.Popen([sys.executable, "-m", "service.app"], env=env, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 30
            while not host._answers(settings.url):
                assert server.poll() is None and time.monotonic() < deadline
            yield settings.url
        finally:
            server.terminate()


@contextmanager
def pulse(url: str) -> Iterator[list[float]]:
    """Ask for /healthz all the time; the list fills with the seconds that each answer took."""
    took: list[float] = []
    over = threading.Event()

    def ask() -> None:
        with httpx2.Client(base_url=url, trust_env=False, timeout=10) as client:
            while not over.is_set():
                began = time.perf_counter()
                assert client.get("/healthz").status_code == 200
                took.append(time.perf_counter() - began)
                time.sleep(0.005)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield took
        finally:
            over.set()
            asking.result(15)


def best_p99(url: str, work: Callable[[], object]) -> float:
    """The 99th percentile of what /healthz takes beside that work; the best of three, as the machine has other work."""
    found = []
    for _ in range(3):
        with pulse(url) as took:
            work()
        assert len(took) > 50
        found.append(sorted(took)[int(len(took) * 0.99)])
        if found[-1] < P99_S:
            break
    return min(found)


def test_a_body_over_the_limit_is_refused_with_and_without_its_length(api: TestClient) -> None:
    big = b" " * 100_001
    assert problem(api.post("/v1/jobs", content=big), 413)["code"] == "body_too_large"
    pieces = (big[i : i + 4096] for i in range(0, len(big), 4096))
    assert problem(api.post("/v1/jobs", content=pieces), 413)["code"] == "body_too_large"
    lies = {"Content-Length": "9" * 4000, "Content-Type": "application/json"}
    assert problem(api.post("/v1/jobs", content=b"{}", headers=lies), 413)["code"] == "body_too_large"


def test_a_gigabyte_that_is_only_promised_is_refused_at_once(server: str, bearer: dict[str, str]) -> None:
    began = time.monotonic()
    with connect(server) as connection:
        connection.sendall(slow_post(bearer, length=10**9))
        assert status_of(connection.recv(65536)) == 413
    assert time.monotonic() - began < BODY_TIMEOUT_S
    grown = psutil.Process().memory_info().rss
    with connect(server) as connection:
        told = {**bearer, "Transfer-Encoding": "chunked", "Content-Type": "application/json"}
        connection.sendall(head("POST", "/v1/jobs", told))
        with suppress(ConnectionError):
            for _ in range(2000):
                connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        answer = received(connection)
    assert status_of(answer) in (413, 0), "the reset may overtake the answer"
    assert psutil.Process().memory_info().rss - grown < 50 << 20


def test_a_body_that_drips_is_ended_and_the_connection_with_it(server: str, bearer: dict[str, str]) -> None:
    with connect(server) as connection:
        connection.sendall(slow_post(bearer) + b"{")
        began = time.monotonic()
        connection.settimeout(0.3)
        answer = b""
        while b"body_too_slow" not in answer and time.monotonic() - began < 10:  # the head may come by itself
            try:
                answer += connection.recv(65536)
            except TimeoutError:
                connection.sendall(b" ")
        assert status_of(answer) == 408 and b"body_too_slow" in answer
        assert BODY_TIMEOUT_S <= time.monotonic() - began < BODY_TIMEOUT_S + 3


def test_a_head_that_never_ends_is_hung_up_on(server: str, bearer: dict[str, str]) -> None:
    began = time.monotonic()
    with connect(server) as silent, connect(server) as dripping, connect(server) as second:
        dripping.sendall(b"GET /healthz HTTP/1.1\r\nHost: loc")
        second.sendall(head("GET", "/healthz").replace(b"Connection: close\r\n", b""))
        time.sleep(0.2)
        assert status_of(second.recv(65536)) == 200
        second.sendall(b"GET /v1/jobs HTTP/1.1\r\n")
        for connection in (silent, dripping, second):
            assert received(connection) == b""
    assert BODY_TIMEOUT_S * 0.9 < time.monotonic() - began < BODY_TIMEOUT_S + 4


def test_an_answer_may_take_longer_than_a_head(server: str, bearer: dict[str, str]) -> None:
    """A stream is a request that goes on: it is not hung up on."""
    job_id = httpx2.post(f"{server}/v1/jobs", json={}, headers=bearer, trust_env=False).json()["id"]
    headers = {**bearer, "Accept": "text/event-stream"}
    with connect(server, 0.5) as connection:
        connection.sendall(head("GET", f"/v1/jobs/{job_id}/events", headers))
        began, parts = time.monotonic(), []
        while time.monotonic() - began < 2 * BODY_TIMEOUT_S:
            try:
                parts.append(connection.recv(65536))
            except TimeoutError:
                parts.append(b"-")
        assert b"" not in parts and status_of(parts[0]) == 200


def test_many_slow_clients_slow_nobody_down(process: str, bearer: dict[str, str]) -> None:
    def drip() -> None:
        with ExitStack() as stack:
            slow = [stack.enter_context(connect(process)) for _ in range(150)]
            for number, connection in enumerate(slow):
                connection.sendall(slow_post(bearer) if number % 2 else b"GET / HTTP/1.1\r\nX: ")
            for _ in range(6):
                for connection in slow:
                    with suppress(ConnectionError):
                        connection.sendall(b" ")
                time.sleep(0.4)

    assert best_p99(process, drip) < P99_S
    assert httpx2.get(f"{process}/v1/jobs", headers=bearer, trust_env=False).json()["data"] == []


def test_bodies_that_take_long_to_read_slow_nobody_down(process: str, bearer: dict[str, str]) -> None:
    told = {**bearer, "Content-Type": "application/json"}
    bodies = [
        b"[" * 49_999 + b"]" * 49_999,
        b"[" + b"1," * 49_000 + b"1]",
        b'{"a":' + b"[]," * 30_000,
        b'["' + b"\\" * 99_000,
        b"{" + b",".join(b'"%d":[]' % n for n in range(9_000)) + b"}",
    ]

    def send(content: bytes) -> int:
        with httpx2.Client(base_url=process, trust_env=False, timeout=30) as client:
            return client.post("/v1/jobs", content=content, headers=told).status_code

    def send_all() -> None:
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(send, bodies * 12)) == {422}

    assert best_p99(process, send_all) < P99_S


@pytest.mark.parametrize(
    "lines",
    [
        b"X-Long: " + b"a" * 600_000,
        b"\r\n".join(b"X-%d: a" % n for n in range(60_000)),
        b"Authorization: Bearer " + b"a" * 600_000,
        b"Idempotency-Key: " + b"k" * 600_000,
    ],
    ids=["one long", "many", "key", "idempotency"],
)
def test_a_head_that_is_too_large_is_refused(server: str, lines: bytes) -> None:
    answer = raw(server, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n\r\n")
    assert 400 <= status_of(answer) < 500 or answer == b""
    assert status_of(raw(server, head("GET", "/healthz"))) == 200
    assert 400 <= status_of(raw(server, head("GET", "/" + "a" * 600_000))) < 500


def test_a_client_that_leaves_in_the_middle_of_its_body_has_made_no_job(server: str, bearer: dict[str, str]) -> None:
    with connect(server) as connection:
        connection.sendall(slow_post(bearer, length=50) + b"{}")
        time.sleep(0.1)
    time.sleep(0.3)
    assert httpx2.get(f"{server}/v1/jobs", headers=bearer, trust_env=False).json()["data"] == []


def test_no_page_has_more_than_a_hundred(api: TestClient) -> None:
    for _ in range(101):
        assert api.post("/v1/jobs", json={}).status_code == 201
    page = api.get("/v1/jobs", params={"limit": 100}).json()
    assert len(page["data"]) == 100 and page["has_more"]
    described = api.get("/openapi.json").json()["paths"]
    limits = {
        path: parameter["schema"]["maximum"]
        for path, methods in described.items()
        for parameter in methods.get("get", {}).get("parameters", [])
        if parameter["name"] == "limit"
    }
    assert len(limits) >= 6 and all(most <= 100 for path, most in limits.items() if not path.endswith("/logs"))


def test_a_hundred_equal_posts_at_once_make_one_job(server: str, bearer: dict[str, str]) -> None:
    """And every one of them gets the same answer to the byte; another body does not, another user's key is another."""
    once = {**bearer, "Idempotency-Key": "the same"}

    def post(seed: int, headers: dict[str, str]) -> httpx2.Response:
        return httpx2.post(f"{server}/v1/jobs", json={"seed": seed}, headers=headers, trust_env=False, timeout=60)

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda _: post(1, once), range(100)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == len({answer.headers["location"] for answer in answers}) == 1
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 99
    with ThreadPoolExecutor(20) as pool:
        others = list(pool.map(lambda n: post(n % 2 + 1, {**once, "Idempotency-Key": "contested"}), range(40)))
    assert sorted({answer.status_code for answer in others}) == [201, 422]
    assert len({answer.json()["id"] for answer in others if answer.status_code == 201}) == 1
    assert len(httpx2.get(f"{server}/v1/jobs", headers=bearer, trust_env=False).json()["data"]) == 2


def test_a_key_of_another_user_is_another(api: TestClient) -> None:
    ann, bob = key_for(api, "ann"), key_for(api, "bob")
    once = {"Idempotency-Key": "k"}
    made = [
        api.post("/v1/jobs", json={"seed": n}, headers={**who, **once}) for n, who in enumerate((ann, bob, ann, bob))
    ]
    assert [answer.status_code for answer in made] == [201, 201, 422, 422]
    for bad in ("", "x" * 256):
        assert (
            problem(api.post("/v1/jobs", json={}, headers={"Idempotency-Key": bad}), 422)["param"] == "Idempotency-Key"
        )


@pytest.fixture
def files(api: TestClient, settings: Settings) -> tuple[str, Path]:
    """(the URL of a job that has a run, the run's directory)."""
    job_id = api.post("/v1/jobs", json={}).json()["id"]
    attempt = store_of(api).queue.claim(1)
    assert attempt
    directory = settings.attempt_dir(job_id, 1)
    (directory / "result").mkdir(parents=True)
    (directory / "logs").mkdir()
    (directory / "result" / "x.bin").write_bytes(bytes(range(256)) * 40)
    data = {"name": "x.bin", "path": str(directory / "result" / "x.bin"), "bytes": 10240, "sha256": "0" * 64}
    store_of(api).attempts.absorb(attempt, [{"seq": 1, "at": 1.0, "type": "artifact.ready", "data": data}], 1)
    return f"/v1/jobs/{job_id}", directory


def test_ranges_are_one_part_or_the_whole(api: TestClient, files: tuple[str, Path]) -> None:
    url = f"{files[0]}/artifacts/x.bin"
    for given, status, size in (
        ("bytes=0-0", 206, 1),
        ("bytes=-10", 206, 10),
        ("bytes=10230-", 206, 10),
        ("bytes=0-99999999999999999999", 206, 10240),
        ("bytes=0-5,10-15", 200, 10240),
        ("bytes=" + ",".join(f"{n}-{n}" for n in range(0, 20_000, 2)), 200, 10240),
        ("bytes=" + ",".join(["0-"] * 10_000), 200, 10240),
        ("bytes=a-b", 200, 10240),
        ("bytes=5-1", 200, 10240),
        ("lines=1-2", 200, 10240),
        ("bytes", 200, 10240),
        ("", 200, 10240),
        ("bytes=99999-", 416, None),
    ):
        began = time.monotonic()
        answer = api.get(url, headers={"Range": given})
        assert answer.status_code == status, (given[:60], answer.status_code)
        assert size is None or len(answer.content) == size, given[:60]
        assert time.monotonic() - began < 1, given[:60]
    assert problem(api.get(url, headers={"Range": "bytes=99999-"}), 416)["code"] == "range_not_satisfiable"


def test_a_log_of_a_gigabyte_is_read_in_slices(api: TestClient, files: tuple[str, Path]) -> None:
    url, size = f"{files[0]}/logs", 1 << 30
    with (files[1] / "logs" / "driver.log").open("wb") as log:
        log.truncate(size)
        log.seek(size - 4)
        log.write(b"end\n")
    for bad in ("1" * 400, "x", "1.5", str(2**60)):
        assert problem(api.get(url, params={"offset": bad}), 422)["param"] == "offset"
    for bad in ("0", "-1", str((1 << 20) + 1)):
        assert problem(api.get(url, params={"limit": bad}), 422)["param"] == "limit"
    before = psutil.Process().memory_info().rss
    for offset, expected in ((0, 1 << 20), (size // 2, 1 << 20), (-4, 4), (size, 0), (2**53, 0), (-(2**62), 1 << 20)):
        began = time.monotonic()
        answer = api.get(url, params={"offset": offset})
        assert (answer.status_code, len(answer.content)) == (200, expected), offset
        assert answer.headers["x-log-size"] == str(size) and time.monotonic() - began < 1
    assert psutil.Process().memory_info().rss - before < 50 << 20


def test_following_a_log_of_a_gigabyte_takes_no_memory(
    process: str, bearer: dict[str, str], settings: Settings
) -> None:
    store, size = Store(settings.store_url), 1 << 30
    job, _ = store.jobs.create(JobSpec(), owner="user_first")
    assert store.queue.claim(1) or store.jobs.get(job.id).attempt
    store.close()
    logs = settings.attempt_dir(job.id, 1) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / "rank0.log").open("wb") as log:
        log.truncate(size)
    (server,) = (each for each in psutil.Process().children() if "service.app" in each.cmdline())
    before, grown = server.memory_info().rss, [0]

    def follow() -> None:
        url, asked = f"{process}/v1/jobs/{job.id}/logs", {"follow": True, "rank": 0}
        taken = 0
        with httpx2.stream("GET", url, params=asked, headers=bearer, trust_env=False) as answer:
            for part in answer.iter_raw():
                taken += len(part)
                grown.append(server.memory_info().rss - before)
                if taken >= 300 << 20:
                    return
        pytest.fail(f"the log ended after {taken} bytes")

    assert best_p99(process, follow) < P99_S
    assert max(grown) < 50 << 20
