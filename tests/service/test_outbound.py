"""The way out: whatever a URL says and its name resolves to, nothing inside is reached that was not allowed."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from service import outbound as room
from service.errors import InvalidRequestError, UnavailableError
from service.outbound import Outbound, may_call
from tests.service.receiver import Receiver, biscuit, endless, receiving, redirect, silent

PUBLIC = "93.184.216.34"
HERE = ipaddress.ip_network("127.0.0.1/32")
HOSTILE = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0177.0.0.1",
    "017700000001",
    "0x7f.1",
    "0x7f000001",
    "127.0.0.1.",
    "0.0.0.0",
    "0",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[fe80::1%25lo]",
    "[fd00:ec2::254]",
    "169.254.169.254",
    "10.0.0.1",
    "100.64.0.1",
    "224.0.0.1",
    "localhost",
    "LOCALHOST.",
    "\uff11\uff12\uff17.0.0.1",
    "127\u30020\u30020\u30021",
    "\u2460\u2461\u2466.0.0.1",
    "127%2e0.0.1",
    "loc%61lhost",
    "a..b",
    "a" * 70 + ".com",
]


@pytest.fixture
def inside() -> Iterator[Receiver]:
    """What must not be reached."""
    with receiving(host="127.0.0.1") as receiver:
        yield receiver


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """Names and what they resolve to, one answer after another, the last for ever; other names as they are."""
    known: dict[str, list[list[str]]] = {}
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *args: Any, **options: Any) -> list[Any]:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in known:
            return real(host, port, *args, **options)
        answers = known[name]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [entry for address in found for entry in real(address, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return known


def post(url: str, *networks: Any, context: ssl.SSLContext | None = None) -> int:
    async def send() -> int:
        client = Outbound(networks, context)
        try:
            return await client.post(url, {"X-Ours": "1"}, b"{}")
        finally:
            client.close()

    return asyncio.run(send())


def check(url: str, *networks: Any) -> tuple[str, ...]:
    client = Outbound(networks)
    try:
        return asyncio.run(client.check(url)).addresses
    finally:
        client.close()


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", HOSTILE)
def test_no_spelling_of_a_host_reaches_loopback(inside: Receiver, scheme: str, host: str) -> None:
    url = f"{scheme}://{host}:{inside.port}/hook"
    with pytest.raises(InvalidRequestError, match=r"^url ") as refusal:
        check(url)
    assert refusal.value.param == "url" and refusal.value.code == "url_refused"
    with pytest.raises(InvalidRequestError):
        post(url)
    assert inside.num_connections == 0


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hook",
        "//example.com/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_x",
        "https://",
        "https:/example.com",
        "https://user@example.com/",
        "https://user:word@example.com/",
        "https://example.com\\@127.0.0.1/",
        "https://example.com/#part",
        "https://example.com/#",
        "https://example.com:0/",
        "https://example.com:22/",
        "https://example.com:6553500/",
        "https://example.com/\r\nHost: inside",
        "https://exa\x00mple.com/",
        "https://[::1",
    ],
)
def test_what_is_no_plain_web_address_is_refused(url: str, names: dict[str, list[list[str]]]) -> None:
    names["example.com"] = [[PUBLIC]]
    with pytest.raises(InvalidRequestError, match=r"^url "):
        check(url)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        (PUBLIC, True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::93.184.216.34", True),
        ("64:ff9b::10.0.0.1", False),
        ("2002:5db8:d822::1", True),
        ("2002:a00:1::1", False),
        ("2001::1", False),
        ("192.0.0.9", False),
        ("192.88.99.1", False),
        ("255.255.255.255", False),
        ("239.1.2.3", False),
        ("ff0e::1", False),
        ("fec0::1", False),
        ("2001:db8::1", False),
        ("3fff::1", False),
        ("::", False),
        ("no address", False),
    ],
)
def test_public_is_what_the_whole_internet_can_reach(address: str, public: bool) -> None:
    assert may_call(address, (), scheme="https") is public
    assert not may_call(address, (), scheme="http")


@given(st.ip_addresses())
def test_an_address_means_the_same_inside_an_ipv6_one(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if address.version == 4:
        plain = may_call(str(address), (), scheme="https")
        for form in (f"::ffff:{address}", f"64:ff9b::{address}"):
            assert may_call(form, (), scheme="https") is plain
        assert may_call(str(address), [ipaddress.ip_network("0.0.0.0/0")], scheme="http")
    if not address.is_global:
        assert not may_call(str(address), (), scheme="https")


def test_one_inner_address_among_public_ones_is_too_many(names: dict[str, list[list[str]]]) -> None:
    names["mixed.test"] = [[PUBLIC, "127.0.0.1"]]
    with pytest.raises(InvalidRequestError, match="not public"):
        check("https://mixed.test/")


def test_a_refusal_does_not_tell_what_a_name_means_inside(names: dict[str, list[list[str]]]) -> None:
    names["db.internal"] = [["10.1.2.3"]]
    with pytest.raises(InvalidRequestError) as refusal:
        check("https://db.internal/")
    assert "10.1.2.3" not in str(refusal.value)


def test_a_name_that_turns_inward_after_the_check_is_refused(
    inside: Receiver, names: dict[str, list[list[str]]]
) -> None:
    names["rebind.test"] = [[PUBLIC], ["127.0.0.1"]]
    url = f"https://rebind.test:{inside.port}/"
    assert check(url) == (PUBLIC,)
    with pytest.raises(InvalidRequestError, match="not public"):
        post(url)
    assert inside.num_connections == 0


def test_the_connection_goes_to_the_address_that_was_judged(
    inside: Receiver, names: dict[str, list[list[str]]]
) -> None:
    names["rebind.test"] = [["127.0.0.2"], ["127.0.0.1"]]
    # On the port of `inside`, so that the address alone decides.
    with socket.create_server(("127.0.0.2", inside.port)) as judged:
        threading.Thread(target=_accept_one, args=(judged,)).start()
        assert post(f"http://rebind.test:{inside.port}/", ipaddress.ip_network("127.0.0.2/32")) == 204
    assert inside.num_connections == 0


def test_redirects_are_not_followed(inside: Receiver) -> None:
    with receiving(redirect(inside.url), host="127.0.0.2") as first:
        assert post(first.url, ipaddress.ip_network("127.0.0.2/32")) == 307
        assert len(first.hits) == 1
    assert inside.num_connections == 0


def test_no_proxy_of_the_environment_is_used(inside: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{inside.port}")
    with receiving(host="127.0.0.2") as direct:
        assert post(direct.url, ipaddress.ip_network("127.0.0.2/32")) == 200
    assert inside.num_connections == 0


def test_an_allowed_network_is_called_by_http_with_what_was_given(inside: Receiver) -> None:
    assert post(inside.url + "?a=b%20c", HERE) == 200
    (hit,) = inside.hits
    assert (hit.path, hit.body) == ("/hook?a=b%20c", b"{}")
    assert hit.headers["host"] == f"127.0.0.1:{inside.port}" and hit.headers["x-ours"] == "1"


def test_http_is_only_for_allowed_networks(names: dict[str, list[list[str]]]) -> None:
    names["public.test"] = [[PUBLIC]]
    assert check("https://public.test/") == (PUBLIC,)
    with pytest.raises(InvalidRequestError, match="must be https"):
        check("http://public.test/", HERE)


def test_the_next_address_is_tried_where_nobody_listens(inside: Receiver, names: dict[str, list[list[str]]]) -> None:
    names["two.test"] = [["127.0.0.3", "127.0.0.1"]]
    assert post(f"http://two.test:{inside.port}/", ipaddress.ip_network("127.0.0.0/8")) == 200
    assert inside.hits[0].headers["host"] == f"two.test:{inside.port}"


def test_no_cookie_is_kept() -> None:
    async def twice(url: str) -> None:
        client = Outbound([HERE])
        for _ in range(2):
            assert await client.post(url, {}, b"") == 200
        client.close()

    with receiving(biscuit) as receiver:
        asyncio.run(twice(receiver.url))
        assert [hit.headers.get("cookie") for hit in receiver.hits] == [None, None]


def test_a_receiver_that_never_answers_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "IN_ALL_S", 0.3)
    end = threading.Event()
    with receiving(silent(end)) as receiver:
        with pytest.raises(UnavailableError, match=r"no answer within 0\.3 s"):
            post(receiver.url, HERE)
        end.set()


def test_a_name_server_that_never_answers_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CONNECT_S", 0.2)
    end = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: end.wait(20) and [])
    with pytest.raises(InvalidRequestError, match="does not resolve"):
        check("https://slow.test/")
    end.set()


def test_an_answer_without_end_is_dropped() -> None:
    with receiving(endless) as receiver:
        assert post(receiver.url, HERE) == 200


def test_nobody_there_is_said() -> None:
    with receiving() as receiver:
        pass
    with pytest.raises(UnavailableError, match="no answer: "):
        post(receiver.url, HERE)


@pytest.mark.parametrize(("name", "good"), [("good.test", True), ("good.test.", True), ("other.test", False)])
def test_tls_is_checked_against_the_name(
    certified: tuple[ssl.SSLContext, ssl.SSLContext], names: dict[str, list[list[str]]], name: str, good: bool
) -> None:
    ours, theirs = certified
    names[name] = [["127.0.0.1"]]
    with receiving(context=theirs) as receiver:
        url = f"https://{name}:{receiver.port}/"
        if good:
            assert post(url, HERE, context=ours) == 200
            assert receiver.hits[0].headers["host"] == f"{name}:{receiver.port}"
            return
        with pytest.raises(UnavailableError, match=r"not valid for 'other\.test'"):
            post(url, HERE, context=ours)
        assert receiver.hits == []


def test_a_certificate_that_nobody_vouches_for_is_refused(
    certified: tuple[ssl.SSLContext, ssl.SSLContext], names: dict[str, list[list[str]]]
) -> None:
    names["good.test"] = [["127.0.0.1"]]
    with receiving(context=certified[1]) as receiver:
        with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
            post(f"https://good.test:{receiver.port}/", HERE)
        assert receiver.hits == []


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(ours, the server's): a certificate of good.test that the first trusts and the second shows."""
    path = tmp_path_factory.mktemp("tls") / "good.pem"
    _write_certificate(path, "good.test")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return ssl.create_default_context(cafile=str(path)), server


def _write_certificate(path: Path, name: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    made = x509.CertificateBuilder(who, who, key.public_key(), x509.random_serial_number(), now - day, now + day)
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    text = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(text + made.sign(key, hashes.SHA256()).public_bytes(encoding))


def _accept_one(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
