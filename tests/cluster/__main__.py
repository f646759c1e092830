"""A job over three hosts of this machine: links are measured, and the placement follows them.

    python -m tests.cluster [--rounds 2] [--steps 12] [--window 3] [--model d2ft_digits] [--parts links lost]

Three network namespaces with a Ray node each (`hosts`, `nodes`), one worker on each; workers 0, 1, 2 are pinned to
cores 0, 1, 1. Jobs run by the product's driver as on any cluster. All links have 1 Gbit/s at first; then the link over
which the plan sends most gets 100 Mbit/s and 20 ms, each way.

links    by round: the planned placement (`placement: auto`), the planner's best with split blocks (`placement: split`),
         and every block's heads shared out evenly among all three, which no spec can ask for (`even`)
lost     the node of host 2 is killed in the middle of a job that bears it (`min_workers: 2`)

Step seconds and forecast errors are the medians over a job's windows of training, as its ledger has them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import sys
from typing import Any

from tests.bench.report import publish, target
from tests.chaos.runs import end_tree
from tests.cluster.hosts import FAST, Hosts, Link, missing
from tests.cluster.nodes import Cluster, Run, even_split

CORES = (0, 1, 1)
SLOW = Link(100.0, 20_000)
TOLERANCE = 0.25  # of what tc is told: headers are part of its bytes, and workers' turns on a core of its times
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("links", "lost"), default=("links", "lost"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--window", type=int, default=3)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--model", default="d2ft_digits")
    args = parser.parse_args()
    if (lacks := missing()) is not None:
        raise SystemExit(f"Hosts cannot be made here: this needs {lacks}.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the hosts go as at any end
    rows: list[Row] = []
    targets: list[Row] = []
    with Hosts(len(CORES)) as hosts, Cluster(hosts) as cluster:
        for part in args.parts:
            more, others = {"links": links, "lost": lost}[part](cluster, args)
            rows += more
            targets += others
    load = "/".join(f"{each:.0f}" for each in os.getloadavg())
    publish("cluster", rows, targets, f"{args.model}, {args.micro_batches} × 16 images; load at the end {load}")


def links(cluster: Cluster, args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """The same job on fast links and with a slow one."""
    fast = Run(cluster, "fast-auto", CORES, **spec_of(args, "auto")).ended()
    pair = busiest(fast)
    jobs = [job_row(fast, "all fast", "auto", pair)]
    measured = link_rows(fast, {})
    cluster.hosts.shape(*pair, SLOW)
    for turn in range(args.rounds):
        for placement in ("auto", "split"):
            run = Run(cluster, f"slow-{placement}{turn}", CORES, **spec_of(args, placement)).ended()
            jobs.append(job_row(run, "one slow", placement, pair))
            measured += link_rows(run, {pair: SLOW})
        jobs.append(even_row(even_split(cluster, spec_of(args, "auto"), CORES)))
    cluster.hosts.shape(*pair, FAST)
    planned, split, even = (
        [job for job in jobs if (job["links"], job["placement"]) == ("one slow", kind)]
        for kind in ("auto", "split", "even")
    )
    slow = [row for row in measured if row["told ms"]]
    changed = sum(job["blocks on hosts"] != jobs[0]["blocks on hosts"] for job in planned)
    return [*measured, *jobs], [
        target("planned / even split: step", ratio(planned, even), "<=", 0.5),
        target("planned / planner's split: step", ratio(planned, split), "<=", 0.5),
        target("median forecast error, planned", statistics.median(j["forecast error"] for j in planned), "<=", 0.15),
        target("slow link, latency off by", off(slow, "ms"), "<=", TOLERANCE),
        target("slow link, bandwidth off by", off(slow, "Mbit/s"), "<=", TOLERANCE),
        target("jobs of which the placement changed with the link", changed, "==", args.rounds),
    ]


def lost(cluster: Cluster, args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """The job goes on with the others."""
    wanted = {"workers": {"min": 2, "max": 3}, "steps": 60, "checkpoint": {"every_s": None, "every_steps": 2}}
    run = Run(cluster, "lost", None, **{**spec_of(args, "auto"), **wanted})
    run.until(lambda: bool(run.steps()) and run.steps()[-1] >= 5)
    end_tree(cluster.nodes[2])
    run.ended()
    plans = [event["placement"]["owners"] for event in run.events("plan.created")]
    groups = [len({owner for row in rows for owner in row}) for rows in plans]
    why = [event["reason"] for event in run.events("phase") if event["name"] == "recovering"]
    sizes = " then ".join(map(str, groups))
    row = {"part": "lost", "workers": sizes, "steps": run.steps()[-1], "why": " | ".join(why)}
    return [row], [
        target("a node lost: steps made in the end", run.steps()[-1], "==", wanted["steps"]),
        target("a node lost: workers of the last group", groups[-1], "==", 2),
    ]


def spec_of(args: argparse.Namespace, placement: str) -> dict[str, Any]:
    return {
        "model": args.model,
        "placement": placement,
        "workers": len(CORES),
        "micro_batches": args.micro_batches,
        "steps": args.steps,
        "window": args.window,
        "checkpoint": {"every_s": None, "every_steps": max(1, args.window - 1)},
    }


def traffic(run: Run) -> dict[tuple[int, int], int]:
    """Bytes that a step of the first plan sends between two hosts, both ways."""
    sent = run.events("plan.created")[0]["forecast"]["link_bytes"]
    found = dict.fromkeys(itertools.combinations(range(len(CORES)), 2), 0)
    for a, b in itertools.permutations(range(len(sent)), 2):
        first, second = sorted((run.host_of(a), run.host_of(b)))
        found[first, second] += sent[a][b]
    return found


def busiest(run: Run) -> tuple[int, int]:
    sent = traffic(run)
    return max(sent, key=lambda pair: sent[pair])


def job_row(run: Run, links: str, placement: str, pair: tuple[int, int]) -> Row:
    owners = run.events("plan.created")[0]["placement"]["owners"]
    sent = traffic(run)[pair] / 1e6
    on = " ".join("+".join(map(str, sorted({run.host_of(owner) for owner in row}))) for row in owners)
    return {"links": links, "placement": placement, **of_windows(run.events("window")), "MB over that link": sent,
            "blocks on hosts": on}  # fmt: skip


def even_row(windows: list[Row]) -> Row:
    return {"links": "one slow", "placement": "even", **of_windows(windows), "MB over that link": "",
            "blocks on hosts": "0+1+2 each"}  # fmt: skip


def of_windows(windows: list[Row]) -> Row:
    """Medians over the windows of training."""
    seen = [(w["step_seconds_median"], w["forecast_seconds"]) for w in windows if w["window"] > 0]
    return {
        "step s": statistics.median(step for step, _ in seen),
        "forecast s": statistics.median(forecast for _, forecast in seen),
        "forecast error": statistics.median(abs(step / forecast - 1) for step, forecast in seen),
    }


def link_rows(run: Run, shaped: dict[tuple[int, int], Link]) -> list[Row]:
    """Told and measured, for both directions of all links."""
    rows = []
    for profile in run.profiles():
        for peer, link in enumerate(profile.links):
            if link is None:
                continue
            a, b = run.host_of(profile.rank), run.host_of(peer)
            told = shaped.get((min(a, b), max(a, b)), FAST)
            rows.append({
                "job": run.name, "from host": a, "to host": b,
                "told ms": told.latency_us / 1e3, "measured ms": link.latency_us / 1e3,
                "told Mbit/s": told.mbit_s, "measured Mbit/s": link.bytes_per_s * 8 / 1e6,
            })  # fmt: skip
    return rows


def off(rows: list[Row], what: str) -> float:
    """Median over the rows of how far measured is from told."""
    return statistics.median(abs(row[f"measured {what}"] / row[f"told {what}"] - 1) for row in rows)


def ratio(mine: list[Row], others: list[Row]) -> float:
    """Of step seconds, of jobs that follow each other; the median over the rounds."""
    return statistics.median(a["step s"] / b["step s"] for a, b in zip(mine, others, strict=True))


if __name__ == "__main__":
    main()
