"""The README names every setting, route, command, exit code and room; a new one that it lacks fails here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from starlette.testclient import TestClient

import service
from service.cli import app
from service.cli.exits import Exit
from service.settings import ClientSettings, Settings

ROOM = Path(service.__file__).parent
README = (ROOM / "README.md").read_text()


@pytest.mark.parametrize("name", [*Settings.model_fields, *ClientSettings.model_fields])
def test_every_setting_is_documented(name: str) -> None:
    assert f"`D2FT_{name.upper()}`" in README


@pytest.mark.parametrize("kind", [Settings, ClientSettings])
def test_every_setting_explains_itself(kind: type[Settings]) -> None:
    assert all(field.description for field in kind.model_fields.values())


def test_every_route_is_documented(api: TestClient) -> None:
    for path, methods in api.get("/openapi.json").json()["paths"].items():
        for method in methods:
            assert f"`{method.upper()} {path.replace('{name:path}', '{name}')}`" in README


@pytest.mark.parametrize("name", sorted(typer.main.get_command(app).commands))  # type: ignore[attr-defined]
def test_every_command_is_documented(name: str) -> None:
    assert f"`d2ft {name}" in README


def test_every_exit_code_is_documented() -> None:
    text = README.split("Exit codes:")[1].split("\n\n")[0]
    assert {int(code) for code in re.findall(r"(?:^|·) ?(\d+)", text.replace("\n", " ").strip())} == {*Exit}


def test_every_room_is_on_a_floor() -> None:
    floors = README.split("## Rooms")[1].split("## Words")[0]
    for path in ROOM.iterdir():
        if (path.suffix == ".py" and path.stem != "__init__") or (path.is_dir() and (path / "__init__.py").exists()):
            assert re.search(rf"\b{path.stem}\b", floors), path.name


@pytest.mark.parametrize("path", sorted(ROOM.rglob("*.py")), ids=lambda path: path.name)
def test_rooms_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 400
