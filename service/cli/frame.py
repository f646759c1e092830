"""What every command stands on: the application, its errors as exit codes, the common flags, and the client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from scheduler.errors import D2ftError
from service.cli import talk
from service.cli.exits import Exit, exit_code
from service.client import Client
from service.home import KEY_FILE, read_secret, read_server
from service.settings import LOOPBACK, ClientSettings, Settings


class Reporting(TyperGroup):
    """Turns our errors into a sentence on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except D2ftError as error:
            field = f" [{error.param}]" if error.param else ""
            text = " ".join(part for part in (error.message, error.remedy) if part)
            talk.say(f"error{field}: {text}")
            raise typer.Exit(exit_code(error)) from None
        except ValidationError as error:
            first = error.errors()[0]
            talk.say(f"error [{'.'.join(map(str, first['loc']))}]: {first['msg']}")
            raise typer.Exit(Exit.USAGE) from None


app = typer.Typer(
    cls=Reporting,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune vision transformers over unlike devices, doing only the part of the work that pays.",
)

Url = Annotated[str | None, typer.Option("--url", help="Service to talk to [D2FT_URL, else the one on this machine].")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON as the API sends it.")]
JobId = Annotated[str, typer.Argument(metavar="JOB")]
ImgSize = Annotated[int | None, typer.Option(help="Side of the images in pixels.")]
ModelArg = Annotated[list[str] | None, typer.Option(help="NAME=VALUE for timm; may be repeated.")]
Ratios = Annotated[str | None, typer.Option(help="FULL,FORWARD,SKIP micro-batches of a step, like 3,0,2.")]
Compute = Annotated[float | None, typer.Option(help="Compute budget as a fraction of all-FULL.")]
Bytes = Annotated[float | None, typer.Option("--bytes", help="Bytes budget as a fraction of all-FULL.")]
MicroBatches = Annotated[int | None, typer.Option(help="Micro-batches of a step.")]
MicroBatchSize = Annotated[int | None, typer.Option(help="Images of a micro-batch.")]
PlacementMode = Annotated[str | None, typer.Option(help="auto, split or whole.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Model = Annotated[str | None, typer.Option(help="A timm name, or d2ft_digits.")]
Strategy = Annotated[
    str | None,
    typer.Option(
        help="Who chooses: hardest (images), hull, cpsat, two_stage, random or uniform (heads), full (all-FULL)."
    ),
]
Hold = Annotated[
    str | None, typer.Option(help="What stays over a window: training (which heads train), all (SKIPs too) or none.")
]
Grain = Annotated[
    str | None, typer.Option(help="Heads of a worker's block sit out together (coherent) or alone (scattered).")
]
Score = Annotated[
    str | None, typer.Option(help="What a head is worth: fisher, gradient, taylor, weight, activation or random.")
]
Schedule = Annotated[
    str | None, typer.Option(help="Phases as SHARE:FULL,FORWARD,SKIP or SHARE:COMPUTE/BYTES, like 0.5:1,0,4;0.5:full.")
]


@contextmanager
def connected(url: str | None) -> Iterator[Client]:
    settings = ClientSettings()
    target = service_url(url, settings)
    with Client(target, key_for(target, settings)) as client:
        yield client


def service_url(flag: str | None, settings: ClientSettings) -> str:
    return flag or settings.url or read_server(settings.home).get("url") or Settings(home=settings.home).url


def key_for(url: str, settings: ClientSettings) -> str | None:
    """The key given, or the one in home; the latter is not sent to other machines."""
    local = urlsplit(url).hostname in LOOPBACK or url == read_server(settings.home).get("url")
    return settings.api_key or (read_secret(settings.home / KEY_FILE) if local else None)
