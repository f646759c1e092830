"""How many workers a group has: what the cluster holds, waited for; and more of them, once there are any."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from scheduler.errors import CapacityError
from workers import control
from workers.contract import RunContext

POLL_S = 0.5
RECRUIT_S = 5.0  # between two looks for more workers
ANSWER_S = 1.0  # for a node to accept a connection
_LOG = logging.getLogger(__name__)


def resources_of(context: RunContext) -> dict[str, float]:
    """What one worker needs."""
    gpu = {"GPU": 1.0} if context.use_gpu else {}
    limit = None if context.use_gpu else context.worker_memory_bytes
    return {**gpu, **context.resources_per_worker, **({} if limit is None else {"memory": float(limit)})}


def muster(context: RunContext) -> int:
    """As many workers as the cluster holds, of those that the job wants; waits for them for `start_timeout_s`.

    Fewer than it wants are enough at the end of that time, or at once for a group that follows a lost one. Raises
    CapacityError where even the fewest do not fit.
    """
    spec, need = context.spec, resources_of(context)
    deadline = time.monotonic() + context.start_timeout_s
    while True:
        have = cluster()
        fit = _fitting(have, need)
        late = time.monotonic() > deadline
        if fit >= spec.workers or (fit >= spec.fewest_workers and (late or context.group > 0)):
            return min(fit, spec.workers)
        if late:
            fewest = spec.fewest_workers
            wanted = ", ".join(f"{amount * fewest:g} {name}" for name, amount in need.items())
            there = " + ".join(",".join(f"{node.get(name, 0):g} {name}" for name in need) for node in have)
            raise CapacityError(
                f"{fewest} workers need {wanted}, "
                f"but after {context.start_timeout_s:g} s the cluster has {there or 'no node'}.",
                code="cluster_too_small",
                param="workers",
                remedy="Ask for fewer workers or add nodes; a worker has to fit on one node.",
            )
        time.sleep(POLL_S)


class Recruiter:
    """While a group is smaller than the job wants: asks it to regroup once the cluster holds more."""

    def __init__(self, context: RunContext, size: int) -> None:
        self._context, self._size = context, size
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="recruiter", daemon=True)

    def __enter__(self) -> Recruiter:
        if self._size < self._context.spec.workers:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _look(self) -> None:
        need, run_dir = resources_of(self._context), self._context.run_dir
        while not self._over.wait(RECRUIT_S):
            if _fitting(cluster(), need) > self._size and control.asked(run_dir) is None:
                _LOG.info("the cluster holds more than %d workers: the group is asked to make room", self._size)
                control.ask(run_dir, control.REGROUP)
                return


def cluster() -> list[Mapping[str, float]]:
    """What every node of the cluster has.

    Ray believes in a lost node for a while longer, and a group started meanwhile waits for workers there until its time
    is up. So a node counts only where its raylet still takes a connection.
    """
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and _answers(node)]


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=ANSWER_S).close()
    except OSError:
        return False
    return True


def _fitting(have: Sequence[Mapping[str, float]], need: Mapping[str, float]) -> int:
    """How many workers fit; each has to fit on one node."""
    needed = [(name, amount) for name, amount in need.items() if amount > 0]
    return sum(int(min((node.get(name, 0) + 1e-9) / amount for name, amount in needed)) for node in have)
