"""Requests to addresses that users name: the one way out, and what it refuses.

A user's URL must not become a way into the network that the service stands in. How a host is spelled (decimal, hex, a
name, an IPv4 address inside an IPv6 one) says nothing: what it resolves to is judged, all of it, and the connection is
made to an address that was judged, so a name that resolves to something else a moment later gains nothing. TLS is
checked against the name. Redirects are not followed, no cookie is kept, no proxy of the environment is used: a bare
transport, new for each request, does nothing of the kind by itself, and its connection is never another host's.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import httpx2

from service.errors import InvalidRequestError, Issue, UnavailableError

CONNECT_S = 5.0
IN_ALL_S = 10.0
MAX_ANSWER_BYTES = 64 * 1024
_NUM_TRIED = 3
_NUM_RESOLVING = 8
_PORTS = {"https": 443, "http": 80}
_FREE_PORTS = range(1024, 65536)  # below lie services that could take a request for something else
_GLOBAL_IPV6 = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_NOT_PUBLIC = (
    IPv4Network("192.0.0.0/24"),  # of protocols; 192.0.0.9 and .10 are answered by the nearest gateway
    IPv4Network("192.88.99.0/24"),  # the nearest 6to4 relay
    IPv6Network("3fff::/20"),  # documentation
)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


@dataclass(frozen=True)
class Target:
    """A URL that may be called, and the addresses of its host that were judged."""

    url: httpx2.URL
    addresses: tuple[str, ...]


class Outbound:
    """The client. `networks` may be called although they are not public, and by http, too."""

    def __init__(self, networks: Sequence[Network] = (), context: ssl.SSLContext | None = None) -> None:
        self._networks = tuple(networks)
        self._given_context = context
        # Threads of its own: a name server that a user chose may be slow, and must keep nobody else waiting.
        self._resolving = ThreadPoolExecutor(_NUM_RESOLVING, thread_name_prefix="resolve")

    async def check(self, url: str) -> Target:
        """Where a request to this URL would go. Raises InvalidRequestError, which names what to change."""
        parsed = parse_url(url)
        addresses = await self._resolve(parsed.raw_host.decode("ascii"))
        if not all(may_call(address, self._networks, scheme=parsed.scheme) for address in addresses):
            raise _refused(_words_of(parsed.scheme))
        return Target(parsed, tuple(addresses))

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        """Send a body; returns the status of the answer, whose body is dropped.

        Raises InvalidRequestError for a URL that may not be called, UnavailableError where no answer comes.
        """
        try:
            async with asyncio.timeout(IN_ALL_S):
                target = await self.check(url)
                return await self._send(target, headers, body)
        except (TimeoutError, httpx2.TimeoutException):
            raise UnavailableError(f"no answer within {IN_ALL_S:g} s", code="receiver_unreachable") from None
        except httpx2.TransportError as error:
            reason = str(error) or type(error).__name__
            raise UnavailableError(f"no answer: {reason}", code="receiver_unreachable") from error

    def close(self) -> None:
        self._resolving.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _context(self) -> ssl.SSLContext:
        return self._given_context or httpx2.create_ssl_context()

    async def _resolve(self, host: str) -> list[str]:
        asked = asyncio.get_running_loop().run_in_executor(self._resolving, _addresses, host)
        try:
            async with asyncio.timeout(CONNECT_S):
                addresses = await asked
        except (OSError, ValueError):  # TimeoutError is an OSError; a label of a wrong length is a UnicodeError
            addresses = []
        if not addresses:
            raise _refused("has a host that does not resolve; check its name.")
        return addresses

    async def _send(self, target: Target, headers: Mapping[str, str], body: bytes) -> int:
        *others, last = target.addresses[:_NUM_TRIED]
        for address in others:
            try:
                return await self._send_to(address, target, headers, body)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                continue
        return await self._send_to(last, target, headers, body)

    async def _send_to(self, address: str, target: Target, headers: Mapping[str, str], body: bytes) -> int:
        """One request over one connection. The host's name is in its head and in its TLS, the address is given."""
        request = httpx2.Request(
            "POST",
            target.url.copy_with(host=address),
            headers={"Host": target.url.netloc.decode("ascii"), "Connection": "close", **headers},
            content=body,
            extensions={
                "sni_hostname": target.url.raw_host.decode("ascii").rstrip("."),
                "timeout": httpx2.Timeout(IN_ALL_S, connect=CONNECT_S).as_dict(),
            },
        )
        async with httpx2.AsyncHTTPTransport(verify=self._context, trust_env=False) as transport:
            answer = await transport.handle_async_request(request)
            try:
                await _drain(answer)
            finally:
                await answer.aclose()
        return answer.status_code


def parse_url(url: str) -> httpx2.URL:
    """The URL in parts. Raises InvalidRequestError for all that can be refused without resolving its host."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise _refused(f"is not a URL: {error}") from None
    if parsed.scheme not in _PORTS or not parsed.raw_host:
        raise _refused("must be an address like https://example.com/hook.")
    if parsed.userinfo:
        raise _refused("must not hold a user or password; messages are signed, check that instead.")
    if parsed.fragment or "#" in url:
        raise _refused("must not have a fragment (#…); leave it away.")
    if parsed.port not in (None, *_PORTS.values(), *_FREE_PORTS):
        raise _refused(f"must have port 443, 80 or one from {_FREE_PORTS.start} up.")
    return parsed


def may_call(address: str, networks: Sequence[Network], *, scheme: str) -> bool:
    """Whether an address may be called: a public one by https, one of the networks by http, too."""
    try:
        inner = _innermost(ip_address(address))
    except ValueError:
        return False
    if isinstance(inner, IPv6Address) and inner.scope_id is not None:
        return False
    return any(inner in network for network in networks) or (scheme == "https" and _is_public(inner))


def _innermost(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, where it does: that is where packets come out."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _is_public(address: Address) -> bool:
    """Python's own word, and what it is too lenient with. Teredo is refused with its whole range."""
    if isinstance(address, IPv6Address) and address not in _GLOBAL_IPV6:
        return False
    if address.is_multicast or any(address in network for network in _NOT_PUBLIC):
        return False
    return address.is_global


def _addresses(host: str) -> list[str]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


async def _drain(answer: httpx2.Response) -> None:
    """Let the receiver finish its answer, unless that is long."""
    size = 0
    async for chunk in answer.aiter_raw():
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            return


def _words_of(scheme: str) -> str:
    # No address is named: what a name means inside this network is not for every user to learn.
    if scheme == "http":
        return "must be https; http is for hosts in the networks of D2FT_WEBHOOK_NETWORKS, which an administrator sets."
    return "has a host that is not public; an administrator can allow its network by D2FT_WEBHOOK_NETWORKS."


def _refused(why: str) -> InvalidRequestError:
    return InvalidRequestError([Issue("url", f"url {why}", "url_refused")])
