"""The commands. Each reads its flags, asks the client or the host, and says what came of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from service import host
from service.cli import talk
from service.cli.exits import Exit
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
    Ratios,
    Schedule,
    Score,
    Seed,
    Strategy,
    Url,
    app,
    connected,
    service_url,
)
from service.cli.request import job_body
from service.cli.watch import watch_job
from service.home import read_server
from service.processes import find
from service.settings import ClientSettings, Settings


def main() -> None:
    """Entry of the `d2ft` script."""
    app()


@app.command()
def up(
    port: Annotated[int | None, typer.Option(help="Port of the API [D2FT_PORT, 7421].")] = None,
    bind: Annotated[str | None, typer.Option("--host", help="Address of the API [D2FT_HOST, 127.0.0.1].")] = None,
    root: Annotated[list[Path] | None, typer.Option(help="Directory of datasets and weights; may be repeated.")] = None,
    num_cpus: Annotated[int | None, typer.Option(help="CPUs that Ray may book [all].")] = None,
    num_gpus: Annotated[int | None, typer.Option(help="GPUs that Ray may book [all it finds].")] = None,
    ray_address: Annotated[str | None, typer.Option(help="Use this cluster's dashboard, http://host:port.")] = None,
    foreground: Annotated[bool, typer.Option(help="Stay, and bring all down at the end.")] = False,
    json_: Json = False,
) -> None:
    """Start Ray and the API on this machine. Up already: says where, and is done."""
    settings = _host_settings(port=port, host=bind, roots=root, ray_address=ray_address)
    machine = host.Machine(num_cpus or os.cpu_count() or 1, num_gpus)
    url, fresh = host.up(settings, machine, talk.say)
    if json_:
        talk.put_json({"url": url, "home": str(settings.home), "started": fresh})
    else:
        talk.say("up at" if fresh else "already up at")
        talk.put(url)
    if foreground and fresh:
        host.hold(settings.home, talk.say)


@app.command()
def down() -> None:
    """End what `up` started, running jobs included."""
    was_up = host.down(ClientSettings().home.expanduser().absolute(), talk.say)
    talk.say("down" if was_up else "nothing was up")


@app.command()
def submit(
    model: Model = None,
    weights: Annotated[str | None, typer.Option(help="A .safetensors file on the server's machine.")] = None,
    img_size: ImgSize = None,
    model_arg: ModelArg = None,
    dataset: Annotated[str | None, typer.Option(help="digits, a folder, or folder:///path.")] = None,
    images_per_class: Annotated[int | None, typer.Option(help="Use only so many of each class.")] = None,
    ratios: Ratios = None,
    compute: Compute = None,
    bytes_: Bytes = None,
    schedule: Schedule = None,
    strategy: Strategy = None,
    hold: Hold = None,
    grain: Grain = None,
    score: Score = None,
    skip_fill: Annotated[str | None, typer.Option(help="zero, mean or rescale.")] = None,
    workers: Annotated[int | None, typer.Option(help="How many workers share the heads.")] = None,
    micro_batches: MicroBatches = None,
    micro_batch_size: MicroBatchSize = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training images.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    window: Annotated[int | None, typer.Option(help="Steps that one plan covers.")] = None,
    seed: Seed = None,
    placement: PlacementMode = None,
    name: Annotated[str | None, typer.Option(help="A name for people.")] = None,
    spec: Annotated[
        str | None, typer.Option(help="JSON file of the whole request, - for stdin; flags go over it.")
    ] = None,
    watch_: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Put a job into the queue; prints its id."""
    flags = {**locals(), "bytes": bytes_}
    with connected(url) as client:
        job = client.submit(job_body(flags))
        if watch_:
            talk.say(f"{job.id} is {job.status}")
            raise typer.Exit(watch_job(client, job.id, as_json=json_))
    if json_:
        talk.put_json(job)
    else:
        talk.put(job.id)
        talk.say(f"Follow it with: d2ft watch {job.id}")


@app.command()
def watch(
    job: JobId,
    timeout: Annotated[float | None, typer.Option(help="Give up after so many seconds (exit code 7).")] = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Follow a job to its end; Ctrl-C lets go of it."""
    with connected(url) as client:
        raise typer.Exit(watch_job(client, job, as_json=json_, timeout_s=timeout))


@app.command()
def get(job: JobId, url: Url = None, json_: Json = False) -> None:
    """Show one job."""
    with connected(url) as client:
        found = client.get(job)
    talk.put_json(found) if json_ else talk.put_job(found)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this job.")] = None,
    status: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """List jobs, newest first."""
    with connected(url) as client:
        page = client.list(after=after, limit=limit, status=status)
    if json_:
        talk.put_json(page)
        return
    talk.put_jobs(page.data)
    if page.has_more:
        talk.say(f"There are more: d2ft list --after {page.last_id}")


@app.command()
def cancel(job: JobId, url: Url = None, json_: Json = False) -> None:
    """End a job."""
    with connected(url) as client:
        found = client.cancel(job)
    talk.put_json(found) if json_ else talk.put(f"{found.id}  {found.status}")


@app.command()
def events(
    job: JobId,
    after: Annotated[int, typer.Option(help="Go on after this number.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until the job has ended.")] = False,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Print a job's history, one event a line."""
    with connected(url) as client:
        for event in client.events(job, after=after, follow=follow):
            talk.put_json(event) if json_ else talk.put_event(event)


@app.command()
def artifacts(
    job: JobId,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Download them into this directory.")] = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """List a job's files, or download them."""
    with connected(url) as client:
        page = client.artifacts(job)
        if output is not None:
            paths = [client.download(job, artifact.name, output) for artifact in page.data]
            talk.put_json([str(path) for path in paths]) if json_ else talk.put_paths(paths)
            return
    talk.put_json(page) if json_ else talk.put_artifacts(page.data)


@app.command()
def ledger(job: JobId, url: Url = None, json_: Json = False) -> None:
    """Show what a job was to cost and what it cost."""
    with connected(url) as client:
        found = client.ledger(job)
    talk.put_json(found) if json_ else talk.put_ledger(found)


@app.command()
def logs(job: JobId, url: Url = None) -> None:
    """Print what the driver of a job's newest attempt printed."""
    with connected(url) as client:
        talk.put(client.logs(job))


@app.command()
def status(url: Url = None, json_: Json = False) -> None:
    """Say what is up on this machine and whether it is well."""
    settings = ClientSettings()
    noted = read_server(settings.home)
    report = {
        "url": service_url(url, settings),
        "home": str(settings.home),
        "api": _life(noted.get("api")),
        "ray": _life(noted.get("ray")),
        "free_gb": round(shutil.disk_usage(_existing(settings.home)).free / 1e9, 1),
    }
    with connected(url) as client:
        checks = client.ready()
    report |= {f"{part} check": state for part, state in checks.items()}
    if json_:
        talk.put_json(report)
    else:
        for label, value in report.items():
            talk.put(f"{label:14}{value}")
    raise typer.Exit(Exit.OK if set(checks.values()) == {"ok"} else Exit.UNREACHABLE)


def _host_settings(**flags: Any) -> Settings:
    """Flags over the environment; the roots are the user's home and the present directory unless told otherwise."""
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    settings = Settings(**given)
    if settings.roots:
        return settings
    return Settings(**given, roots=(Path.home(), Path.cwd()))


def _life(noted: dict[str, Any] | None) -> str:
    if noted is None:
        return "not started here"
    return "up" if find(noted) else "has died; run: d2ft up"


def _existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
