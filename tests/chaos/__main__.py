"""All chaos, one table after another, and one file of targets: `make chaos`, about 40 minutes on two cores."""

from __future__ import annotations

import argparse

from tests.bench.report import publish
from tests.chaos import api, control, damage, training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="kills of a worker")
    parser.add_argument("--kills", type=int, default=20, help="of the planner's actor")
    parser.add_argument("--rounds", type=int, default=5, help="of each failpoint and action of the API")
    parser.add_argument("--store", action="append", choices=["sqlite", "postgres"])
    given = parser.parse_args()
    parts = [
        damage.rows_and_targets(),
        training.rows_and_targets(given.seeds),
        control.rows_and_targets(given.kills),
        api.rows_and_targets(given.rounds, given.store or ["sqlite"]),
    ]
    publish("chaos", [row for rows, _ in parts for row in rows], [each for _, targets in parts for each in targets])


if __name__ == "__main__":
    main()
