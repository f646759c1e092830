"""Where the workers of a group meet: a trainer of Ray Train with a backend that only says so, and loads no torch.

Ray's own backend for torch makes the process group from the controller, and so has driver and controller load torch.
This one tells every worker the address of rank 0, as torch's `env://` reads it; the group is made by the workers
themselves (`rank`). Two helpers of Ray Train are left out, each a process that takes two seconds of the group's start:
the one that hands out Ray's own datasets, and the one that gives back the devices of a controller that died, which Ray
itself does for a controller that is no detached actor.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

_UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)


class Trainer(DataParallelTrainer):
    """Ray Train's trainer with the helpers that a group of ours needs."""

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, _UNUSED)]


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
