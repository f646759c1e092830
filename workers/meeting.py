"""Where the workers of a group meet: a backend of Ray Train that only says so, and loads no torch.

Ray's own backend for torch makes the process group from the controller, and so has driver and controller load torch.
This one tells every worker the address of rank 0, as torch's `env://` reads it; the group is made by the workers
themselves (`rank`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig


@dataclass
class Meeting(BackendConfig):
    """The configuration: nothing is to be chosen."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Place


class _Place(Backend):
    share_cuda_visible_devices = True  # NCCL joins workers of one machine only where each sees the others' devices

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Tell the workers where rank 0 waits; a free port is found on its node."""
        address, port = worker_group.execute_single(0, get_address_and_port)
        told = [
            worker_group.execute_single_async(rank, _remember, address=address, port=port)
            for rank in range(len(worker_group))
        ]
        ray.get(told)


def _remember(address: str, port: int) -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
