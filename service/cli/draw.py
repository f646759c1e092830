"""Draws plans: forecast, workers, op table and Gantt chart.

    b03     w0 h0-5 FFOSF   w1 h6-8 FFFSF h9 OOOSO     one line per block, heads grouped by owner and ops
    w0 ####|fffffffsffbbbbb··bb                       one line per worker, what it mostly did in each cell

Letters say everything, colours only underline it. What a plan lacks is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.text import Text

from service.cli.talk import is_number, line, make_table, out, percent, put, put_table

OP_STYLES = {"F": "green", "O": "yellow", "S": "dim"}
OP_NAMES = {"F": "FULL", "O": "FORWARD", "S": "SKIP"}
PLAIN_WIDTH = 120  # no terminal to fit into
NUM_REASONS = 3

# kind of a span → letter; whatever else a worker does is the trunk's
_LETTERS = {"fwd": "f", "bwd": "b", "sum": "+", "send": "s", "recv": "s", "wait": "·"}
_TRUNK = "t"
_CELL_STYLES = {"f": "green", "b": "blue", "+": "cyan", "s": "magenta", "·": "dim", _TRUNK: "yellow"}
_LEGEND = "f forward, b backward, + sum, s send or receive, t trunk and update, · waits"


def put_plan(found: dict[str, Any]) -> None:
    """A plan with all that is known of it, as a dry run answers or as a job's plan says itself."""
    plan = found.get("plan") or found
    _put_forecast(plan, found)
    _put_workers(plan, found.get("devices") or [])
    _put_ops(plan)
    if found.get("gantt"):
        _put_gantt("one step", found["gantt"], found["gantt"].get("step_us") or 0)
        put(_LEGEND)


def put_timeline(forecast: dict[str, Any] | None, measured: dict[str, Any] | None) -> None:
    """A job's step as forecast above one as measured, over the same time."""
    charts = {"forecast": forecast, f"measured in step {(measured or {}).get('step')}": measured}
    end_us = max((chart.get("step_us") or 0 for chart in charts.values() if chart), default=0)
    for name, chart in charts.items():
        if chart:
            _put_gantt(name, chart, end_us)
    if forecast or measured:
        put(_LEGEND)


def put_reasons(heads: Sequence[Sequence[dict[str, Any]]], chosen: Iterable[tuple[int, int]]) -> None:
    """Why these heads are where they are and do what they do."""
    for block, head in chosen:
        told = heads[block][head]
        put(f"b{block}.h{head}  w{told.get('owner')} {told.get('ops')}  {line(str(told.get('reason', '')))}")


def telling_heads(heads: Sequence[Sequence[dict[str, Any]]]) -> list[tuple[int, int]]:
    """A few heads whose reasons differ: of every kind of op word the worthiest, kinds by how often they come."""
    kinds: dict[str, list[tuple[int, int]]] = {}
    for block, row in enumerate(heads):
        for head, told in enumerate(row):
            kinds.setdefault("".join(sorted(set(told.get("ops", "")))), []).append((block, head))
    often = sorted(kinds.values(), key=len, reverse=True)[:NUM_REASONS]
    return [max(places, key=lambda place: heads[place[0]][place[1]].get("worth", 0)) for places in often]


def _put_forecast(plan: dict[str, Any], found: dict[str, Any]) -> None:
    forecast, full = plan.get("forecast") or {}, plan.get("all_full") or {}
    placed, selected = plan.get("placement_report") or {}, plan.get("selection_report") or {}
    put(f"plan      version {plan.get('version')}, window {plan.get('window')}")
    put(f"compute   {percent(plan.get('compute_fraction'))} of all-FULL")
    put(f"bytes     {percent(plan.get('bytes_fraction'))} of all-FULL")
    if "step_us" in forecast:
        beside = f", all-FULL {full['step_us'] / 1e3:.1f} ms" if "step_us" in full else ""
        idle = percent(forecast.get("idle_share"))
        put(f"step      {forecast['step_us'] / 1e3:.1f} ms forecast{beside}, idle {idle}")
    for label, report in (("placement", placed), ("selection", selected)):
        if report:
            note = f", {line(str(report['note']))}" if report.get("note") else ""
            put(f"{label} {report.get('method')}: {report.get('status')}, gap {percent(report.get('gap'))}{note}")
    if is_number(found.get("rounding_loss")):
        put(f"rounding  {percent(found['rounding_loss'])} lost by whole heads")


def _put_workers(plan: dict[str, Any], devices: Sequence[dict[str, Any]]) -> None:
    """Heads and share of each worker; of a dry run also its speed, memory, and what binds it."""
    owners = (plan.get("placement") or {}).get("owners") or []
    if not owners:
        return
    workers = range(plan["placement"].get("num_workers") or max(map(max, owners)) + 1)
    shares = [_op_counts(plan, lambda owner, w=worker: owner == w) for worker in workers]  # type: ignore[misc]
    counts = Counter(owner for row in owners for owner in row)
    busy_us = (plan.get("forecast") or {}).get("busy_us") or [None] * len(workers)
    speeds = _speeds(shares, busy_us)
    table = make_table(
        "worker", "device", "heads", "share", "FULL", "FORWARD", "SKIP", "busy", "speed", "memory", "bound by"
    )
    for worker in workers:
        device = devices[worker] if worker < len(devices) else {}
        total = sum(shares[worker].values())
        table.add_row(
            f"w{worker}",
            line(str(device.get("name", ""))),
            str(counts[worker]),
            percent(counts[worker] / sum(counts.values())),
            *(percent(shares[worker][letter] / total) if total else "" for letter in "FOS"),
            f"{busy_us[worker] / 1e3:.1f} ms" if is_number(busy_us[worker]) else "",
            "" if speeds[worker] is None else f"{speeds[worker]:.2f}",
            _memory(device, plan.get("memory_bytes") or [], worker),
            str(device.get("binding", "")),
        )
    put_table(table)
    for device in devices:
        if device.get("note"):
            put(f"w{device.get('rank')}: {device.get('binding')}: {line(str(device['note']))}")


def _speeds(shares: Sequence[Counter[str]], busy_us: Sequence[Any]) -> list[float | None]:
    """Work done per busy second, against the fastest worker's: a FULL op is three passes, a FORWARD op one."""
    rates = [
        (3 * share["F"] + share["O"]) / us if is_number(us) and us > 0 else None
        for share, us in zip(shares, busy_us, strict=True)
    ]
    best = max((rate for rate in rates if rate), default=None)
    return [rate / best if best and rate else None for rate in rates]


def _op_counts(plan: dict[str, Any], owned: Callable[[int], bool]) -> Counter[str]:
    """How often the heads of an owner do each op over the cycle."""
    owners = plan["placement"]["owners"]
    counts: Counter[str] = Counter()
    for table in plan.get("cycle") or []:
        for row, words in zip(owners, table, strict=False):
            for owner, word in zip(row, words, strict=False):
                if owned(owner):
                    counts.update(word)
    return counts


def _memory(device: dict[str, Any], planned: Sequence[Any], worker: int) -> str:
    """The most that a worker holds, of what its device may, where that is known."""
    need, limit = device.get("memory_bytes"), device.get("memory_limit_bytes")
    if need is None and worker < len(planned):
        need = planned[worker]
    if not is_number(need):
        return ""
    return f"{need / 1e9:.2f}{f' of {limit / 1e9:.3g}' if is_number(limit) else ''} GB"  # type: ignore[operator]


def _put_ops(plan: dict[str, Any]) -> None:
    """The op table of the cycle's first step; blocks that are alike share a line."""
    owners, cycle = (plan.get("placement") or {}).get("owners") or [], plan.get("cycle") or []
    if not owners or not cycle:
        return
    width = _width() - 12
    lines = [_block_line(row, words, width) for row, words in zip(owners, cycle[0], strict=False)]
    step = f"step 1 of the cycle's {len(cycle)}" if len(cycle) > 1 else "every step"
    micro_batches = len(cycle[0][0][0]) if cycle[0] and cycle[0][0] else 0
    put(f"ops of {step}, one letter per micro-batch ({micro_batches}): F FULL, O FORWARD, S SKIP")
    for text, blocks in _alike(lines):
        name = f"b{blocks[0]:02}" + (f"-b{blocks[-1]:02}" if len(blocks) > 1 else "")
        label = Text(f"{name:10}")
        label.append_text(_coloured(text))
        out.print(label)


def _alike(lines: Sequence[list[str]]) -> Iterator[tuple[list[str], list[int]]]:
    """Runs of neighbouring blocks with the same line."""
    for text, group in groupby(range(len(lines)), key=lambda block: lines[block]):
        yield text, list(group)


def _block_line(owners: Sequence[int], words: Sequence[str], width: int) -> list[str]:
    """A block's heads by owner: every run of heads with its ops; where that is too wide, counts, or shares."""
    teams = {owner: [h for h, o in enumerate(owners) if o == owner] for owner in sorted(set(owners))}
    for spell in (_runs, _groups, _shares):
        text = [part for owner, heads in teams.items() for part in (f" w{owner}", *spell(heads, words))]
        if sum(len(part) + 1 for part in text) <= width:
            break
    return text


def _runs(heads: Sequence[int], words: Sequence[str]) -> list[str]:
    parts: list[str] = []
    for word, group in groupby(_neighbours(heads, words), key=lambda item: item[0]):
        run = [head for _, head in group]
        parts += [f"h{run[0]}" + (f"-{run[-1]}" if len(run) > 1 else ""), word[0]]
    return parts


def _neighbours(heads: Sequence[int], words: Sequence[str]) -> list[tuple[tuple[str, int], int]]:
    """((ops, number of the run of heads without a gap), head)."""
    return [((words[head], head - place), head) for place, head in enumerate(heads)]


def _groups(heads: Sequence[int], words: Sequence[str]) -> list[str]:
    counts = Counter(words[head] for head in heads)
    return [part for word, count in counts.most_common() for part in (f"{count}×", word)]


def _shares(heads: Sequence[int], words: Sequence[str]) -> list[str]:
    counts = Counter("".join(words[head] for head in heads))
    total = sum(counts.values()) or 1
    return [
        f"{len(heads)}h",
        *(f"{OP_NAMES[letter]} {counts[letter] / total:.0%}" for letter in "FOS" if counts[letter]),
    ]


def _coloured(parts: Sequence[str]) -> Text:
    text = Text()
    for part in parts:
        if set(part) <= set(OP_STYLES):
            for letter in part:
                text.append(letter, OP_STYLES[letter])
        else:
            text.append(part, "bold" if part.startswith(" w") else "")
        text.append(" ")
    text.rstrip()
    return text


def _put_gantt(name: str, gantt: dict[str, Any], end_us: int) -> None:
    """A step as one line per worker, over a time axis that ends at `end_us`."""
    workers = gantt.get("workers") or []
    if not end_us or not workers:
        return
    width = min(_width(), 2 * PLAIN_WIDTH) - 6
    put(f"{name}, {(gantt.get('step_us') or 0) / 1e3:.1f} ms")
    for worker, rows in enumerate(workers):
        text = Text(f"w{worker:<3} ")
        for cell in gantt_cells(rows, end_us, width):
            text.append(cell, _CELL_STYLES.get(cell, ""))
        text.rstrip()
        out.print(text)
    put("     " + _axis(end_us, width))


def gantt_cells(rows: Sequence[Sequence[Any]], end_us: int, width: int) -> str:
    """One letter per cell of time: what took most of it; a blank after the worker's last span."""
    spent: list[Counter[str]] = [Counter() for _ in range(width)]
    for begin_us, finish_us, what, *_ in rows:
        letter = _LETTERS.get(str(what), _TRUNK)
        first, last = begin_us * width // end_us, min(width - 1, (finish_us * width - 1) // end_us)
        for cell in range(first, last + 1):
            left, right = cell * end_us / width, (cell + 1) * end_us / width
            spent[cell][letter] += max(0.0, min(finish_us, right) - max(begin_us, left))  # type: ignore[assignment]
    return "".join(max(cell, key=lambda letter: cell[letter]) if cell else " " for cell in spent)


def _axis(end_us: int, width: int) -> str:
    """Marks at quarters of the step, in ms."""
    axis = [" "] * width
    for quarter in range(5):
        mark = f"{end_us * quarter / 4e3:.4g}"
        at = min(width * quarter // 4, width - len(mark))
        axis[at : at + len(mark)] = mark
    return "".join(axis).rstrip() + " ms"


def _width() -> int:
    return out.width if out.is_terminal else PLAIN_WIDTH
