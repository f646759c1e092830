"""One worker of a job whose heads are shared out evenly, whatever the links: the yardstick that no spec can ask for.

    python -m tests.cluster.even SPEC.json RANK INTERFACE CORE      (MASTER_ADDR, MASTER_PORT, WORLD_SIZE as torch's)

`Session` as in any job, without Ray: it profiles, trains in windows and folds, under a placement that is given. Rank 0
prints the windows as JSON.
"""

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from tests.workers.planners import ScriptedPlanner, even_heads
from workers.contract import JobSpec
from workers.profiling import keep_freed_memory
from workers.session import Place, Session
from workers.transport import Shared


def main():
    spec = JobSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
    rank, core = int(sys.argv[2]), int(sys.argv[4])
    os.environ["GLOO_SOCKET_IFNAME"] = sys.argv[3]
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", rank=rank)
    transport = Shared()
    planner = ScriptedPlanner(
        transport, lambda _: even_heads(planner.shape.num_blocks, planner.shape.num_heads, transport.size)
    )
    with tempfile.TemporaryDirectory() as folder:
        session = Session(spec, folder, transport, planner, None, Place(sharers=transport.size))
        session._evaluate = lambda when: 0.0
        session._export = lambda: None
        session.run()
    if rank == 0:
        print(json.dumps([asdict(seen) for seen in session.ledger.windows]))


if __name__ == "__main__":
    main()
