"""The judge of `scheduler.timing`: the same rules by plain search over all workers and lanes; it remembers nothing."""

from __future__ import annotations

from scheduler.timing import duration_us
from scheduler.transfers import message_bytes

FOLLOW = ("sum", "send", "free")


def play_plainly(workers, costs, max_in_flight=None):
    """(order, begins, ends, link bytes, peak bytes), each by worker."""
    count, most = len(workers), max(map(len, workers))
    left = [[list(lane) for lane in lanes] for lanes in workers]
    now, kept, peak = [0] * count, [0] * count, [0] * count
    order, begins = [[] for _ in workers], [[] for _ in workers]
    free, sent, arrival = {}, [[0] * count for _ in workers], {}
    while any(lane for lanes in left for lane in lanes):
        lowest = next(n for n in range(most) if any(n < len(lanes) and lanes[n] for lanes in left))
        open_lanes = range(lowest, lowest + (max_in_flight or most))
        ready = []
        for w, lanes in enumerate(left):
            for n in (n for n in open_lanes if n < len(lanes) and lanes[n]):
                first = lanes[n][0]
                at = arrival.get(first.key(w)) if first.kind == "recv" else 0
                if at is not None:
                    ready.append((max(now[w], at), w, n))
        start, w, n = min(ready)
        now[w], lane = start, left[w][n]
        while True:
            i = lane.pop(0)
            order[w].append(i)
            begins[w].append(now[w])
            now[w] += duration_us(costs, w, i)
            if i.kind == "send":
                size = message_bytes(i, costs.shape, costs.step)
                begin = max(now[w], free.get((w, i.peer), 0))
                arrival[i.key(w)] = begin + costs.transfer_us(w, i.peer, size)
                free[w, i.peer] = arrival[i.key(w)] - costs.transfer_us(w, i.peer, 0)
                sent[w][i.peer] += size
            elif i.kind in ("fwd", "bwd") and i.full:
                size = costs.kept_bytes(i.part, len(i.full))
                kept[w] += size if i.kind == "fwd" else 0
                peak[w] = max(peak[w], kept[w] + costs.rerun_bytes(i.part, len(i.full)))
                kept[w] -= size if i.kind == "bwd" else 0
            if not lane or lane[0].kind not in FOLLOW:
                break
    return order, begins, now, sent, peak
