"""A Ray with a node on every host, and runs of the driver on it: started, watched, hurt, and read afterwards."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scheduler.domain import DeviceProfile
from tests.chaos.runs import end_tree
from tests.cluster.hosts import Hosts
from workers.contract import JobSpec, RunContext
from workers.events import read_events

ROOT = Path(__file__).parents[2]
PORT, EVEN_PORT = 6379, 29500
POLL_S = 0.1
START_TIMEOUT_S = 120.0
RUN_TIMEOUT_S = 600.0
_CPUS = "import ray; ray.init(logging_level='ERROR'); print(ray.cluster_resources().get('CPU', 0))"


class Cluster:
    """A head on host 0 and a node on each other one, each with room for one worker; a context manager."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts, self.home = hosts, hosts.home
        self._token = secrets.token_hex(32)
        self.nodes: list[subprocess.Popen[bytes]] = []
        try:
            for host in range(len(hosts.names)):
                self.nodes.append(self._start(host))
                self._await(host + 1)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for node in reversed(self.nodes):
            end_tree(node)

    def env(self, host: int) -> dict[str, str]:
        """What processes on a host see."""
        mine = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return mine | {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
            "RAY_ADDRESS": f"{self.hosts.addresses[0]}:{PORT}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token,
            "RAY_TMPDIR": str(self.home / str(host)), "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        }  # fmt: skip

    def start(self, host: int, name: str, *command: str) -> subprocess.Popen[bytes]:
        """A program of ours on a host."""
        return self.hosts.start(host, [sys.executable, *command], self.env(host), self.home / f"{name}.txt")

    def printed(self, name: str) -> str:
        return (self.home / f"{name}.txt").read_text(errors="replace")[-3000:]

    def _start(self, host: int) -> subprocess.Popen[bytes]:
        """Every host has its own ports, so that Ray's usual ones will do."""
        own = self.hosts.addresses[host]
        where = ("--head", f"--port={PORT}", "--include-dashboard=false") if host == 0 else (f"--address={self._head}",)
        flags = (
            f"--node-ip-address={own}", f"--temp-dir={self.home / str(host)}", f"--labels=host={host}",
            "--num-cpus=1", "--num-gpus=0", f"--object-store-memory={200 << 20}", "--disable-usage-stats",
        )  # fmt: skip
        return self.start(host, f"node{host}", "-m", "ray.scripts.scripts", "start", "--block", *where, *flags)

    @property
    def _head(self) -> str:
        return f"{self.hosts.addresses[0]}:{PORT}"

    def _await(self, count: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._cpus() < count:
            if self.nodes[-1].poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"node {count - 1} does not come up: {self.printed(f'node{count - 1}')}")

    def _cpus(self) -> float:
        """Of all nodes together, as the head knows them."""
        (self.home / "cpus.txt").unlink(missing_ok=True)
        asked = self.start(0, "cpus", "-c", _CPUS)
        try:
            asked.wait(timeout=20)
        except subprocess.TimeoutExpired:
            end_tree(asked)
        told = self.printed("cpus").split()
        return float(told[-1]) if asked.returncode == 0 and told else 0.0


class Run:
    """One job: its driver on the head's host, and what it leaves in its folder, which all hosts see."""

    def __init__(self, cluster: Cluster, name: str, cores: tuple[int, ...] | None, **spec: Any) -> None:
        self.cluster, self.name = cluster, name
        self.run_dir = cluster.home / "runs" / name
        self.run_dir.mkdir(parents=True)
        context = RunContext(
            job_id=name,
            spec=JobSpec.model_validate(spec),
            run_dir=str(self.run_dir),
            storage_path=str(self.run_dir / "ray"),
            resources_per_worker={"CPU": 1.0},
            cores=cores,
        )
        self._vault = Path(context.vault_dir)
        file = self.run_dir / "context.json"
        file.write_text(context.model_dump_json())
        self.driver = cluster.start(0, name, "-m", "workers.loop", "--context", str(file))

    def until(self, done: Callable[[], bool], timeout_s: float = RUN_TIMEOUT_S) -> None:
        """Wait until `done`, or until the driver has ended."""
        deadline = time.monotonic() + timeout_s
        while not done() and self.driver.poll() is None:
            if time.monotonic() > deadline:
                end_tree(self.driver)
                raise TimeoutError(f"{self.name}: nothing for {timeout_s:g} s\n{self.printed()}")
            time.sleep(POLL_S)

    def ended(self) -> Run:
        self.until(lambda: False)
        if self.outcome != "succeeded":
            raise RuntimeError(f"{self.name}: {self.outcome}\n{self.printed()}")
        return self

    def events(self, wanted: str) -> list[dict[str, Any]]:
        path = self.run_dir / "events.jsonl"
        found = (event for _, event in read_events(path, 0)) if path.exists() else ()
        return [event["data"] for event in found if event["type"] == wanted]

    def steps(self) -> list[int]:
        return [event["step"] for event in self.events("metrics")]

    @property
    def outcome(self) -> str:
        told = self.events("outcome")
        return str(told[-1]["status"]) if told else "none"

    def profiles(self) -> list[DeviceProfile]:
        """What the workers measured of themselves and of their links, by rank, as the newest checkpoint has it."""
        newest = max(self._vault.glob("step-*/plan.json"))
        return [DeviceProfile.from_dict(each) for each in json.loads(newest.read_text())["profiles"]]

    def printed(self) -> str:
        return self.cluster.printed(self.name)

    def host_of(self, rank: int) -> int:
        return int(self.profiles()[rank].labels["host"])


def even_split(cluster: Cluster, spec: dict[str, Any], cores: tuple[int, ...]) -> list[dict[str, Any]]:
    """The windows of the same job on the same hosts without Ray, every block's heads shared out evenly (`even`)."""
    file, hosts = cluster.home / "even.json", cluster.hosts
    file.write_text(JobSpec.model_validate(spec).model_dump_json())
    workers = []
    for host, core in enumerate(cores):
        env = {"MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": str(EVEN_PORT), "WORLD_SIZE": str(len(cores))}
        device = f"v{(host + 1) % len(cores)}"  # any of the host's: they have one address
        command = [sys.executable, "-m", "tests.cluster.even", str(file), str(host), device, str(core)]
        output = cluster.home / f"even{host}.txt"
        output.unlink(missing_ok=True)
        workers.append(hosts.start(host, command, cluster.env(host) | env, output))
    try:
        for host, worker in enumerate(workers):
            if worker.wait(timeout=RUN_TIMEOUT_S):
                raise RuntimeError(f"even split, host {host}: {cluster.printed(f'even{host}')}")
    finally:
        for worker in workers:
            end_tree(worker)
    found: list[dict[str, Any]] = json.loads((cluster.home / "even0.txt").read_text().splitlines()[-1])
    return found
