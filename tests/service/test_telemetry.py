"""Traces: one from the POST of a job to the end of its attempt, over a restart; and none that costs or breaks a thing.

FastAPI's own telemetry is asked for by its variable, and stays off: it would send what stands in URLs and errors.
"""

from __future__ import annotations

import http.server
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from starlette.testclient import TestClient

from service import telemetry
from service.app import create_app
from service.home import KEY_FILE, read_secret
from service.settings import Settings
from service.telemetry import Tracing, current_trace, header_secrets, start_tracing
from tests.listening import listening
from tests.service.conftest import URL, FakeRay
from tests.service.logged import Log
from tests.waiting import until

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Receiver:
    """An OTLP endpoint on loopback; keeps the spans that it is sent."""

    def __init__(self) -> None:
        spans = self.spans = list[Span]()
        services = self.services = set[str]()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for part in ExportTraceServiceRequest.FromString(body).resource_spans:
                    services.update(a.value.string_value for a in part.resource.attributes if a.key == "service.name")
                    spans.extend(span for scope in part.scope_spans for span in scope.spans)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    receiver = Receiver()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    with listening(receiver.server):
        yield receiver


@pytest.fixture
def opened(settings: Settings, models: object) -> Callable[..., TestClient]:
    """The application over one home, as often as it is asked for."""

    def make(ray: FakeRay, *, supervise: bool) -> TestClient:
        app = create_app(settings, ray_transport=ray.transport(), supervise=supervise)
        client = TestClient(app, base_url=URL, raise_server_exceptions=False)
        client.headers["Authorization"] = f"Bearer {read_secret(settings.home / KEY_FILE)}"
        return client

    return make


def attributes(span: Span) -> dict[str, object]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value") or "string_value") for a in span.attributes}


@pytest.mark.parametrize("outcome", ["succeeded", "failed"])
def test_a_job_and_its_attempt_share_a_trace_over_a_restart(
    receiver: Receiver, opened: Callable[..., TestClient], outcome: str
) -> None:
    ray = FakeRay(drives=True)
    with opened(ray, supervise=False) as api, Log([]) as log:
        body = {"steps": 2, "metadata": {"outcome": outcome}}
        job_id = api.post("/v1/jobs", json=body, headers={"traceparent": CALLER}).json()["id"]
    (posted,) = receiver.named("POST /v1/jobs")
    assert posted.kind == Span.SPAN_KIND_SERVER and receiver.services == {"d2ft"}
    assert f"00-{posted.trace_id.hex()}-{posted.parent_span_id.hex()}-01" == CALLER
    with opened(ray, supervise=True) as api:
        until(lambda: api.get(f"/v1/jobs/{job_id}").json()["status"] == outcome)
        until(lambda: not api.app.state.world.store.attempts.open())  # type: ignore[attr-defined]
    ray.join()
    (submitted,), (ran,) = receiver.named("attempt submit"), receiver.named("attempt")
    for span in (submitted, ran):
        assert span.trace_id == posted.trace_id and span.parent_span_id == posted.span_id
        assert attributes(span)["d2ft.job_id"] == job_id and attributes(span)["d2ft.attempt"] == 1
    assert attributes(ran)["d2ft.job_state"] == outcome
    assert (ran.status.code == Status.STATUS_CODE_ERROR) == (outcome == "failed")
    assert posted.start_time_unix_nano < ran.start_time_unix_nano < ran.end_time_unix_nano < time.time_ns()
    (line,) = log.of(logger="service.watch", method="POST")
    assert (line["trace_id"], line["span_id"]) == (posted.trace_id.hex(), posted.span_id.hex())


def test_a_span_of_a_request_has_its_route_and_nothing_of_its_text(
    receiver: Receiver, opened: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(FakeRay(), supervise=False) as api:
        api.get("/v1/jobs/ftjob_secret?token=secret", headers={"traceparent": "00-zz-secret"})
        api.get("/nothing/secret")
        monkeypatch.setattr(api.app.state.world.store, "ping", lambda: 1 / 0)  # type: ignore[attr-defined]
        api.get("/readyz")
    (found,), (bug,) = receiver.named("GET /v1/jobs/{job_id}"), receiver.named("GET /readyz")
    assert (
        attributes(found)["http.route"] == "/v1/jobs/{job_id}" and attributes(found)["http.response.status_code"] == 404
    )
    assert not found.parent_span_id and found.status.code == Status.STATUS_CODE_UNSET
    assert bug.status.code == Status.STATUS_CODE_ERROR and receiver.named("GET unmatched")
    assert "secret" not in str(receiver.spans)


def test_an_endpoint_that_is_away_or_hangs_holds_nothing_up(
    opened: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as mute:  # takes, never answers
        for port in (9, mute.server_port):
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
            with opened(FakeRay(), supervise=False) as api:
                api.get("/healthz")
                began = time.perf_counter()
                assert all(api.get("/healthz").status_code == 200 for _ in range(20))
                assert time.perf_counter() - began < 2
                ended = time.perf_counter()
            assert time.perf_counter() - ended < 2.5


def test_without_the_variable_nothing_is_made_and_nothing_imported() -> None:
    tracing = start_tracing()
    assert type(tracing) is Tracing and not tracing.is_on
    with tracing.span("x", CALLER, {}) as span:
        span.describe("y", {})
        assert current_trace() is None
    tracing.record("x", None, {}, began=0, ended=1)
    tracing.close()
    code = "import sys, service.app; sys.exit(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_without_the_packages_the_log_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:9/v1/traces")
    monkeypatch.delitem(sys.modules, "service.telemetry.otlp", raising=False)
    monkeypatch.delattr(telemetry, "otlp", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with caplog.at_level(logging.WARNING):
        assert not start_tracing().is_on
    (record,) = caplog.records
    assert "pip install 'd2ft[otel]'" in record.getMessage()


def test_keys_for_the_endpoint_are_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=abc=def, x = y")
    assert header_secrets() == ["abc=def", "y"]
