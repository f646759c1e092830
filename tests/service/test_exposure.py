"""On a network: nothing starts in clear unless that is meant, and with a certificate the API speaks HTTPS."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from scheduler.errors import UserError
from service import cluster, host
from service.cli import app
from service.exposure import check_exposure
from service.home import ensure_key, read_server
from service.settings import Settings
from tests.service.conftest import FakeRay, free_port, serving

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
FAR = ("0.0.0.0", "::", "192.168.1.5", "gpu.lan", "")


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate that is its own authority, for another name than this machine's."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    make = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl(*make, "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}", "-keyout", key, "-out", cert)
    return cert, key


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    return make_certificate(tmp_path, "gpu.example")


@pytest.mark.parametrize("name", FAR)
def test_a_host_that_others_reach_needs_a_certificate_or_a_word(name: str) -> None:
    with pytest.raises(UserError) as refused:
        check_exposure(Settings(host=name))
    assert refused.value.code == "exposed" and refused.value.param == "host"
    told = f"{refused.value.message} {refused.value.remedy}"
    assert all(word in told for word in ("D2FT_TLS_CERT", "D2FT_TLS_KEY", "D2FT_PLAIN_HTTP"))
    check_exposure(Settings(host=name, plain_http=True))


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "::1"])
def test_on_loopback_nothing_is_asked(name: str) -> None:
    check_exposure(Settings(host=name))


def test_up_refuses_before_anything_is_started_or_made(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "start_head", lambda *_, **__: pytest.fail("Ray was started"))
    with pytest.raises(UserError, match="in clear"):
        host.up(Settings(home=home, host="0.0.0.0"), host.Machine(1), print)
    monkeypatch.setenv("D2FT_HOME", str(home))
    done = CliRunner().invoke(app, ["up", "--host", "0.0.0.0"])
    assert done.exit_code == 2 and "D2FT_PLAIN_HTTP" in done.stderr
    assert not home.exists()


def test_the_server_refuses_by_itself(home: Path) -> None:
    env = {**os.environ, "D2FT_HOME": str(home), "D2FT_HOST": "0.0.0.0", "D2FT_PORT": str(free_port())}
    done = subprocess.run([sys.executable, "-m", "service.app"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "D2FT_TLS_CERT" in done.stderr and "Traceback" not in done.stderr
    assert not home.exists()


def test_half_a_certificate_is_refused() -> None:
    with pytest.raises(ValueError, match="D2FT_TLS_CERT and D2FT_TLS_KEY go together"):
        Settings(tls_cert=Path("/x.pem"))


@needs_openssl
def test_a_certificate_that_cannot_be_used_is_said_before_anything_starts(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    cert, key = certificate
    _, other = make_certificate(tmp_path, "other.example")
    locked = tmp_path / "locked.key"
    openssl("ec", "-in", key, "-out", locked, "-aes256", "-passout", "pass:secret")
    check_exposure(Settings(host="0.0.0.0", tls_cert=cert, tls_key=key))
    for bad_cert, bad_key in (
        (tmp_path / "none", key),
        (cert, tmp_path / "none"),
        (cert, other),
        (key, cert),
        (cert, locked),
    ):
        with pytest.raises(UserError) as refused:
            check_exposure(Settings(tls_cert=bad_cert, tls_key=bad_key))
        assert refused.value.code == "bad_certificate" and "PEM" in str(refused.value.remedy)


@needs_openssl
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_with_a_certificate_the_api_speaks_https_alone(
    tmp_path: Path, settings: Settings, models: object, certificate: tuple[Path, Path]
) -> None:
    cert, key = certificate
    secure = settings.model_copy(update={"port": free_port(), "tls_cert": cert, "tls_key": key})
    api_key = ensure_key(settings.home)
    with serving(secure, FakeRay()) as url:
        assert url.startswith("https://127.0.0.1:")
        trust = ssl.create_default_context(cafile=str(cert))
        trust.check_hostname = False
        headers = {"Authorization": f"Bearer {api_key}"}
        assert httpx2.get(f"{url}/v1/jobs", verify=trust, headers=headers, trust_env=False).json()["data"] == []
        assert httpx2.get(f"{url}/v1/jobs", verify=trust, trust_env=False).status_code == 401
        with pytest.raises(httpx2.HTTPError):
            httpx2.get(url.replace("https", "http") + "/healthz", trust_env=False)
        with pytest.raises(httpx2.ConnectError, match="certificate"):
            httpx2.get(f"{url}/healthz", trust_env=False)
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        with socket.create_connection(("127.0.0.1", secure.port), 5) as plain, pytest.raises(OSError):
            old.wrap_socket(plain)
        # What `up` asks to see whether its server is there: it knows that server by its certificate.
        other, _ = make_certificate(tmp_path, "other.example")
        assert host._answers(url, str(cert))
        assert not host._answers(url, str(other))
        assert not host._answers(url, str(tmp_path / "none"))
        assert not host._answers(url)


@needs_openssl
@pytest.mark.filterwarnings("ignore:subprocess .* is still running")  # the server is to outlive the one who starts it
def test_up_and_down_with_a_certificate_on_all_addresses(
    home: Path, models: object, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = certificate
    no_ray = {"ray": None, "ray_address": "http://127.0.0.1:9"}
    monkeypatch.setattr(host, "_bring_ray", lambda *_: no_ray)
    settings = Settings(home=home, host="0.0.0.0", port=free_port(), tls_cert=cert, tls_key=key)
    try:
        url, fresh = host.up(settings, host.Machine(1), print)
        assert fresh and url == f"https://127.0.0.1:{settings.port}" and read_server(home)["tls_cert"] == str(cert)
        assert host.up(settings, host.Machine(1), print) == (url, False)
    finally:
        assert host.down(home, print)


def test_a_host_is_answered_by_its_own_name_beside_those_that_are_allowed() -> None:
    """Otherwise `up` would wait for a server that refuses it."""
    assert "192.168.1.5" in Settings(host="192.168.1.5", allowed_hosts=("gpu.lan",)).host_names
    assert "0.0.0.0" not in Settings(host="0.0.0.0", allowed_hosts=("gpu.lan",)).host_names
