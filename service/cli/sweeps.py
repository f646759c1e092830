"""Commands about sweeps: made, watched, listed. `get`, `watch`, `cancel` and `retry` take a sweep's id, too."""

from __future__ import annotations

from typing import Annotated

import typer

from service.cli import elsewhere, fronts, talk
from service.cli.elsewhere import Out
from service.cli.exits import Exit
from service.cli.frame import (
    ImagesPerClass,
    ImgSize,
    Json,
    Labels,
    MicroBatches,
    MicroBatchSize,
    Model,
    ModelArg,
    Name,
    PlacementMode,
    Seed,
    SpecFile,
    Url,
    command,
    connected,
    pairs,
    said_again,
)
from service.cli.space import sweep_body
from service.client import Client
from service.client.filters import SweepFilter
from service.schemas import Sweep

_Tried = list[str] | None


@command()
def sweep(
    ratios: Annotated[_Tried, typer.Option(help="FULL,FORWARD,SKIP, like 3,0,2; repeated: each is tried.")] = None,
    compute: Annotated[_Tried, typer.Option(help="Compute budget; repeated, or LOW:HIGH.")] = None,
    bytes_: Annotated[_Tried, typer.Option("--bytes", help="Bytes budget; repeated, or LOW:HIGH.")] = None,
    strategy: Annotated[_Tried, typer.Option(help="Who chooses, as for submit; repeated.")] = None,
    score: Annotated[_Tried, typer.Option(help="What a head is worth, as for submit; repeated.")] = None,
    skip_fill: Annotated[_Tried, typer.Option(help="zero, mean or rescale; repeated.")] = None,
    lora: Annotated[_Tried, typer.Option(metavar="RANK", help="Rank of adapters; repeated.")] = None,
    lr: Annotated[_Tried, typer.Option(help="Peak learning rate; repeated, or LOW:HIGH.")] = None,
    try_: Annotated[
        _Tried, typer.Option("--try", metavar="PATH=[VALUE,…]", help="Any other field, like 'seed=[1,2]'.")
    ] = None,
    random: Annotated[int | None, typer.Option(metavar="N", help="N settings at random, instead of all.")] = None,
    optuna: Annotated[int | None, typer.Option(metavar="N", help="N settings as Optuna proposes.")] = None,
    search_seed: Annotated[int | None, typer.Option(help="Seed of what is drawn.")] = None,
    objective: Annotated[
        _Tried, typer.Option(help="METRIC=max or min: accuracy, loss, compute, bytes, seconds; repeated.")
    ] = None,
    asha: Annotated[int | None, typer.Option(metavar="STEPS", help="End poor trials early, from this step on.")] = None,
    at_once: Annotated[int | None, typer.Option(help="Trials at the same time (1).")] = None,
    baselines: Annotated[
        bool | None, typer.Option("--baselines/--no-baselines", help="Full fine-tuning beside the trials (yes).")
    ] = None,
    model: Model = None,
    weights: Annotated[str | None, typer.Option(help="As for submit.")] = None,
    img_size: ImgSize = None,
    model_arg: ModelArg = None,
    dataset: Annotated[str | None, typer.Option(help="As for submit.")] = None,
    images_per_class: ImagesPerClass = None,
    workers: Annotated[int | None, typer.Option(help="How many workers share the heads of a trial.")] = None,
    micro_batches: MicroBatches = None,
    micro_batch_size: MicroBatchSize = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training images, of each trial.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of each trial, instead of epochs.")] = None,
    seed: Seed = None,
    placement: PlacementMode = None,
    name: Name = None,
    label: Labels = None,
    priority: Annotated[int | None, typer.Option(help="Of all its jobs.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="Sent again with the same key: the same sweep.")] = None,
    spec: SpecFile = None,
    ray_address: Annotated[str | None, typer.Option(help="As for submit; no service lists it.")] = None,
    out: Out = None,
    watch_: Annotated[bool, typer.Option("--watch", help="Follow it to its end, and draw its front.")] = False,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Try settings of a job, beside full fine-tuning: each value of flags that are given repeatedly."""
    flags = {**locals(), "bytes": bytes_, "label": pairs(label, "--label")}
    body = sweep_body(flags)
    if ray_address is not None:
        raise typer.Exit(elsewhere.submit_sweep(body, flags))
    elsewhere.refuse_out(flags)
    with connected(url) as client:
        made = _submitted(client, body, idempotency_key)
        if watch_:
            talk.say(f"{made.id} is {made.status}: {made.progress.total} trials")
            raise typer.Exit(watch_sweep(client, made.id, as_json=json_))
    if json_:
        talk.put_json(made)
    else:
        talk.put(made.id)
        talk.say(f"{made.progress.total} trials. Follow them with: d2ft watch {made.id}")


@command()
def sweeps(
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this sweep.")] = None,
    status: Annotated[list[str] | None, typer.Option(help="Only sweeps in this state; may be repeated.")] = None,
    search: Annotated[str | None, typer.Option(help="Only sweeps with this in id, name, model or labels.")] = None,
    label: Labels = None,
    owner: Annotated[str | None, typer.Option(help="Only sweeps of this user; for administrators.")] = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """List sweeps, newest first; their jobs: d2ft list --sweep ID."""
    wanted: SweepFilter = {
        "status": status,
        "search": search,
        "owner": owner,
        "metadata": pairs(label, "--label"),
    }
    with connected(url) as client:
        page = client.list_sweeps(after=after, limit=limit, **wanted)
    if json_:
        talk.put_json(page)
        return
    fronts.put_sweeps(page.data)
    if page.has_more:
        talk.say(f"There are more: d2ft sweeps --after {page.last_id}")


def watch_sweep(client: Client, sweep_id: str, *, as_json: bool, timeout_s: float | None = None) -> Exit:
    """Follow a sweep to its end and show what came of it. Ctrl-C lets go of it and leaves it running."""
    try:
        for event in client.events(sweep_id, follow=True, timeout_s=timeout_s):
            if as_json:
                talk.put_json(event)
            elif event.type in ("job.status", "sweep.trial") or event.level in ("warning", "error"):
                talk.say(talk.line(event.message or event.type))
    except KeyboardInterrupt:
        talk.say(f"Let go of {sweep_id}; it goes on. Watch it again with: d2ft watch {sweep_id}")
        return Exit.INTERRUPTED
    found = client.sweep(sweep_id)
    put_one(found, as_json=as_json)
    return Exit.OK if found.status == "succeeded" else Exit.FAILED


def put_one(found: Sweep, *, as_json: bool) -> None:
    talk.put_json(found) if as_json else fronts.put_sweep(found)


def _submitted(client: Client, body: dict[str, object], given: str | None) -> Sweep:
    with said_again("sweep", given) as key:
        return client.submit_sweep(body, idempotency_key=key)
