"""Runs of the driver on a Ray of their own, for chaos: started, watched, hurt, and read afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from scheduler import failpoints
from tests.service.conftest import free_port
from workers.contract import JobSpec, RunContext
from workers.events import read_events
from workers.pulse import accounts

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 40, 5
SPEC = {
    "steps": STEPS,
    "window": 1000,
    "workers": 2,
    "checkpoint": {"every_s": None, "every_steps": EVERY, "keep": 1000},
    "method": {"budgets": {"compute": 0.6}},
}
POLL_S = 0.05
RUN_TIMEOUT_S = 240.0


class Run:
    """One driver and what it leaves in its folder."""

    def __init__(
        self, ray: Ray, name: str, *, resume_from: Path | None = None,
        fail: str | None = None, cpus_each: float = 0.5, **spec: Any,
    ) -> None:  # fmt: skip
        self.folder = ray.home / name
        self.run_dir = self.folder / "run"
        self.run_dir.mkdir(parents=True)
        self.context = RunContext(
            job_id=name,
            spec=JobSpec.model_validate({**SPEC, **spec}),
            run_dir=str(self.run_dir),
            storage_path=str(self.folder),
            resources_per_worker={"CPU": cpus_each},
            cores=(0, 1) if spec.get("workers", 2) == 2 and (os.cpu_count() or 1) > 1 else None,
            resume_from=None if resume_from is None else str(resume_from),
        )
        (self.folder / "context.json").write_text(self.context.model_dump_json())
        env = {**os.environ, **ray.env, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "OMP_NUM_THREADS": "1"}
        env["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        if fail is not None:
            (self.folder / "once").mkdir()
            env |= {failpoints.VARIABLE: fail, failpoints.DIRECTORY: str(self.folder / "once")}
        command = [sys.executable, "-m", "workers.loop", "--context", str(self.folder / "context.json")]
        with (self.folder / "driver.txt").open("wb") as output:
            self.driver = subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=output)

    def until(self, done: Callable[[], bool], timeout_s: float = RUN_TIMEOUT_S) -> None:
        """Wait until `done`, or until the driver has ended."""
        deadline = time.monotonic() + timeout_s
        while not done() and self.driver.poll() is None:
            if time.monotonic() > deadline:
                self.driver.kill()
                raise TimeoutError(f"{self.folder.name}: nothing for {timeout_s:g} s\n{self.printed()}")
            time.sleep(POLL_S)

    def ended(self) -> Run:
        self.until(lambda: False)
        return self

    def until_step(self, step: int) -> None:
        self.until(lambda: bool(self.steps()) and self.steps()[-1] >= step)

    def strike(self, rank: int, number: int) -> float:
        """Send a signal to a worker; the time of it."""
        (account,) = [each for each in accounts(self.run_dir) if each.rank == rank]
        os.kill(account.pid, number)
        return time.time()

    def events(self, wanted: str) -> list[dict[str, Any]]:
        found = (event for _, event in read_events(self.run_dir / "events.jsonl", 0))
        return [event for event in found if event["type"] == wanted]

    def steps(self) -> list[int]:
        return [event["data"]["step"] for event in self.events("metrics")]

    def losses(self) -> dict[int, float]:
        """By step; of a step that was made twice the later."""
        return {event["data"]["step"]: event["data"]["loss"] for event in self.events("metrics")}

    def owners(self) -> list[list[int]]:
        """The workers that own heads, of every group's first plan."""
        plans = [event["data"]["placement"]["owners"] for event in self.events("plan.created")]
        return [sorted({owner for row in rows for owner in row}) for rows in plans]

    def repeated(self) -> bool:
        """Whether steps that were made twice had the same loss both times."""
        seen: dict[int, float] = {}
        told = [(event["data"]["step"], event["data"]["loss"]) for event in self.events("metrics")]
        return all(seen.setdefault(step, loss) == loss for step, loss in told)

    def steps_at(self, step: int) -> float:
        """When a step had ended, the first time."""
        return float(next(event["at"] for event in self.events("metrics") if event["data"]["step"] == step))

    def recovering_after(self, moment: float) -> float:
        """Seconds from a moment until the driver said that the group is lost."""
        return self.phase_after(moment, "recovering")

    def phase_after(self, moment: float, name: str) -> float:
        """Seconds from a moment to the next announcement of a phase."""
        later = [each["at"] for each in self.events("phase") if each["data"]["name"] == name and each["at"] > moment]
        return min(later, default=float("inf")) - moment

    def first_step_after(self, moment: float) -> float:
        """Seconds from a moment to the first step of a new group."""
        recovered = [event["at"] for event in self.events("phase") if event["data"]["name"] == "recovering"]
        if not recovered:
            return float("inf")
        later = [event["at"] for event in self.events("metrics") if event["at"] > max(recovered)]
        return min(later, default=float("inf")) - moment

    @property
    def outcome(self) -> str:
        told = self.events("outcome")
        return str(told[-1]["data"]["status"]) if told else "none"

    @property
    def weights(self) -> str:
        """SHA-256 of the result, or where there is none a word that equals nothing."""
        path = self.run_dir / "result" / "model.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else f"none of {self.folder}"

    @property
    def vault(self) -> Path:
        return Path(self.context.vault_dir)

    def printed(self) -> str:
        return (self.folder / "driver.txt").read_text(errors="replace")[-3000:]


class Ray:
    """A Ray on this machine with a token of its own: a head, and more nodes where they are wanted."""

    def __init__(self, home: Path, cpus: int) -> None:
        self.home, self.address = home, f"127.0.0.1:{free_port()}"
        self.env = {
            "RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip
        self.nodes: list[subprocess.Popen[bytes]] = []
        port = self.address.rpartition(":")[2]
        self._start("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={home / 'r'}", cpus=cpus)

    def add_node(self, cpus: int) -> subprocess.Popen[bytes]:
        """Another node, on the same machine."""
        return self._start(f"--address={self.address}", cpus=cpus)

    def cpus(self) -> float:
        """What all nodes together have."""
        code = "import ray; ray.init(logging_level='ERROR'); print(ray.cluster_resources().get('CPU', 0))"
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **self.env}, capture_output=True, text=True, timeout=60
        )
        return float(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.split() else 0.0

    def close(self) -> None:
        for node in reversed(self.nodes):
            end_tree(node)

    def _start(self, *flags: str, cpus: int) -> subprocess.Popen[bytes]:
        before = self.cpus() if self.nodes else 0.0
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        log = self.home / f"ray{len(self.nodes)}.txt"
        with log.open("wb") as output:
            node = subprocess.Popen(
                [*command, f"--num-cpus={cpus}", *flags], env={**os.environ, **self.env, "RAY_ADDRESS": ""},
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        self.nodes.append(node)
        deadline = time.monotonic() + 60
        while self.cpus() < before + cpus:
            if node.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"Ray does not come up: {log.read_text()[-2000:]}")
        return node


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for each in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


@contextlib.contextmanager
def ray_here(cpus: int = 2) -> Iterator[Ray]:
    """A Ray and a folder for its runs; both are gone afterwards."""
    home = Path(tempfile.mkdtemp(prefix="d2c", dir="/tmp"))
    ray = Ray(home, cpus)
    try:
        yield ray
    finally:
        ray.close()
        shutil.rmtree(home, ignore_errors=True)
