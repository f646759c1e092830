"""Image folders: addresses, roots and listings."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scheduler.errors import UserError
from workers.sources.address import ROOTS_SETTING, Address, check_inside, parse_address
from workers.sources.folder import open_folder


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def refused(root: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        open_folder(Address("folder", str(root)))
    assert caught.value.param == "dataset"
    assert caught.value.remedy
    return caught.value


def test_a_listing_is_sorted_and_passes_over_hidden_entries_and_other_types(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/b.PNG", "train/cat/a.jpg", "train/cat/notes.txt", "train/cat/.c.jpg", "train/ant/x.webp")
    touch(tmp_path, "train/.cache/x.jpg", "train/readme.md", "test/cat/t.jpeg")
    source = open_folder(Address("folder", str(tmp_path)))
    assert source.classes == ("ant", "cat")
    assert source.train_files == {"ant": ("train/ant/x.webp",), "cat": ("train/cat/a.jpg", "train/cat/b.PNG")}
    assert source.root == tmp_path
    assert source.test_files == {"cat": ("test/cat/t.jpeg",)}


def test_val_serves_as_test_and_neither_is_none(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg")
    assert open_folder(Address("folder", str(tmp_path))).test_files is None
    touch(tmp_path, "val/a/1.jpg")
    assert open_folder(Address("folder", str(tmp_path))).test_files == {"a": ("val/a/1.jpg",)}


def test_each_broken_layout_is_refused_by_name(tmp_path: Path) -> None:
    assert refused(tmp_path / "none").code == "dataset_not_found"
    assert refused(touch(tmp_path / "flat", "a.jpg")).code == "dataset_no_train"
    assert refused(touch(tmp_path / "loose", "train/a.jpg")).code == "dataset_no_classes"
    empty = refused(touch(tmp_path / "empty", "train/a/1.jpg", "train/bare/notes.txt"))
    assert empty.code == "empty_class" and "'bare'" in empty.message
    unknown = refused(touch(tmp_path / "unknown", "train/a/1.jpg", "test/zebra/1.jpg"))
    assert unknown.code == "unknown_test_class" and "'zebra'" in unknown.message
    (tmp_path / "hollow/test").mkdir(parents=True)
    assert refused(touch(tmp_path / "hollow", "train/a/1.jpg")).code == "empty_test"
    alone = refused(touch(tmp_path / "alone", "train/cat/1.jpg"))
    assert alone.code == "one_class" and "'cat'" in alone.message
    twins = refused(touch(tmp_path / "twins", "train/Cat/1.jpg", "train/cat/1.jpg", "train/dog/1.jpg"))
    assert twins.code == "ambiguous_classes" and "'Cat', 'cat'" in twins.message
    assert refused(touch(tmp_path, "file.jpg") / "file.jpg").code == "dataset_not_found"


@pytest.mark.parametrize("link", ["train", "train/a", "train/a/1.jpg", "test"])
def test_a_link_that_leads_out_of_the_dataset_is_refused(tmp_path: Path, link: str) -> None:
    touch(tmp_path / "elsewhere", "a/1.jpg", "1.jpg")
    root = touch(tmp_path / "set", "train/b/1.jpg")
    if link == "train":
        (root / "train").rename(root / "was")
    (root / link).parent.mkdir(parents=True, exist_ok=True)
    (root / link).symlink_to(tmp_path / "elsewhere" / ("1.jpg" if link.endswith("jpg") else ""))
    with pytest.raises(UserError) as caught:
        open_folder(Address("folder", str(root)))
    assert caught.value.code == "outside_roots"


def test_a_link_within_the_dataset_is_followed(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg")
    (tmp_path / "train/b").symlink_to(tmp_path / "train/a")
    assert open_folder(Address("folder", str(tmp_path))).train_files["b"] == ("train/b/1.jpg",)


def test_an_address_is_parsed_and_others_are_refused() -> None:
    assert parse_address("folder:///data/my%20set/") == Address("folder", "/data/my set")
    assert parse_address("folder:///data/a?b#c") == Address("folder", "/data/a?b#c")
    for bad in ("folder://host/data", "file:///data", "folder:data", "folder:///a%00b", "folder://[", "digits"):
        with pytest.raises(UserError) as caught:
            parse_address(bad)
        assert caught.value.code == "bad_dataset_uri"


def test_a_refused_path_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_inside("/etc/passwd", [tmp_path], param="weights")
    assert caught.value.code == "outside_roots"
    assert caught.value.param == "weights"
    assert caught.value.remedy is not None and ROOTS_SETTING in caught.value.remedy


def test_the_api_process_can_list_folders_without_torch_or_pillow() -> None:
    script = "import sys, workers.sources.opening; print(sorted({'torch', 'PIL', 'numpy', 'timm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PART = st.sampled_from(["..", ".", "in", "out", "link_out", "link_in", "loop", "file", "a\0b", "~", "", "x" * 300])


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(PART, max_size=6), absolute=st.booleans())
@example(parts=["loop", "..", "link_out"], absolute=True)
def test_a_path_that_passes_always_lies_inside_its_root(parts: list[str], absolute: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder).resolve()
        root = base / "root"
        touch(base, "root/in/file", "root/file", "out/file", "root_beside/file")
        (root / "link_out").symlink_to(base / "out")
        (root / "link_in").symlink_to(root / "in")
        (root / "loop").symlink_to(root / "loop")
        asked = "/".join([str(root) if absolute else f"{root}/in", *parts])
        try:
            passed = check_inside(asked, [root])
        except UserError as error:
            assert error.code == "outside_roots"
            return
        real = os.path.realpath(passed)
        assert real == str(passed)
        assert os.path.commonpath([real, root]) == str(root)
