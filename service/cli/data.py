"""Commands about what jobs are made of: models and datasets."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Literal

import typer

from service.cli import talk
from service.cli.frame import Json, Url, Yes, command, confirm, connected, group
from service.cli.request import dataset_uri
from service.schemas import Dataset, Model

datasets_app = group(__name__, "datasets", "Registered image folders: list, add, show, inspect, samples, remove.")

DatasetId = Annotated[str, typer.Argument(metavar="DATASET", help="Id or name.")]


@command()
def models(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this one.")] = None,
    search: Annotated[str | None, typer.Option(help="Only models with this in their name.")] = None,
    min_params: Annotated[int | None, typer.Option(help="With at least so many parameters.")] = None,
    max_params: Annotated[int | None, typer.Option(help="With at most so many parameters.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many.")] = 50,
    all_: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    refused: Annotated[bool, typer.Option("--refused", help="Those that cannot be trained, and why.")] = False,
    every: Annotated[bool, typer.Option("--every", help="Both, with the reason of those that cannot.")] = False,
    url: Url = None,
    json_: Json = False,
) -> None:
    """List the models that can be trained, or the others and why they cannot, or show one."""
    if refused and every:
        raise typer.BadParameter("--refused and --every exclude each other.")
    supported: Literal["true", "false", "all"] = "false" if refused else "all" if every else "true"
    with connected(url) as client:
        if name is not None:
            _show_model(client.model(name), json_)
            return
        known = client.models(search=search, supported=supported, min_params=min_params, max_params=max_params)
        found = list(known if all_ else islice(known, limit + 1))
    shown = found if all_ else found[:limit]
    talk.put_json_list(shown) if json_ else _put_models(shown, reasons=refused or every)
    if len(found) > len(shown):
        talk.say("There are more: --limit, --search, or --all.")


@command("list", of=datasets_app)
def list_datasets(
    search: Annotated[str | None, typer.Option(help="Only datasets with this in name or folder.")] = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """List registered datasets."""
    with connected(url) as client:
        found = list(client.datasets(search=search))
    if json_:
        talk.put_json_list(found)
        return
    rows = ((each.id, each.name, each.num_classes, each.num_train, each.num_test, each.uri) for each in found)
    talk.put_rows(("id", "name", "classes", "train", "test", "folder"), rows)


@command("add", of=datasets_app)
def add_dataset(
    name: Annotated[str, typer.Argument(metavar="NAME", help="For --dataset dataset:NAME.")],
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="On the server's machine, or an address.")],
    url: Url = None,
    json_: Json = False,
) -> None:
    """Register an image folder, train/CLASS/*.jpg and test/ or val/ beside it, or the address of another kind."""
    with connected(url) as client:
        made = client.add_dataset(name, dataset_uri(folder))
    if json_:
        talk.put_json(made)
        return
    talk.put(made.id)
    if made.inspected_at is None:
        talk.say("Not inspected by the API: the workers look into it when a job begins.")
    else:
        talk.say(f"{made.num_classes} classes, {made.num_train} images to train, {made.num_test} to test.")
    talk.say(f"Train on it with: d2ft submit --dataset dataset:{made.name}")


@command("show", of=datasets_app)
def show_dataset(dataset: DatasetId, url: Url = None, json_: Json = False) -> None:
    """Show a dataset and its classes."""
    with connected(url) as client:
        _show_dataset(client.dataset(dataset), json_)


@command("inspect", of=datasets_app)
def inspect_dataset(dataset: DatasetId, url: Url = None, json_: Json = False) -> None:
    """Have the folder listed again."""
    with connected(url) as client:
        _show_dataset(client.inspect_dataset(dataset), json_)


@command("samples", of=datasets_app)
def samples(
    dataset: DatasetId,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    per_class: Annotated[int | None, typer.Option(help="Images of each class.")] = None,
    limit: Annotated[int | None, typer.Option(help="Images in all.")] = None,
    url: Url = None,
    json_: Json = False,
) -> None:
    """List a few images of every class; with --json their thumbnails, too."""
    with connected(url) as client:
        found = client.samples(dataset, split=split, per_class=per_class, limit=limit)
    if json_:
        talk.put_json(found)
        return
    rows = (
        (each.label, each.file, f"{each.width}×{each.height}" if each.width else None, each.error)
        for each in found.data
    )
    talk.put_rows(("class", "file", "size", "problem"), rows)


@command("remove", of=datasets_app)
def remove_dataset(dataset: DatasetId, yes: Yes = False, url: Url = None, json_: Json = False) -> None:
    """Forget a dataset; its files stay."""
    confirm(f"Forget {dataset}? Jobs can no longer name it.", yes=yes)
    with connected(url) as client:
        gone = client.remove_dataset(dataset)
    talk.put_json(gone) if json_ else talk.put(f"{gone.id}  removed")


def _put_models(found: list[Model], *, reasons: bool) -> None:
    rows = (
        (each.id, _params(each), each.blocks, each.heads, each.dim, each.img_size, _memory(each), each.reason)
        for each in found
    )
    columns = ("name", "params", "blocks", "heads", "dim", "image", "memory", "reason")
    shown = columns if reasons else columns[:-1]
    talk.put_rows(shown, (row[: len(shown)] for row in rows))


def _show_model(model: Model, json_: bool) -> None:
    if json_:
        talk.put_json(model)
        return
    fields = model.model_dump(exclude={"object", "supported", "reason", "memory_bytes"})
    talk.put_fields({**fields, "memory": _memory(model)})


def _show_dataset(dataset: Dataset, json_: bool) -> None:
    if json_:
        talk.put_json(dataset)
        return
    talk.put_fields(dataset.model_dump(exclude={"object", "classes", "created_at", "inspected_at"}))
    talk.put_rows(("class", "train", "test"), ((each.name, each.num_train, each.num_test) for each in dataset.classes))


def _params(model: Model) -> str | None:
    return None if model.params is None else f"{model.params / 1e6:.1f} M"


def _memory(model: Model) -> str | None:
    return None if model.memory_bytes is None else f"{model.memory_bytes / 1e9:.2f} GB"
