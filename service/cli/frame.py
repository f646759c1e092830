"""What every command stands on: the application, its errors as exit codes, the common flags, and the client."""

from __future__ import annotations

import errno
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from scheduler.errors import D2ftError
from service.cli import talk
from service.cli.exits import Exit, exit_code
from service.cli.profile import read_profile, same_service
from service.client import ApiUnreachableError, Client
from service.client.calls import new_key
from service.home import KEY_FILE, read_secret, read_server
from service.settings import LOOPBACK, ClientSettings, Settings

# module of a command → under which heading the help shows it
PANELS = {
    "machine": "This machine",
    "doctor": "This machine",
    "jobs": "Jobs",
    "sweeps": "Jobs",
    "records": "What a job leaves",
    "plans": "Plans and devices",
    "data": "Models and datasets",
    "access": "Access",
    "webhooks": "Access",
}


class Reporting(TyperGroup):
    """Turns our errors into a sentence on stderr and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        panels = list(PANELS.values())
        return sorted(super().list_commands(ctx), key=lambda name: panels.index(self.commands[name].rich_help_panel))  # type: ignore[attr-defined]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except D2ftError as error:
            field = f" [{error.param}]" if error.param else ""
            text = " ".join(part for part in (error.message, error.remedy) if part)
            talk.complain(f"error{field}: {text}")
            raise typer.Exit(exit_code(error)) from None
        except ValidationError as error:
            first = error.errors()[0]
            talk.complain(f"error [{'.'.join(map(str, first['loc']))}]: {first['msg']}")
            raise typer.Exit(Exit.USAGE) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read our output has gone: typer ends quietly
                raise
            talk.complain(f"error: {error}")
            raise typer.Exit(Exit.FAILED) from None
        except KeyboardInterrupt:
            raise typer.Exit(Exit.INTERRUPTED) from None


app = typer.Typer(
    cls=Reporting,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune vision transformers over unlike devices, doing only the part of the work that pays.",
)
Function = TypeVar("Function", bound=Callable[..., None])

_QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="No talk on stderr but errors.")]
_NO_COLOR = Annotated[bool, typer.Option("--no-color", help="No colours (NO_COLOR).")]
_MANNERS = tuple(
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
    for name, annotation in (("quiet", _QUIET), ("no_color", _NO_COLOR))
)


def command(name: str | None = None, *, of: typer.Typer = app) -> Callable[[Function], Function]:
    """Register a function as a command that has, beside its own flags, those of every command."""

    def register(function: Function) -> Function:
        @functools.wraps(function)
        def spoken(*, quiet: bool, no_color: bool, **flags: Any) -> None:
            talk.set_manner(quiet=quiet, no_color=no_color)
            function(**flags)

        signature = inspect.signature(function, eval_str=True)
        spoken.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), *_MANNERS]
        )
        of.command(name, rich_help_panel=_panel(function.__module__) if of is app else None)(spoken)
        return function

    return register


def group(module: str, name: str, text: str) -> typer.Typer:
    """A command that has commands of its own."""
    made = typer.Typer(no_args_is_help=True, help=text)
    app.add_typer(made, name=name, rich_help_panel=_panel(module))
    return made


def _panel(module: str) -> str:
    return PANELS[module.rpartition(".")[2]]


Url = Annotated[
    str | None,
    typer.Option("--url", help="Service to talk to (D2FT_URL, else where you are logged in, else this machine's)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON as the API sends it.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id.")]
AnyId = Annotated[str, typer.Argument(metavar="JOB", help="The id of a job or a sweep.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Stay until the job has ended.")]
Labels = Annotated[list[str] | None, typer.Option("--label", help="KEY=VALUE of the metadata; may be repeated.")]
ImgSize = Annotated[int | None, typer.Option(help="Side of the images in pixels.")]
ModelArg = Annotated[list[str] | None, typer.Option(help="NAME=VALUE for timm; may be repeated.")]
Ratios = Annotated[str | None, typer.Option(help="FULL,FORWARD,SKIP micro-batches of a step, like 3,0,2.")]
Compute = Annotated[float | None, typer.Option(help="Compute budget as a fraction of all-FULL.")]
Bytes = Annotated[float | None, typer.Option("--bytes", help="Bytes budget as a fraction of all-FULL.")]
MicroBatches = Annotated[int | None, typer.Option(help="Micro-batches of a step.")]
MicroBatchSize = Annotated[int | None, typer.Option(help="Images of a micro-batch.")]
PlacementMode = Annotated[str | None, typer.Option(help="auto, unmixed, split or whole.")]
Precision = Annotated[str | None, typer.Option(help="What is computed in: auto, fp32 or bf16.")]
Wire = Annotated[str | None, typer.Option(help="What workers send each other in: fp32 or bf16.")]
Recompute = Annotated[
    bool | None, typer.Option("--recompute", help="Keep less: run forward passes again in the backward pass.")
]
ImagesPerClass = Annotated[int | None, typer.Option(help="Use only so many of each class.")]
Name = Annotated[str | None, typer.Option(help="A name for people.")]
SpecFile = Annotated[str | None, typer.Option(help="JSON file of the whole request, - for stdin; flags go over it.")]
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
    """The flag, the environment, what `login` kept, what `up` noted, the default: the first that there is."""
    if flag or settings.url:
        return str(flag or settings.url)
    profile = read_profile()
    if profile is not None:
        return profile.url
    return read_server(settings.home).get("url") or Settings(home=settings.home).url


def key_for(url: str, settings: ClientSettings) -> str | None:
    """The key given, or the one kept for this very service, or the one in home; that is not sent to other machines."""
    if settings.api_key:
        return settings.api_key
    profile = read_profile()
    if profile is not None and same_service(profile.url, url):
        return profile.key
    local = urlsplit(url).hostname in LOOPBACK or url == read_server(settings.home).get("url")
    return read_secret(settings.home / KEY_FILE) if local else None


def confirm(question: str, *, yes: bool) -> None:
    """Go on only with --yes, or after a yes from somebody at a terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("nobody is there to be asked; say --yes", param_hint="--yes")
    if not typer.confirm(question, err=True):
        talk.complain("Nothing was done.")
        raise typer.Exit(Exit.FAILED)


def pairs(words: list[str] | None, flag: str) -> dict[str, str]:
    """KEY=VALUE words as a dictionary."""
    found = {}
    for word in words or []:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"'{word}' is not KEY=VALUE", param_hint=flag)
        found[key] = value
    return found


@contextmanager
def said_again(what: str, given: str | None) -> Iterator[str]:
    """The key to ask with. Where the answer was lost, says how to ask for it again without making a second one."""
    key = given or new_key()
    try:
        yield key
    except (ApiUnreachableError, KeyboardInterrupt):
        talk.say(f"Whether the {what} was made is not known; ask the same again with: --idempotency-key {key}")
        raise
