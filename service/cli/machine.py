"""Commands about this machine: bring the service up and down, say how it is."""

from __future__ import annotations

import os
import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.completion import get_completion_script  # type: ignore[attr-defined]

from service import host
from service.cli import talk
from service.cli.exits import Exit
from service.cli.frame import Json, Url, command, connected, service_url
from service.home import read_server
from service.processes import find
from service.settings import ClientSettings, Settings


class Shell(StrEnum):
    """Shells that know completion."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@command()
def up(
    port: Annotated[int | None, typer.Option(help="Port of the API (D2FT_PORT, 7421).")] = None,
    bind: Annotated[str | None, typer.Option("--host", help="Address of the API (D2FT_HOST, 127.0.0.1).")] = None,
    root: Annotated[list[Path] | None, typer.Option(help="Directory of datasets and weights; may be repeated.")] = None,
    num_cpus: Annotated[int | None, typer.Option(help="CPUs that Ray may book (all).")] = None,
    num_gpus: Annotated[int | None, typer.Option(help="GPUs that Ray may book (all it finds).")] = None,
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


@command()
def down(json_: Json = False) -> None:
    """End what `up` started, running jobs included."""
    home = ClientSettings().home.expanduser().absolute()
    was_up = host.down(home, talk.say)
    if json_:
        talk.put_json({"home": str(home), "was_up": was_up})
    talk.say("down" if was_up else "nothing was up")


@command()
def status(url: Url = None, json_: Json = False) -> None:
    """Say what is up on this machine and whether it is well."""
    settings = ClientSettings()
    noted = read_server(settings.home)
    report = {
        "url": service_url(url, settings),
        "home": str(settings.home),
        "api": _life(noted.get("api")),
        "ray": _life(noted.get("ray")),
        "free_gb": round(shutil.disk_usage(existing(settings.home)).free / 1e9, 1),
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


@command()
def completion(shell: Annotated[Shell, typer.Argument(help="Whose script.")]) -> None:
    """Print the script that completes commands and flags: eval "$(d2ft completion bash)"."""
    talk.put_text(get_completion_script(prog_name="d2ft", complete_var="_D2FT_COMPLETE", shell=shell.value) + "\n")


def existing(path: Path) -> Path:
    """The path, or what there is of it."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


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
