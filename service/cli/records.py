"""Commands about what belongs to a job: events, logs, metrics, checkpoints, artifacts, ledger, predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from service.cli import talk
from service.cli.exits import Exit
from service.cli.frame import AnyId, Follow, JobId, Json, Url, command, connected
from service.schemas import MAX_PREDICT_IMAGES, PredictionList

MAX_POINTS, SHOWN_POINTS = 2000, 20
BATCH_BYTES = 12 << 20
_FIGURES = ("step", "loss", "learning_rate", "step_seconds", "compute_fraction", "bytes_fraction")


@command()
def events(
    job: AnyId,
    after: Annotated[int, typer.Option(help="Go on after this number.")] = 0,
    follow: Follow = False,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Print the history of a job or a sweep, one event a line."""
    seq = after
    with connected(url) as client:
        try:
            for event in client.events(job, after=after, follow=follow):
                talk.put_json(event) if json_ else talk.put_event(event)
                seq = event.seq
        except KeyboardInterrupt:
            talk.say(f"Let go of {job}; it goes on. Follow it again with: d2ft events {job} -f --after {seq}")
            raise typer.Exit(Exit.INTERRUPTED) from None


@command()
def logs(
    job: AnyId,
    follow: Follow = False,
    attempt: Annotated[int | None, typer.Option(help="Of this attempt (the newest).")] = None,
    rank: Annotated[int | None, typer.Option(help="A worker's log instead of the driver's.")] = None,
    offset: Annotated[int, typer.Option(help="Pass over so many bytes; negative: only the last so many.")] = 0,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Print what the driver of a job or a sweep, or a worker of a job, printed."""
    with connected(url) as client:
        pieces = client.logs(job, attempt=attempt, rank=rank, offset=offset, follow=follow)
        try:
            _put_lines(pieces) if json_ else _put_pieces(pieces)
        except KeyboardInterrupt:
            talk.say(f"Let go of {job}; it goes on. Follow it again with: d2ft logs {job} -f --offset -1000")
            raise typer.Exit(Exit.INTERRUPTED) from None


@command()
def metrics(
    job: JobId,
    points: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_POINTS, help="Thinned evenly to so many steps (20; with --json 2000)."),
    ] = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Show what the steps of a job measured."""
    with connected(url) as client:
        page = client.metrics(job, max_points=points or (MAX_POINTS if json_ else SHOWN_POINTS))
    if json_:
        talk.put_json(page)
        return
    talk.put_rows(_FIGURES, ([_figure(row.get(name)) for name in _FIGURES] for row in page.data))
    if page.total > len(page.data):
        talk.say(f"These are {len(page.data)} of {page.total} steps; more with --points, all with --json.")


@command()
def checkpoints(job: JobId, url: Url = None, json_: Json = False) -> None:
    """List the states from which a job can go on, newest first."""
    with connected(url) as client:
        page = client.checkpoints(job)
    if json_:
        talk.put_json(page)
        return
    rows = ((each.name, each.step, each.attempt, each.bytes, talk.moment(each.created_at)) for each in page.data)
    talk.put_rows(("name", "step", "attempt", "bytes", "made"), rows)


@command()
def artifacts(
    job: AnyId,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Download them into this directory.")] = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """List the files of a job or a sweep, or download them."""
    with connected(url) as client:
        page = client.artifacts(job)
        if output is not None:
            paths = [client.download(job, artifact.name, output) for artifact in page.data]
            talk.put_json([str(path) for path in paths]) if json_ else talk.put_paths(paths)
            return
    talk.put_json(page) if json_ else talk.put_artifacts(page.data)


@command()
def ledger(job: JobId, url: Url = None, json_: Json = False) -> None:
    """Show what a job was to cost and what it cost."""
    with connected(url) as client:
        found = client.ledger(job)
    talk.put_json(found) if json_ else talk.put_ledger(found)


@command()
def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="Image files: JPEG, PNG, WebP, BMP.")],
    job: Annotated[str, typer.Option(help="The job whose model is asked; it has succeeded.")],
    top: Annotated[int, typer.Option(min=1, max=100, help="How many classes of each image.")] = 5,
    url: Url = None,
    json_: Json = False,
) -> None:
    """Try the model of a job on images."""
    with connected(url) as client:
        found = [client.predict(job, *batch, top=top) for batch in _batches(images)]
    data = [prediction for answer in found for prediction in answer.data]
    if json_:
        talk.put_json(PredictionList(job_id=job, data=data, seconds=sum(answer.seconds for answer in found)))
        return
    rows = ((path, each) for path, prediction in zip(images, data, strict=True) for each in prediction.top)
    talk.put_rows(
        ("image", "class", "probability"), ((str(path), each.label, f"{each.probability:.4f}") for path, each in rows)
    )


def _batches(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """As many at once as the service takes, and not more bytes than it takes by default."""
    batch: list[Path] = []
    size = 0
    for path in paths:
        more = path.stat().st_size
        if batch and (len(batch) == MAX_PREDICT_IMAGES or size + more > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch, size = [*batch, path], size + more
    yield batch


def _put_pieces(pieces: Iterable[str]) -> None:
    last = "\n"
    for piece in pieces:
        talk.put_text(piece)
        last = piece[-1]
    if last != "\n":
        talk.put_text("\n")


def _put_lines(pieces: Iterable[str]) -> None:
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            talk.put_json({"line": line})
    if rest:
        talk.put_json({"line": rest})


def _figure(value: object) -> str | None:
    return f"{value:.4g}" if isinstance(value, float) else None if value is None else str(value)
