"""A planner process that does what the request's seed says: 1 dies, 2 hangs, 3 refuses, 4 is slow, 5 babbles."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

HANG_S = 600
SLOW_S = 0.2


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(request)), flush=True)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    seed = request["plan"]["seed"]
    if seed == 1:
        os._exit(9)
    if seed == 2:
        time.sleep(HANG_S)
    if seed == 3:
        error = {"code": "memory", "fault": "user", "message": "worker 0 needs 1.9 GB more.", "param": "records.0.kind"}
        return {"error": error}
    if seed == 4:
        time.sleep(SLOW_S)
    if seed == 5:
        print("this is no JSON", flush=True)
    return {"answer": {"plan": {"version": 1}, "asked": request, "pid": os.getpid()}}


if __name__ == "__main__":
    main()
