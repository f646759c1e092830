"""Commands about jobs: made, watched, listed, and asked to end, pause, go on or begin again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from service.cli import elsewhere, talk
from service.cli.elsewhere import Out, RayAddress
from service.cli.frame import (
    AnyId,
    Bytes,
    Compute,
    Grain,
    Hold,
    ImagesPerClass,
    ImgSize,
    JobId,
    Json,
    Labels,
    MicroBatches,
    MicroBatchSize,
    Model,
    ModelArg,
    Name,
    PlacementMode,
    Precision,
    Ratios,
    Recompute,
    Schedule,
    Score,
    Seed,
    SpecFile,
    Strategy,
    Url,
    Wire,
    command,
    connected,
    pairs,
    said_again,
)
from service.cli.request import job_body
from service.cli.sweeps import put_one, watch_sweep
from service.cli.watch import watch_job
from service.client import Client, JobFilter, JobHandle
from service.client.calls import is_sweep
from service.schemas import Job, Sweep


@command()
def submit(
    model: Model = None,
    weights: Annotated[
        str | None, typer.Option(help="A .safetensors file on the server's machine, job:ID, or hf-hub:ORG/NAME@COMMIT.")
    ] = None,
    img_size: ImgSize = None,
    model_arg: ModelArg = None,
    dataset: Annotated[
        str | None, typer.Option(help="digits, a folder, an address (parquet:///path), or dataset:NAME.")
    ] = None,
    images_per_class: ImagesPerClass = None,
    augment: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, like flip=true or mixup=0.8; may be repeated.")
    ] = None,
    ratios: Ratios = None,
    compute: Compute = None,
    bytes_: Bytes = None,
    schedule: Schedule = None,
    strategy: Strategy = None,
    hold: Hold = None,
    grain: Grain = None,
    score: Score = None,
    skip_fill: Annotated[str | None, typer.Option(help="zero, mean or rescale.")] = None,
    lora: Annotated[int | None, typer.Option(metavar="RANK", help="Train adapters of this rank instead.")] = None,
    freeze_blocks: Annotated[int | None, typer.Option(help="The first blocks that do not train.")] = None,
    freeze_trunk: Annotated[bool | None, typer.Option("--freeze-trunk", help="Train heads and classifier.")] = None,
    head_only: Annotated[bool | None, typer.Option("--head-only", help="Train the classifier alone.")] = None,
    workers: Annotated[int | None, typer.Option(help="How many workers share the heads.")] = None,
    micro_batches: MicroBatches = None,
    micro_batch_size: MicroBatchSize = None,
    precision: Precision = None,
    wire: Wire = None,
    recompute: Recompute = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training images.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    window: Annotated[int | None, typer.Option(help="Steps that one plan covers.")] = None,
    onnx: Annotated[bool | None, typer.Option("--onnx", help="Have model.onnx made, too.")] = None,
    seed: Seed = None,
    placement: PlacementMode = None,
    name: Name = None,
    label: Labels = None,
    priority: Annotated[int | None, typer.Option(help="Of the jobs that wait, higher ones go first (0).")] = None,
    queue_timeout: Annotated[float | None, typer.Option(help="Fail if not started after so many seconds.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="Sent again with the same key: the same job.")] = None,
    spec: SpecFile = None,
    ray_address: RayAddress = None,
    out: Out = None,
    watch_: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Put a job into the queue, or onto a cluster of one's own; prints its id."""
    flags = {**locals(), "bytes": bytes_, "label": pairs(label, "--label")}
    body = job_body(flags)
    if ray_address is not None:
        raise typer.Exit(elsewhere.submit_job(body, flags))
    elsewhere.refuse_out(flags)
    with connected(url) as client:
        job = _submitted(client, body, idempotency_key)
        if job.replayed:
            talk.say("This key had made it before.")
        if watch_:
            talk.say(f"{job.id} is {job.status}")
            raise typer.Exit(watch_job(client, job.id, as_json=json_))
    if json_:
        talk.put_json(job.job)
    else:
        talk.put(job.id)
        talk.say(f"Follow it with: d2ft watch {job.id}")


@command()
def watch(
    job: AnyId,
    timeout: Annotated[float | None, typer.Option(help="Give up after so many seconds (exit code 7).")] = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Follow a job or a sweep to its end; Ctrl-C lets go of it."""
    with connected(url) as client:
        if is_sweep(job):
            raise typer.Exit(watch_sweep(client, job, as_json=json_, timeout_s=timeout))
        raise typer.Exit(watch_job(client, job, as_json=json_, timeout_s=timeout))


@command()
def get(job: AnyId, url: Url = None, json_: Json = False) -> None:
    """Show one job, or one sweep with its trials and its front."""
    with connected(url) as client:
        if is_sweep(job):
            put_one(client.sweep(job), as_json=json_)
            return
        found = client.get(job)
    talk.put_json(found) if json_ else talk.put_job(found)


@command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this job.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="All of them, page by page.")] = False,
    status: Annotated[list[str] | None, typer.Option(help="Only jobs in this state; may be repeated.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.")] = None,
    search: Annotated[
        str | None, typer.Option(help="Only jobs with this in id, name, model, dataset or labels.")
    ] = None,
    label: Labels = None,
    sweep: Annotated[str | None, typer.Option(help="Only the jobs of this sweep.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only jobs of this user; for administrators.")] = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """List jobs, newest first."""
    wanted: JobFilter = {
        "status": status,
        "model": model,
        "search": search,
        "owner": owner,
        "sweep": sweep,
        "metadata": pairs(label, "--label"),
    }
    with connected(url) as client:
        if all_:
            found = client.jobs(**wanted)
            _put_lines(found) if json_ else talk.put_jobs(list(found))
            return
        page = client.list(after=after, limit=limit, **wanted)
    if json_:
        talk.put_json(page)
        return
    talk.put_jobs(page.data)
    if page.has_more:
        talk.say(f"There are more: d2ft list --after {page.last_id}, or --all")


@command()
def cancel(job: AnyId, url: Url = None, json_: Json = False) -> None:
    """End a job, or a sweep with its jobs."""
    _act(url, json_, lambda client: client.cancel_sweep(job) if is_sweep(job) else client.cancel(job))


@command()
def pause(job: JobId, url: Url = None, json_: Json = False) -> None:
    """Have a job keep what it has learnt and give its devices back."""
    _act(url, json_, lambda client: client.pause(job))


@command()
def resume(job: JobId, url: Url = None, json_: Json = False) -> None:
    """Put a paused job into the queue again."""
    _act(url, json_, lambda client: client.resume(job))


@command()
def retry(job: AnyId, url: Url = None, json_: Json = False) -> None:
    """Give a job or a sweep that failed or was cancelled another attempt."""
    _act(url, json_, lambda client: client.retry_sweep(job) if is_sweep(job) else client.retry(job))


def _act(url: str | None, json_: bool, action: Callable[[Client], Job | Sweep]) -> None:
    with connected(url) as client:
        found = action(client)
    talk.put_json(found) if json_ else talk.put(f"{found.id}  {found.status}")


def _submitted(client: Client, body: dict[str, Any], given: str | None) -> JobHandle:
    with said_again("job", given) as key:
        return client.submit(body, idempotency_key=key)


def _put_lines(jobs: Any) -> None:
    for job in jobs:
        talk.put_json(job)
