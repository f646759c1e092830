"""The model catalogue: made once by a child, waited for, and said when it fails."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from service.catalogue import FORMAT, Catalogue
from service.checks import check_model
from service.errors import UnavailableError
from service.home import make_home
from service.settings import Settings
from tests.service.conftest import sizes
from workers.shapes import Sizes

X = sizes(embed_dim=96, num_heads=6)
WRITE = "import json, sys, time; time.sleep({delay}); open(sys.argv[1], 'w').write(json.dumps({content!r}))"


def child(settings: Settings, *, delay: float = 0.0) -> list[str]:
    content = {"format": FORMAT, "timm": importlib.metadata.version("timm"), "models": {"vit_x": X}}
    return [sys.executable, "-c", WRITE.format(delay=delay, content=content), str(settings.models_file)]


@pytest.fixture
def made_home(settings: Settings) -> Settings:
    make_home(settings.home)
    return settings


def test_a_missing_file_is_made_and_waited_for(made_home: Settings) -> None:
    async def ask() -> object:
        return await Catalogue(made_home, child(made_home, delay=0.1)).models()

    assert asyncio.run(ask()) == {"vit_x": Sizes.from_dict(X)}


@pytest.mark.parametrize(
    "old",
    [
        {"format": FORMAT, "timm": "0.0.1", "models": {"old": X}},
        {"timm": importlib.metadata.version("timm"), "models": {"old": None}},
        {"format": FORMAT, "timm": importlib.metadata.version("timm"), "models": {"old": {"img_size": 224}}},
        ["torn"],
    ],
)
def test_a_file_of_another_timm_or_format_is_made_anew(made_home: Settings, old: object) -> None:
    made_home.models_file.write_text(json.dumps(old))

    async def ask() -> object:
        return await Catalogue(made_home, child(made_home)).models()

    assert asyncio.run(ask()) == {"vit_x": Sizes.from_dict(X)}


def test_a_given_file_is_taken_whatever_timm_is_here_and_never_made(made_home: Settings, tmp_path: Path) -> None:
    given = made_home.model_copy(update={"catalogue_file": tmp_path / "given.json"})

    async def ask() -> object:
        return await Catalogue(given, [sys.executable, "-c", "raise SystemExit(4)"]).models()

    content = {"format": FORMAT, "timm": "0.0.1", "models": {"vit_x": X}}
    (tmp_path / "given.json").write_text(json.dumps(content))
    assert asyncio.run(ask()) == {"vit_x": Sizes.from_dict(X)}
    (tmp_path / "given.json").write_text(json.dumps({**content, "format": FORMAT - 1}))
    with pytest.raises(UnavailableError, match="another format"):
        asyncio.run(ask())


def test_a_slow_making_is_a_503_and_goes_on(made_home: Settings) -> None:
    hasty = made_home.model_copy(update={"catalogue_wait_s": 0.05})

    async def ask() -> object:
        catalogue = Catalogue(hasty, child(hasty, delay=0.4))
        with pytest.raises(UnavailableError, match="still being made"):
            await catalogue.models()
        await asyncio.sleep(0.8)
        return await catalogue.models()

    assert asyncio.run(ask()) == {"vit_x": Sizes.from_dict(X)}


def test_a_failed_making_is_said_and_tried_again(made_home: Settings) -> None:
    async def ask() -> object:
        catalogue = Catalogue(made_home, [sys.executable, "-c", "raise SystemExit(4)"])
        with pytest.raises(UnavailableError, match="exited with 4"):
            await catalogue.models()
        catalogue._command = child(made_home)
        return await catalogue.models()

    assert asyncio.run(ask()) == {"vit_x": Sizes.from_dict(X)}


def test_closing_ends_the_child(made_home: Settings) -> None:
    async def close() -> None:
        catalogue = Catalogue(made_home, child(made_home, delay=60))
        catalogue.start()
        await asyncio.sleep(0.3)
        await catalogue.close()

    asyncio.run(asyncio.wait_for(close(), 5))


def test_a_name_with_a_pretraining_tag_is_its_model() -> None:
    models: dict[str, Sizes | str] = {"vit_x": Sizes.from_dict(X), "net": "it is none"}
    assert check_model("vit_x.lvd142m", models) == []
    assert check_model("net", models)[0].code == "model_refused"
    assert check_model("y" * 300, models)[0].code == "unknown_model"
