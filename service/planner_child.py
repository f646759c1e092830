"""The process in which dry runs are planned: one request a line on stdin, one answer a line on stdout, both JSON.

It imports the planner and nothing else, and ends with its stdin. Whatever else is printed here goes to stderr, which
is a log: solvers talk.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

from scheduler.errors import D2ftError, SystemFault
from scheduler.whatif import what_if


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(_answer(line)) + "\n")
        answers.flush()


def _answer(line: str) -> dict[str, Any]:
    try:
        return {"answer": what_if(json.loads(line))}
    except D2ftError as error:
        return {"error": error.to_dict()}
    except Exception:
        # One bad request must not cost the next one its warm process.
        traceback.print_exc()
        return {"error": SystemFault("The planner failed on this request.", code="planner_failed").to_dict()}


if __name__ == "__main__":
    main()
