"""Commands about plans: `plan` shows a job's, or one that nobody runs, `timeline` a step of it, `devices` for whom."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from service.cli import draw, talk
from service.cli.frame import (
    Bytes,
    Compute,
    Grain,
    Hold,
    ImgSize,
    JobId,
    Json,
    MicroBatches,
    MicroBatchSize,
    Model,
    ModelArg,
    PlacementMode,
    Precision,
    Ratios,
    Recompute,
    Schedule,
    Score,
    Seed,
    Strategy,
    Url,
    Wire,
    command,
    connected,
)
from service.cli.request import preview_body
from service.client import Client
from service.schemas import Device, Preview

_HEAD = re.compile(r"b(\d+)\.h(\d+)")


@command()
def plan(
    job: Annotated[str | None, typer.Argument(metavar="JOB", help="Show this job's newest plan.")] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="Invented devices, like '2x fast:24GB@node1'; may be repeated.")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Plan for the devices that jobs have measured.")] = False,
    link: Annotated[str | None, typer.Option(help="Link between nodes, like 1Gbps or 10Gbps/50us.")] = None,
    model: Model = None,
    img_size: ImgSize = None,
    model_arg: ModelArg = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of the dataset.")] = None,
    ratios: Ratios = None,
    compute: Compute = None,
    bytes_: Bytes = None,
    schedule: Schedule = None,
    strategy: Strategy = None,
    hold: Hold = None,
    grain: Grain = None,
    score: Score = None,
    micro_batches: MicroBatches = None,
    micro_batch_size: MicroBatchSize = None,
    precision: Precision = None,
    wire: Wire = None,
    recompute: Recompute = None,
    placement: PlacementMode = None,
    seed: Seed = None,
    why: Annotated[list[str] | None, typer.Option(help="Say why of this head, like b3.h2; may be repeated.")] = None,
    reasons: Annotated[bool, typer.Option("--reasons", help="Say why of every head.")] = False,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Show the newest plan of a job; or without JOB, the plan that one would get on --device or --live."""
    flags = {**locals(), "bytes": bytes_}
    with connected(url) as client:
        if job is not None:
            _show_of_job(client, job, flags)
        else:
            found = client.plans(preview_body(flags))
            talk.put_json(found) if json_ else _show(found, why or [], reasons)


@command()
def timeline(job: JobId, url: Url = None, json_: Json = False) -> None:
    """Show what every worker of a job does in a step: as forecast, and as it was measured last."""
    with connected(url) as client:
        found = client.timeline(job)
    if json_:
        talk.put_json(found)
        return
    draw.put_timeline(found.forecast, found.measured)
    if found.measured is None:
        talk.say("No step has been measured yet, or its chart would be too large.")


@command()
def devices(url: Url = None, json_: Json = False) -> None:
    """List the devices that jobs have measured."""
    with connected(url) as client:
        found = client.devices()
    if json_:
        talk.put_json(found)
        return
    if found.note:
        talk.say(found.note)
    if found.data:
        talk.put_table(_device_table(found.data))


def _show_of_job(client: Client, job: str, flags: dict[str, Any]) -> None:
    fleet = [flag for flag in ("device", "live", "model", "ratios", "compute") if flags.get(flag)]
    if fleet:
        raise typer.BadParameter(f"--{fleet[0]} is for a plan that no job has; leave JOB out", param_hint="JOB")
    found = client.plan(job)
    talk.put_json(found) if flags["json_"] else _draw(found, flags["why"] or [], flags["reasons"])


def _show(found: Preview, why: list[str], reasons: bool) -> None:
    for warning in found.warnings:
        talk.say(f"warning: {warning}")
    _draw(found.model_dump(mode="json"), why, reasons)


def _draw(found: dict[str, Any], why: list[str], reasons: bool) -> None:
    """A plan, and why of the heads that were asked for, or of a few."""
    heads = found.get("heads") or []
    chosen = [_place(text, heads) for text in why]
    draw.put_plan(found)
    if reasons:
        chosen = [(block, head) for block, row in enumerate(heads) for head in range(len(row))]
    draw.put_reasons(heads, chosen or draw.telling_heads(heads))


def _place(text: str, heads: list[list[dict[str, Any]]]) -> tuple[int, int]:
    match = _HEAD.fullmatch(text)
    block, head = map(int, match.groups()) if match else (-1, -1)
    if not (0 <= block < len(heads) and head < len(heads[block])):
        last = f"b{len(heads) - 1}.h{len(heads[-1]) - 1}" if heads else "none"
        raise typer.BadParameter(f"'{text}' is no head; they go from b0.h0 to {last}", param_hint="--why")
    return block, head


def _device_table(found: list[Device]) -> Any:
    table = talk.make_table("id", "device", "node", "GFLOP/s", "memory", "age", "samples", "used by")
    for each in found:
        age = "" if each.age_s is None else talk.duration(each.age_s)
        table.add_row(
            talk.line(each.id),
            talk.line(each.device),
            talk.line(each.node),
            f"{each.rates.get('forward_flops_per_s', 0) / 1e9:,.1f}",
            f"{each.memory_bytes / 1e9:.1f} GB",
            f"{age}{' (stale)' if each.stale else ''}",
            str(each.samples),
            " ".join(each.used_by),
        )
    return table
