"""Tar files of images: shards, and archives that somebody wrote with bad intent."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.errors import UserError
from tests.workers.sources.makers import BLUE, RED, archive, encoded, member, pair
from workers.contract import JobSpec
from workers.data import open_dataset
from workers.model import ModelInput
from workers.sources import webdataset
from workers.sources.address import parse_address
from workers.sources.opening import open_source
from workers.sources.source import Source

COLOUR = ModelInput(16, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5), "bicubic")
GOOD = [*pair("a", 0), *pair("b", 1)]


def opened(path: Path) -> Source:
    return open_source(parse_address(f"webdataset://{path}"))


def refused(path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        opened(path)
    assert caught.value.param == "dataset" and caught.value.remedy
    return caught.value


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_are_read_in_place(tmp_path: Path, form: int) -> None:
    long = "n" * 90 + "/" + "m" * 60  # longer than a plain header holds
    archive(tmp_path / "train-0000.tar", member("d/", type=tarfile.DIRTYPE), *pair("d/x", 10, RED), form=form)
    archive(tmp_path / "train-0001.tar", *pair(long, 9, BLUE, "jpg"), member("d/x.txt", b"words"), form=form)
    archive(tmp_path / "val-0000.tar", *pair("t", 9, BLUE), form=form)
    source = opened(tmp_path)
    assert source.classes == ("9", "10")
    assert source.train_files == {"9": (f"train-0001.tar/{long}.jpg",), "10": ("train-0000.tar/d/x.png",)}
    assert source.test_files == {"9": ("val-0000.tar/t.png",)}
    assert source.read("train-0000.tar/d/x.png") == encoded(RED)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-0000.tar", "train-0001.tar", "val-0000.tar"]


def test_labels_may_be_words_in_json_and_a_number_goes_before(tmp_path: Path) -> None:
    words = [member("a.jpg", encoded()), member("a.json", b'{"label": "cat", "size": 3}')]
    words += [member("b.webp", encoded(kind="WEBP")), member("b.json", b'{"label": "dog"}')]
    assert opened(archive(tmp_path / "w.tar", *words)).classes == ("cat", "dog")
    both = [*GOOD, member("a.json", b'{"caption": "nothing of a label"}'), member("c.json", b"{}")]
    assert opened(archive(tmp_path / "b.tar", *both)).classes == ("0", "1")


def test_it_is_a_dataset_like_any_other(tmp_path: Path) -> None:
    members = [each for n in range(20) for each in pair(f"{n:03d}", n % 2)]
    members += [member("bad.png", b"no picture"), member("bad.cls", b"0")]
    data = open_dataset(JobSpec(dataset=f"webdataset://{archive(tmp_path / 'x.tar', *members)}"), COLOUR)
    assert (data.num_train, data.num_test, data.skipped) == (18, 2, ["x.tar/bad.png"])


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
HOSTILE: dict[str, Callable[[], list[tuple[tarfile.TarInfo, bytes]]]] = {
    "a symbolic link": lambda: [member("c.png", **LINK), member("c.cls", b"0")],
    "a hard link": lambda: [member("c.png", type=tarfile.LNKTYPE, linkname="a.png"), member("c.cls", b"0")],
    "a device": lambda: [member("c.png", type=tarfile.CHRTYPE), member("c.cls", b"0")],
    "a pipe": lambda: [member("c.png", type=tarfile.FIFOTYPE), member("c.cls", b"0")],
    "an absolute name": lambda: pair("/etc/c", 0),
    "a name that leads up": lambda: pair("x/../../c", 0),
    "a name with a backslash": lambda: pair("..\\c", 0),
    "a name twice": lambda: pair("a", 0),
    "two images under a key": lambda: [member("a.jpg", encoded())],
    "an image without a label": lambda: [member("c.png", encoded())],
    "a label without an image": lambda: [member("c.cls", b"0")],
    "a label that is no number": lambda: [member("c.png", encoded()), member("c.cls", b"cat")],
    "an unlabelled image": lambda: [member("c.png", encoded()), member("c.cls", b"-1")],
    "a truth value": lambda: [member("c.png", encoded()), member("c.json", b'{"label": true}')],
    "deep JSON": lambda: [member("c.png", encoded()), member("c.json", b"[" * 60_000)],
    "a long label": lambda: [member("c.png", encoded()), member("c.cls", b"1" * 70_000)],
    "a number of 5,000 digits": lambda: [member("c.png", encoded()), member("c.cls", b"1" * 5_000)],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_member_that_has_no_place_in_a_dataset_is_refused(tmp_path: Path, what: str) -> None:
    error = refused(archive(tmp_path / "x.tar", *GOOD, *HOSTILE[what]()))
    assert error.code == "bad_member" and "x.tar" in error.message


def test_sizes_that_are_too_large_are_refused_by_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "MAX_IMAGE_BYTES", 20)
    assert "more than 20" in refused(archive(tmp_path / "x.tar", *GOOD)).message
    monkeypatch.undo()
    monkeypatch.setattr(webdataset, "MAX_MEMBERS", 3)
    assert "more than 3 members" in refused(archive(tmp_path / "x.tar", *GOOD)).message


def test_a_header_that_claims_to_be_huge_is_not_taken_into_memory(tmp_path: Path) -> None:
    """A pax header of 100 GB in a file of no weight: the library would read it whole."""
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 100 << 30
        path = tmp_path / "bomb.tar"
        path.write_bytes(archive(tmp_path / "good.tar", *GOOD).read_bytes()[:-10240] + info.tobuf(tarfile.GNU_FORMAT))
        with path.open("r+b") as file:
            file.truncate(101 << 30)
        assert refused(path).code == "bad_archive"


def test_an_archive_that_is_cut_or_damaged_is_refused_and_loses_nothing_in_silence(tmp_path: Path) -> None:
    content = archive(tmp_path / "x.tar", *GOOD, form=tarfile.USTAR_FORMAT).read_bytes()
    end = content.rindex(b"b.cls") + 1024  # behind the last member
    for cut in (0, 100, 512, 700, 1024, end - 512, end):
        (tmp_path / "x.tar").write_bytes(content[:cut])
        assert refused(tmp_path / "x.tar").code == "bad_archive", cut
    third = content.index(b"b.png")
    (tmp_path / "x.tar").write_bytes(content[:third] + b"\xff" + content[third + 1 :])
    assert refused(tmp_path / "x.tar").code == "bad_archive"
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    assert refused(tmp_path / "x.tar").code == "bad_archive"


def test_a_pipe_is_not_waited_for_and_a_link_put_there_since_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes/train.tar")
    assert refused(tmp_path / "pipes").code == "bad_archive"
    path = archive(tmp_path / "x.tar", *GOOD)
    source = opened(path)
    path.rename(tmp_path / "secret.tar")
    path.symlink_to(tmp_path / "secret.tar")
    with pytest.raises(OSError):
        source.read("x.tar/a.png")


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_damaged_archive_is_refused_or_read_and_never_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = archive(tmp_path_factory.mktemp("damaged") / "x.tar", *GOOD, form=tarfile.USTAR_FORMAT)
    content = bytearray(path.read_bytes()[: 10 * 512])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        source = opened(path)
    except UserError as error:
        assert error.code
        return
    for names in source.train_files.values():
        assert all(len(source.read(name)) <= len(content) for name in names)
