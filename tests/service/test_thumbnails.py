"""Thumbnails of images that nobody vouches for: little is opened, little is used, and all is answered."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import example, given
from hypothesis import settings as tries
from hypothesis import strategies as st
from PIL import Image

from scheduler.errors import UserError
from service.errors import TooManyError
from service.home import make_home
from service.processes import child_env
from service.settings import Settings
from service.thumbnail_child import FORMATS, open_inside
from service.thumbnails import MAX_CHILDREN, Thumbnails
from workers import images


def draw(path: Path, size: tuple[int, int] = (32, 24), mode: str = "RGB", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 1).save(path, **options)
    return path


def test_formats_are_those_of_training() -> None:
    assert FORMATS == images.FORMATS


def break_files(folder: Path) -> dict[str, str]:
    """Files that no thumbnail can be made of, each with a word of why."""
    good = draw(folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(good[:-30])
    (folder / "none.jpg").write_bytes(b"")
    (folder / "page.png").write_text("<script>alert(1)</script>")
    Image.new("RGB", (8, 8)).save(folder / "tiff", "TIFF")
    (folder / "tiff").rename(folder / "tiff.png")
    (folder / "dir.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to(folder / "gone.png")
    (folder / "closed.png").symlink_to(folder / "good.png" / "x")
    return {
        "cut.png": "cannot be decoded",
        "none.jpg": "no image",
        "page.png": "no image",
        "tiff.png": "no image",
        "dir.png": "not a regular file",
        "pipe.png": "not a regular file",
        "loop.png": "No such file",
        "closed.png": "",
    }


def test_broken_files_have_an_error_each_and_the_others_a_picture(settings: Settings, home: Path) -> None:
    make_home(home)
    (home / "x").mkdir()
    words = break_files(home / "x")
    told = asyncio.run(Thumbnails(settings).make((home / "x").resolve(), [*words, "good.png"]))
    for (name, word), answer in zip(words.items(), told, strict=False):
        assert word in answer["error"] and str(home) not in answer["error"], (name, answer)
    assert "png" in told[-1]


def test_the_largest_image_that_is_allowed_works_and_a_huge_file_does_not(home: Path) -> None:
    draw(home / "x" / "a.webp", (5000, 5000), "RGBA", method=0, lossless=True, quality=0)
    draw(home / "x" / "b.png", (5000, 5000))
    with (home / "x" / "c.webp").open("wb") as file:
        file.write(b"RIFF\xff\xff\xff\x7fWEBPVP8L")
        file.truncate(2 << 30)  # holes: it takes no space, and a WebP is read as a whole
    told, peak = child_peak_bytes(home / "x", ["a.webp", "b.png", "c.webp"])
    assert "png" in told[0] and "png" in told[1] and told[2]["error"]
    assert peak < 700e6


def child_peak_bytes(root: Path, files: list[str]) -> tuple[list[dict[str, Any]], int]:
    """(the child's answers, the most memory that it held)."""
    asked = {"root": str(root.resolve()), "files": files, "side": 96, "max_pixels": 25_000_000, "seconds": 10}
    run = "from service import thumbnail_child; thumbnail_child.main(); print(open('/proc/self/status').read())"
    done = subprocess.run(
        [sys.executable, "-c", run],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=60,
        env=child_env(),
    )
    peak = next(line.split()[1] for line in done.stderr.splitlines() if line.startswith("VmHWM"))
    return [json.loads(line) for line in done.stdout.splitlines()], int(peak) * 1024


def scripted(settings: Settings, script: str, timeout_s: float = 20) -> Thumbnails:
    make_home(settings.home)
    return Thumbnails(settings, [sys.executable, "-c", script], timeout_s)


def test_a_child_that_takes_too_long_is_killed_and_its_first_answers_kept(settings: Settings) -> None:
    script = "import time; print('{\"png\": 1}', flush=True); time.sleep(60)"
    start, others = time.monotonic(), psutil.Process().children()
    told = asyncio.run(scripted(settings, script, timeout_s=1).make(Path("/"), ["a", "b"]))
    assert told[0] == {"png": 1} and "no time left" in told[1]["error"]
    assert time.monotonic() - start < 10 and psutil.Process().children() == others


@pytest.mark.parametrize(
    "script", ["raise SystemExit(3)", "print('no json')", "print('x' * (2 << 20))", "import os; os.abort()"]
)
def test_a_child_that_breaks_gives_errors_not_a_failure(settings: Settings, script: str) -> None:
    told = asyncio.run(scripted(settings, script).make(Path("/"), ["a" * 200] * 64))
    assert len(told) == 64 and all("decoder ended" in each["error"] for each in told)


def test_the_child_inherits_no_secrets(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2FT_DATABASE_URL", "postgresql://user:password@host/db")
    script = "import json, os; print(json.dumps({'seen': sorted(os.environ)}))"
    (told,) = asyncio.run(scripted(settings, script).make(Path("/"), ["a"]))
    assert "PATH" in told["seen"] and not any("D2FT" in name for name in told["seen"])


def test_two_children_at_once_and_a_bounded_number_wait(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.thumbnails.MAX_WAITING", 2)
    thumbnails = scripted(settings, "import time; time.sleep(0.3); print('{\"png\": 1}')")
    most, others = 0, len(psutil.Process().children())

    async def ask() -> list[Any]:
        nonlocal most
        asked = [asyncio.create_task(thumbnails.make(Path("/"), ["a"])) for _ in range(MAX_CHILDREN + 3)]
        while not all(task.done() for task in asked):
            most = max(most, len(psutil.Process().children()) - others)
            await asyncio.sleep(0.02)
        return await asyncio.gather(*asked, return_exceptions=True)

    told = asyncio.run(ask())
    assert [isinstance(each, TooManyError) for each in told] == [False] * (MAX_CHILDREN + 2) + [True]
    assert most == MAX_CHILDREN


HOSTILE = st.lists(
    st.sampled_from(
        [
            "..",
            ".",
            "%2e%2e",
            "%252e",
            "..\\",
            "\\",
            "\0",
            "/",
            "//",
            "~",
            "in",
            "file",
            "out",
            "away",
            "near",
            "a" * 300,
        ]
    )
    | st.text(max_size=5),
    max_size=6,
).map("/".join) | st.text(max_size=30)


@pytest.fixture(scope="module")
def maze() -> Iterator[Path]:
    """A root with links out, in and round, beside a secret."""
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder).resolve()
        root = top / "root"
        (root / "in").mkdir(parents=True)
        (root / "in" / "file").write_text("inside")
        (top / "secret").write_text("secret")
        (top / "root2").mkdir()
        (top / "root2" / "file").write_text("secret")
        (root / "out").symlink_to(top / "secret")
        (root / "away").symlink_to(top)
        (root / "near").symlink_to("in/file")
        (root / "round").symlink_to("round")
        yield root


@tries(max_examples=400, deadline=None)
@given(name=HOSTILE)
@example(name="near")
@example(name="out")
@example(name="away/secret")
@example(name="../root2/file")
@example(name="round")
@example(name="in/../in/file")
@example(name="/etc/passwd")
def test_what_is_opened_is_always_inside(maze: Path, name: str) -> None:
    try:
        file = open_inside(maze, name)
    except (UserError, OSError, ValueError):
        return
    with os.fdopen(file) as opened:
        assert Path(f"/proc/self/fd/{file}").readlink().is_relative_to(maze)
        assert opened.read() == "inside"


def test_plain_names_and_links_inside_are_opened(maze: Path) -> None:
    for name in ("in/file", "near", "./in/../in/file"):
        with os.fdopen(open_inside(maze, name)) as opened:
            assert opened.read() == "inside"


def test_a_link_that_appears_after_the_check_is_not_followed(maze: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is made to see the folder as it was before somebody put a link there."""
    for name in ("away/secret", "out"):
        monkeypatch.setattr("service.thumbnail_child.check_inside", lambda path, roots: Path(path))
        with pytest.raises(OSError):
            open_inside(maze, name)
