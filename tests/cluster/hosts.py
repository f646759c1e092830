"""Hosts that are network namespaces of this machine, each pair joined by a link of its own, shaped by `tc`.

A host has its own network, its own shared memory (a private /dev/shm) and its own name; the files and the processors
are the machine's. Two hosts are joined by a pair of veth devices, whose queues (`tbf`) set the bandwidth. A link with
latency goes another way: over TUN devices and `wire`, as this kernel need not have `netem`; their queues set its
bandwidth too. `Hosts.shape` changes a link while connections are open, as routes change and addresses stay.

Needs root, `ip` and `tc`. Names carry the process's id; what a killed program has left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

WIRE = Path(__file__).with_name("wire.py")
NAME = re.compile(r"d2h(\d+)-\d+")
BURST_S = 0.0005  # of traffic that may leave at once; a queue's timer is about as exact
QUEUE_S = 0.2  # of traffic that may wait before packets are dropped
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
# What a host is besides its network: a name and shared memory of its own.
_SETTLE = 'hostname "$0" && mount -t tmpfs -o size=2g tmpfs /dev/shm && echo here && exec sleep infinity'


@dataclass(frozen=True)
class Link:
    """What `tc` is told of a link, alike in both directions; 0 µs is a link over veth, which takes what it takes."""

    mbit_s: float = 1000.0
    latency_us: int = 0

    @property
    def bytes_per_s(self) -> float:
        return self.mbit_s * 1e6 / 8


FAST = Link()


class Hosts:
    """`count` hosts, all joined; a context manager, after which nothing of them is left."""

    def __init__(self, count: int, link: Link = FAST) -> None:
        sweep()
        self.home = Path(f"/tmp/d2h{os.getpid()}")  # short: paths of sockets are
        self.home.mkdir()
        self.names = [f"d2h{os.getpid()}-{host}" for host in range(count)]
        self.addresses = [f"10.77.0.{host + 1}" for host in range(count)]
        self._wires: dict[tuple[int, int], subprocess.Popen[bytes]] = {}
        self._holders: list[subprocess.Popen[bytes]] = []  # a process for each host, whose namespaces others enter
        try:
            for name in self.names:
                call("ip", "netns", "add", name)
                self.call_in(name, "ip", "link", "set", "lo", "up")
                self._holders.append(_hold(name))
            for a, b in itertools.combinations(range(count), 2):
                self._join(a, b)
                self.shape(a, b, link)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for pair in list(self._wires):
            self._cut(*pair)
        for name in self.names:
            remove(name)
        for holder in self._holders:
            holder.wait()
        shutil.rmtree(self.home, ignore_errors=True)

    def start(self, host: int, command: Sequence[str], env: Mapping[str, str], output: Path) -> subprocess.Popen[bytes]:
        """A process on a host; it sees the environment given and nothing of ours."""
        enter = ["nsenter", f"--target={self._holders[host].pid}", "--net", "--uts", "--mount", f"--wd={Path.cwd()}"]
        with output.open("ab") as file:
            return subprocess.Popen([*enter, *command], env=dict(env), stdout=file, stderr=file, start_new_session=True)

    def shape(self, a: int, b: int, link: Link) -> None:
        """Give the link between two hosts another bandwidth and latency; connections stay open."""
        device = "v"
        if link.latency_us:
            self._lay(a, b, link.latency_us)
            device = "t"
        for here, there in ((a, b), (b, a)):
            burst = max(16_000, int(link.bytes_per_s * BURST_S))
            rate = ("rate", f"{link.mbit_s:g}mbit", "burst", str(burst), "latency", f"{QUEUE_S * 1e3:g}ms")
            self.call_in(self.names[here], "tc", "qdisc", "replace", "dev", f"{device}{there}", "root", "tbf", *rate)
            way = (f"{self.addresses[there]}/32", "dev", f"{device}{there}", "src", self.addresses[here])
            self.call_in(self.names[here], "ip", "route", "replace", *way)
        if not link.latency_us:
            self._cut(a, b)

    def call_in(self, name: str, *command: str) -> str:
        return call("ip", "netns", "exec", name, *command)

    def _join(self, a: int, b: int) -> None:
        peer = ("peer", "name", f"v{a}", "netns", self.names[b])
        call("ip", "-n", self.names[a], "link", "add", f"v{b}", "type", "veth", *peer)
        for here, there in ((a, b), (b, a)):
            self._up(here, f"v{there}")

    def _up(self, host: int, device: str) -> None:
        self.call_in(self.names[host], "ip", "addr", "add", f"{self.addresses[host]}/32", "dev", device)
        self.call_in(self.names[host], "ip", "link", "set", device, "up")

    def _lay(self, a: int, b: int, latency_us: int) -> None:
        """A wire between two hosts that takes its time; one that lies there is replaced."""
        self._cut(a, b)
        ends = [self._tun(here, f"t{there}") for here, there in ((a, b), (b, a))]
        command = [sys.executable, "-S", str(WIRE), *map(str, ends), str(latency_us)]
        self._wires[a, b] = subprocess.Popen(command, pass_fds=ends, preexec_fn=lambda: os.setpriority(0, 0, -15))
        for end in ends:
            os.close(end)

    def _tun(self, host: int, device: str) -> int:
        """A TUN device of a host; the file by which its packets are read and written."""
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        made = f"d2t{os.getpid()}"
        fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", made.encode(), _IFF_TUN | _IFF_NO_PI))
        call("ip", "link", "set", "dev", made, "netns", self.names[host], "name", device)
        self._up(host, device)
        return end

    def _cut(self, a: int, b: int) -> None:
        wire = self._wires.pop((a, b), None)
        if wire is not None:
            wire.kill()  # the devices go with it
            wire.wait()


def _hold(name: str) -> subprocess.Popen[bytes]:
    inside = ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-c", _SETTLE, name]
    holder = subprocess.Popen(inside, stdout=subprocess.PIPE, start_new_session=True)
    assert holder.stdout is not None
    if not holder.stdout.readline():
        raise OSError(f"host {name} cannot be made")
    return holder


def sweep() -> None:
    """Remove the hosts of programs that are gone."""
    for line in call("ip", "netns", "list").splitlines():
        found = NAME.fullmatch(line.split()[0])
        if found and not psutil.pid_exists(int(found[1])):
            remove(line.split()[0])
            shutil.rmtree(f"/tmp/d2h{found[1]}", ignore_errors=True)


def remove(name: str) -> None:
    """End all that runs on a host, and the host."""
    with contextlib.suppress(subprocess.CalledProcessError):  # it may not have been made yet
        for pid in processes(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        call("ip", "netns", "del", name)


def processes(name: str) -> Iterator[int]:
    return map(int, call("ip", "netns", "pids", name).split())


def missing() -> str | None:
    """What this machine lacks for hosts; None where nothing."""
    if os.geteuid() != 0:
        return "root"
    tools = [tool for tool in ("ip", "tc", "unshare", "nsenter") if shutil.which(tool, path=_path()) is None]
    return tools[0] if tools else None if Path("/dev/net/tun").exists() else "/dev/net/tun"


def call(*command: str) -> str:
    """Run a tool to its end; what it printed."""
    env = {**os.environ, "PATH": _path()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
