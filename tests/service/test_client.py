"""Both clients against a real server on loopback, over connections that break."""

from __future__ import annotations

import hashlib
import inspect
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from scheduler.errors import SystemFault, UserError
from service.client import (
    ApiAuthError,
    ApiConflictError,
    ApiCorruptError,
    ApiInvalidError,
    ApiNotFoundError,
    ApiTimeoutError,
    ApiUnreachableError,
    AsyncClient,
    AsyncJobHandle,
    Client,
    JobHandle,
)
from service.home import read_secret
from service.settings import Settings
from tests.service.both import blocking_client
from tests.service.conftest import free_port
from tests.service.proxy import Cut, Proxy
from workers import outside
from workers.contract import JobSpec

Connect = Callable[..., Any]
ENDLESS = {"steps": 10_000, "metadata": {"pause_s": "0.1"}}


@pytest.fixture(params=[Client, blocking_client], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Connect:
    """Either client, by the same words."""
    found: Connect = request.param
    return found


@pytest.fixture
def key(server: str, home: Path) -> str:
    return read_secret(home / "key") or ""


@pytest.fixture
def client(connect: Connect, server: str, key: str) -> Iterator[Any]:
    with connect(server, key) as client:
        yield client


@pytest.fixture
def through(server: str) -> Iterator[Callable[[Callable[[int], Cut]], Proxy]]:
    """A proxy in front of the server that cuts as it is told."""
    made: list[Proxy] = []

    def start(cut: Callable[[int], Cut]) -> Proxy:
        made.append(Proxy(int(server.rpartition(":")[2]), cut))
        return made[-1]

    yield start
    for proxy in made:
        proxy.close()


@pytest.mark.parametrize(("one", "other"), [(Client, AsyncClient), (JobHandle, AsyncJobHandle)])
def test_the_two_clients_say_the_same_words(one: type, other: type) -> None:
    assert _words(one) == _words(other)


def _words(kind: type) -> dict[str, str]:
    methods = inspect.getmembers(kind, lambda member: inspect.isfunction(member) or isinstance(member, property))
    public = {name: member for name, member in methods if not name.startswith("_")}
    return {
        name: re.sub("Async", "", str(inspect.signature(member))) if inspect.isfunction(member) else "property"
        for name, member in public.items()
    } | {"__init__": re.sub("Async", "", str(inspect.signature(kind.__init__)))}  # type: ignore[misc]


def test_a_job_in_the_hand(client: Any, tmp_path: Path) -> None:
    job = client.submit(JobSpec(steps=5, name="n", metadata={"team": "vision"}))
    assert not job.is_final and job.wait(timeout_s=20, poll_s=0.05).status == "succeeded" == job.status
    assert job.job.progress.step == 5 and [row["step"] for row in job.metrics()] == [1, 2, 3, 4, 5]
    assert [event.seq for event in job.events()] == list(range(1, job_events := len(list(job.events())) + 1))
    assert len(list(job.events(follow=True, after=3))) == job_events - 4
    assert "last words" in "".join(job.logs()) and "last words" in "".join(job.logs(follow=True))
    assert job.plan()["version"] == 2 and job.ledger()["steps"] == 5 and job.checkpoints() == []
    assert job.timeline().forecast == job.plan()["gantt"]
    assert (job.timeline().measured or {})["step"] == 3
    assert [path.name for path in job.download(tmp_path)] == [each.name for each in job.artifacts()]
    assert job.download(tmp_path, "ledger.json") == [tmp_path / "ledger.json"]
    assert client.job(job.id).job.metadata == {"team": "vision"} and job.id in repr(job)
    with pytest.raises(ApiConflictError):
        job.pause()


def test_a_job_is_paused_resumed_cancelled_and_tried_again(client: Any) -> None:
    holding = client.submit(ENDLESS)
    job = client.submit(JobSpec(steps=1))
    assert job.pause().status == "paused" and job.resume().status == "queued"
    assert job.cancel().status == "cancelled" and job.retry().status == "queued" and job.refresh().status == "queued"
    holding.cancel()
    assert job.wait(timeout_s=20, poll_s=0.05).status == "succeeded"


def test_lists_are_walked_page_by_page_and_narrowed(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.client.calls.MAX_PAGE", 2)
    made = [client.submit({"steps": 10_000, "metadata": {"pause_s": "0.1", "n": str(n % 2)}}).id for n in range(5)]
    assert [job.id for job in client.jobs()] == made[::-1]
    assert [job.id for job in client.jobs(order="asc", metadata={"n": "1"})] == made[1::2]
    assert [job.id for job in client.jobs(search=made[2][-6:])] == [made[2]]
    assert list(client.jobs(status=["paused", "failed"])) == []
    page = client.list(limit=3)
    assert page.has_more and [job.id for job in client.list(after=page.last_id).data] == made[1::-1]
    names = [model.id for model in client.models(search="vit")]
    assert len(names) == 3 and client.model(names[0]).id == names[0]


def test_who_one_is_and_keys_that_end(client: Any, connect: Connect, server: str) -> None:
    assert "admin" in client.me().scopes and client.ready() == {"store": "ok", "ray": "ok"}
    user = client.make_user({"name": "ada", "max_queued": 3})
    assert client.change_user(user.id, {"max_queued": None}).max_queued is None
    made = client.make_key({"name": "laptop", "user": "ada"})
    assert made.key and made.key not in repr(made) and "ada" in {each.name for each in client.users()}
    with connect(server, made.key) as ada:
        assert ada.me().user.name == "ada" and ada.devices().data == []
        with pytest.raises(ApiAuthError):
            ada.users()
        assert client.revoke_key(made.id).revoked_at and client.revoke_key(made.id).revoked_at
        with pytest.raises(ApiAuthError):
            ada.me()
    assert all(each.key is None for each in client.keys())  # noqa: SIM118


def test_errors_are_of_their_kind_and_name_the_request(client: Any, connect: Connect, server: str) -> None:
    with pytest.raises(ApiNotFoundError) as not_found:
        client.get("ftjob_none")
    assert not_found.value.code == "job_not_found" and str(not_found.value.request_id) in str(not_found.value)
    for call in (lambda: list(client.logs("ftjob_none", follow=True)), lambda: list(client.events("j", follow=True))):
        with pytest.raises(ApiNotFoundError):
            call()
    with pytest.raises(ApiInvalidError):
        client.submit({"workers": 0})
    job = client.submit(JobSpec(steps=100, metadata={"pause_s": "0.01"}))
    with pytest.raises(ApiTimeoutError):
        job.wait(timeout_s=0.05, poll_s=0.02)
    with pytest.raises(ApiNotFoundError):
        client.download(job.id, "never", Path("/tmp"))
    with pytest.raises(ApiTimeoutError):
        list(client.events(job.id, follow=True, timeout_s=0.3))
    with connect(server, "d2ft_wrong") as stranger, pytest.raises(ApiAuthError) as refused:
        stranger.list()
    assert "d2ft_wrong" not in str(refused.value)
    with connect(f"http://127.0.0.1:{free_port()}", None, retries=0) as gone, pytest.raises(ApiUnreachableError):
        gone.list()


@pytest.mark.parametrize("url", ["", "localhost:7421", "ftp://x", "http://", "http://[::1", "http://x:port"])
def test_an_address_that_is_none_is_named(connect: Connect, url: str) -> None:
    with pytest.raises(UserError, match="not the address"):
        connect(url, None)


def test_a_server_that_never_answers_is_given_up(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began_at = time.monotonic()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with connect(url, None, timeout_s=0.2, retries=1) as client:
            with pytest.raises(ApiUnreachableError):
                client.get("j")
            with pytest.raises(ApiTimeoutError):
                client.wait("j", timeout_s=0.5)
        assert time.monotonic() - began_at < 5


def test_thirty_submits_over_lost_answers_are_thirty_jobs(
    connect: Connect, client: Any, key: str, through: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.client.flows.LONGEST_PAUSE_S", 0.02)
    luck = random.Random(5)
    proxy = through(lambda n: Cut(after_bytes=luck.choice([0, 1, 900, 2500, 6000])))
    with connect(proxy.url, key, retries=12) as shaky:
        made = [shaky.submit(ENDLESS, idempotency_key=f"key-{n}") for n in range(30)]
    assert proxy.num_cuts >= 10 and any(job.replayed for job in made)
    assert sorted(job.id for job in client.jobs()) == sorted({job.id for job in made})
    assert len(list(client.jobs())) == 30


@pytest.fixture(
    params=[Cut(after_s=0.4), pytest.param(Cut(after_bytes=4000), marks=pytest.mark.slow)],
    ids=["every 0.4 s", "every 4 kB"],
)
def shaky(request: pytest.FixtureRequest, connect: Connect, through: Any, key: str) -> Iterator[tuple[Any, Proxy]]:
    proxy = through(lambda n: request.param)
    with connect(proxy.url, key) as client:
        yield client, proxy


def test_a_run_of_ones_own_is_listed_and_its_token_tells_of_it(client: Any, server: str) -> None:
    begun = client.begin_run(JobSpec(steps=3), {"run_dir": "/out", "submission_id": None}, idempotency_key="k")
    assert begun == client.begin_run(JobSpec(steps=3), {"run_dir": "/out"}, idempotency_key="k")
    job = client.get(begun.job_id)
    assert (job.status, job.outside, job.where) == ("starting", True, {"run_dir": "/out"})
    assert begun.url == f"{server}/v1/runs/events" and begun.attempt == 1 and begun.token.startswith("run_")
    outside.give_up(begun.url, begun.token, begun.attempt, SystemFault("gone", code="not_submitted"))
    assert client.get(begun.job_id).error.code == "not_submitted"


def test_events_and_waiting_go_on_over_broken_connections(client: Any, shaky: tuple[Any, Proxy]) -> None:
    job = client.submit(JobSpec(steps=60, metadata={"pause_s": "0.02"}))
    seen = [event.seq for event in shaky[0].events(job.id, follow=True)]
    assert seen == list(range(1, len(seen) + 1)) == [event.seq for event in client.events(job.id)]
    assert len(seen) > 60 and shaky[1].num_cuts >= 2
    again = client.submit(JobSpec(steps=60, metadata={"pause_s": "0.02"}))
    assert shaky[0].wait(again.id, timeout_s=30, poll_s=0.05).status == "succeeded"


def test_logs_lose_and_repeat_nothing_over_broken_connections(
    client: Any, shaky: tuple[Any, Proxy], settings: Settings
) -> None:
    job = client.submit(JobSpec(steps=100, metadata={"pause_s": "0.02"}))
    path = settings.attempt_dir(job.id, 1) / "logs" / "driver.log"
    written = "".join(f"{n}: žluťoučký kůň 🐎 příšerně úpěl\n" for n in range(800))

    def write() -> None:
        while not path.parent.parent.is_dir():
            time.sleep(0.01)
        path.parent.mkdir(exist_ok=True)
        with path.open("ab", buffering=0) as file:
            content = written.encode()
            for at in range(0, len(content), 501):
                file.write(content[at : at + 501])
                time.sleep(0.01)

    writing = threading.Thread(target=write)
    writing.start()
    assert "".join(shaky[0].logs(job.id, follow=True)) == written
    writing.join(10)
    assert shaky[1].num_cuts >= 2
    assert "".join(client.logs(job.id, offset=-5)) == written[-4:] and "".join(client.logs(job.id)) == written
    assert "".join(client.logs(job.id, offset=-5, follow=True, attempt=1)) == written[-4:]


def test_a_download_goes_on_where_it_broke_and_is_what_was_told(
    connect: Connect, client: Any, through: Any, key: str, tmp_path: Path
) -> None:
    job = client.submit(JobSpec(steps=1))
    job.wait(timeout_s=10, poll_s=0.05)
    proxy = through(lambda n: Cut(after_bytes=700))
    with connect(proxy.url, key) as shaky:
        found = shaky.download(job.id, "model.safetensors", tmp_path / "deep" / "er")
    assert found.read_bytes() == b"weights" * 100 and proxy.num_cuts >= 2
    assert [path.name for path in found.parent.iterdir()] == ["model.safetensors"]


def test_a_download_that_is_another_is_not_kept(client: Any, home: Path, tmp_path: Path) -> None:
    job = client.submit(JobSpec(steps=1))
    job.wait(timeout_s=10, poll_s=0.05)
    [path] = home.glob(f"jobs/{job.id}/**/model.safetensors")
    path.write_bytes(b"Weights" * 100)
    with pytest.raises(ApiCorruptError, match="SHA-256"):
        job.download(tmp_path / "out", "model.safetensors")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_changes_while_it_is_fetched_is_fetched_anew(tmp_path: Path) -> None:
    contents = [b"old" * 100, b"brand new"]

    def serve(request: httpx2.Request) -> httpx2.Response:
        now = contents.pop(0) if len(contents) > 1 else contents[0]
        asked, etag = request.headers.get("if-range"), f'"{hashlib.md5(now).hexdigest()}"'
        assert asked is None or asked != etag
        headers = {"ETag": etag, "Content-Length": str(len(now))}
        if now.startswith(b"old"):
            return httpx2.Response(200, headers=headers, stream=_Torn(now[:50]))
        return httpx2.Response(200, headers=headers, content=now)

    with Client("http://gpu.example", "k", transport=httpx2.MockTransport(serve)) as client:
        assert client.download("j", "f", tmp_path).read_bytes() == b"brand new"


class _Torn(httpx2.SyncByteStream):
    def __init__(self, content: bytes) -> None:
        self._content = content

    def __iter__(self) -> Iterator[bytes]:
        yield self._content
        raise httpx2.ReadError("cut")


def test_requests_say_who_sends_them_and_hide_the_key() -> None:
    sent: list[httpx2.Request] = []

    def serve(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        return httpx2.Response(307, headers={"Location": "http://elsewhere.example/"})

    with Client("http://gpu.example/d2ft/", "d2ft_secret", transport=httpx2.MockTransport(serve)) as client:
        with pytest.raises(Exception, match="307"):
            client.get("a/../b")
        assert "d2ft_secret" not in repr(client) + repr(vars(client))
    assert [str(request.url) for request in sent] == ["http://gpu.example/d2ft/v1/jobs/a%2F..%2Fb"]
    assert re.fullmatch(r"d2ft-client/\d[\w.]*", sent[0].headers["user-agent"])
    assert sent[0].headers["authorization"] == "Bearer d2ft_secret"


def test_an_iterator_that_is_left_lets_go_of_its_stream(client: Any, server: str) -> None:
    job = client.submit(ENDLESS)
    events = client.events(job.id, follow=True)
    assert next(events).seq == 1
    events.close()
    job.cancel()
