"""Images that anyone may have written: what is shown of odd ones, and that bad ones are named and nothing more."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scheduler.errors import UserError
from workers.images import MAX_PIXELS, centre, decode, fill_square, find_unreadable, read_image
from workers.sources import source
from workers.sources.source import Pixels, read_inside

NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of that many black pixels, a few kilobytes long."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes((width // 8 + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_sixteen_bits_become_eight_and_not_white() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    data = stored(Image.fromarray(values))
    assert np.asarray(decode(data, "L")).tolist() == [[0, 0, 1, 128, 255]]
    assert np.asarray(decode(data, "RGB"))[0, 3].tolist() == [128] * 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_shown(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "blue")]
    data = stored(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(BytesIO(data)).n_frames > 1  # type: ignore[attr-defined]
    red, _, blue = decode(data, "RGB").getpixel((3, 3))  # type: ignore[misc]
    assert red > 250 and blue < 5


def test_printers_colours_and_palettes_are_turned_into_light() -> None:
    cyan = decode(stored(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG"), "RGB").getpixel((3, 3))
    assert cyan == pytest.approx((0, 255, 255), abs=4)
    palette = Image.new("RGB", (16, 16), (10, 200, 30)).quantize(4)
    assert decode(stored(palette), "RGB").getpixel((3, 3)) == (10, 200, 30)
    see_through = decode(stored(palette, transparency=b"\x80"), "RGB").getpixel((3, 3))
    assert see_through == (10, 200, 30)
    assert decode(stored(palette, transparency=b"\x80"), "L").mode == "L"


def test_planes_without_a_format_are_images_too() -> None:
    planes = tuple(NOISE[..., c].tobytes() for c in range(3))
    assert np.array_equal(np.asarray(decode(Pixels(32, 24, planes), "RGB")), NOISE)
    assert np.array_equal(np.asarray(decode(Pixels(32, 24, planes[:1]), "RGB"))[..., 2], NOISE[..., 0])
    with pytest.raises(ValueError):
        decode(Pixels(32, 24, (b"short",)), "L")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_every_cut_of_an_image_is_found(kind: str) -> None:
    data = stored(Image.fromarray(NOISE), kind)
    cuts = {f"{end}": data[:end] for end in range(0, len(data) - 16, max(1, len(data) // 9))}
    everything = {**cuts, **{f"whole {n}": data for n in range(1000)}}
    assert sorted(find_unreadable(everything.__getitem__, list(everything))) == sorted(cuts)


def test_a_giant_is_refused_by_its_header_and_takes_no_memory() -> None:
    data = {"giant": bomb(60_000, 60_000), "good": stored(Image.fromarray(NOISE))}
    assert len(data["giant"]) < 600_000
    before = psutil.Process().memory_info().rss
    assert find_unreadable(data.__getitem__, list(data)) == ["giant"]
    assert psutil.Process().memory_info().rss - before < 100e6
    just = decode(bomb(5000, MAX_PIXELS // 5000), "L")
    assert just.size == (5000, 5000)


def test_a_file_with_too_many_bytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(stored(Image.fromarray(NOISE)))
    assert read_inside(tmp_path, "a.png").startswith(b"\x89PNG")
    monkeypatch.setattr(source, "MAX_IMAGE_BYTES", 100)
    with pytest.raises(ValueError, match="more than 100"):
        read_inside(tmp_path, "a.png")


def test_one_that_went_bad_since_is_named_with_a_remedy() -> None:
    with pytest.raises(UserError) as caught:
        read_image(lambda name: b"gone", "cat/3.jpg", 3)
    assert caught.value.code == "unreadable_images" and "cat/3.jpg" in caught.value.message
    assert caught.value.param == "dataset" and caught.value.remedy


@settings(max_examples=100, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP"]))
def test_a_damaged_image_is_read_or_named(data: st.DataObject, kind: str) -> None:
    content = bytearray(stored(Image.fromarray(NOISE), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if find_unreadable({"x": bytes(content)}.__getitem__, ["x"]) == []:
        image = read_image(lambda name: bytes(content), "x", 3)
        assert fill_square(image, centre(image.size, 0.9), 8, "bicubic").size == (8, 8)
