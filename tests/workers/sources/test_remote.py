"""Datasets in object stores: a local S3 server, and fsspec's memory in place of Google's store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from scheduler.errors import CapacityError, SystemFault, UserError
from tests.workers.sources.makers import archive, encoded, pair, table
from workers.contract import JobSpec
from workers.data import open_dataset
from workers.model import ModelInput
from workers.sources import remote
from workers.sources.address import check_address, parse_address
from workers.sources.opening import open_source
from workers.sources.remote import fetch

COLOUR = ModelInput(16, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5), "bicubic")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("D2FT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "_held", {})
    yield tmp_path / "home"
    for lock in remote._held.values():
        os.close(lock)


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    store = boto3.resource("s3")
    made = store.create_bucket(Bucket="data")
    yield made
    made.objects.all().delete()
    made.delete()
    store.meta.client.close()


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    files.store.clear()
    monkeypatch.setattr(remote, "filesystem", lambda store: files)
    yield files
    files.store.clear()


def folder_in(bucket: Any, prefix: str = "sets/pets") -> None:
    for label in ("cat", "dog"):
        for n in range(3):
            bucket.put_object(Key=f"{prefix}/train/{label}/{n}.png", Body=encoded())
    bucket.put_object(Key=f"{prefix}/test/cat/9.png", Body=encoded())
    bucket.put_object(Key=f"{prefix}/notes.txt", Body=b"nothing to learn from")


def copies(home: Path) -> list[Path]:
    return [path for path in (home / "cache").iterdir() if path.is_dir()]


def test_copies_lie_below_this_machines_home_else_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2FT_HOME", "/of/this/machine")
    monkeypatch.setenv("D2FT_SERVICE_HOME", "/of/the/service")
    assert remote.cache_dir() == Path("/of/this/machine/cache")
    monkeypatch.delenv("D2FT_HOME")
    assert remote.cache_dir() == Path("/of/the/service/cache")
    monkeypatch.delenv("D2FT_SERVICE_HOME")
    assert remote.cache_dir() == Path.home() / ".d2ft/cache"


def test_a_folder_in_s3_is_copied_once_and_opened(bucket: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_in(bucket)
    folder_in(bucket, "sets/pets-too")
    spec, beats = JobSpec(dataset="folder+s3://data/sets/pets/"), list[int]()
    data = open_dataset(spec, COLOUR, progress=lambda: beats.append(1))
    assert (data.classes, data.num_train, data.num_test, data.skipped) == (("cat", "dog"), 6, 1, [])
    assert len(beats) >= 7
    (copy,) = copies(home)
    assert sorted(path.name for path in copy.iterdir()) == ["test", "train"]
    monkeypatch.setattr(remote, "_copy", lambda *_: pytest.fail("copied twice"))
    assert open_dataset(spec, COLOUR).num_train == 6


def test_what_changes_in_the_store_is_another_copy(bucket: Any, home: Path) -> None:
    folder_in(bucket)
    address = parse_address("folder+s3://data/sets/pets")
    first = fetch(address)
    bucket.put_object(Key="sets/pets/train/cat/0.png", Body=encoded((1, 2, 3)))  # of the same size, say
    second = fetch(address)
    assert first.path != second.path
    assert (Path(second.path) / "train/cat/0.png").read_bytes() == encoded((1, 2, 3))


def test_tables_and_archives_come_from_s3_as_files_and_as_prefixes(bucket: Any, home: Path, tmp_path: Path) -> None:
    rows = table(tmp_path / "t.parquet", [0, 1, 0], names=["a", "b"], columns=("img", "label"))
    bucket.put_object(Key="one/t.parquet", Body=rows.read_bytes())
    bucket.put_object(Key="many/data/train-0.parquet", Body=rows.read_bytes())
    shard = archive(tmp_path / "x.tar", *pair("a", 0), *pair("b", 1))
    bucket.put_object(Key="tars/train-0.tar", Body=shard.read_bytes())
    for uri in ("parquet+s3://data/one/t.parquet?image=img", "parquet+s3://data/many?image=img"):
        assert open_source(parse_address(uri)).classes == ("a", "b")
    for uri in ("webdataset+s3://data/tars", "webdataset+s3://data/tars/train-0.tar"):
        assert open_source(parse_address(uri)).classes == ("0", "1")


def test_what_is_not_there_is_told_with_a_remedy(bucket: Any, home: Path) -> None:
    for uri in ("folder+s3://data/none", "folder+s3://nobucket/x"):
        with pytest.raises(UserError) as caught:
            fetch(parse_address(uri))
        assert caught.value.code == "dataset_not_found" and caught.value.remedy


def test_a_store_that_does_not_answer_is_a_fault_that_may_be_tried_again(
    home: Path, monkeypatch: pytest.MonkeyPatch, memory: Any
) -> None:
    monkeypatch.setattr(memory, "find", lambda *_, **__: (_ for _ in ()).throw(TimeoutError("no answer")))
    with pytest.raises(SystemFault) as caught:
        fetch(parse_address("folder+gs://data/x"))
    assert caught.value.code == "dataset_fetch_failed"


def fill(memory: Any, prefix: str = "/data/pets", count: int = 3) -> None:
    for label in ("cat", "dog"):
        for n in range(count):
            memory.pipe_file(f"{prefix}/train/{label}/{n}.png", encoded())


def test_googles_store_goes_the_same_way(home: Path, memory: Any) -> None:
    fill(memory)
    data = open_dataset(JobSpec(dataset="folder+gs://data/pets"), COLOUR)
    assert (data.num_train, data.num_test) == (4, 2)


def test_a_copy_that_breaks_off_leaves_nothing_and_is_made_anew(
    home: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(memory)
    address, real = parse_address("folder+gs://data/pets"), memory.get_file

    def torn(source: str, target: str, **options: Any) -> None:
        if source.endswith("dog/1.png"):
            raise ConnectionError("gone")
        real(source, target, **options)

    monkeypatch.setattr(memory, "get_file", torn)
    with pytest.raises(SystemFault, match="gone"):
        fetch(address)
    assert copies(home) == []
    monkeypatch.setattr(memory, "get_file", lambda source, target, **_: Path(target).write_bytes(b"short"))
    with pytest.raises(SystemFault) as caught:
        fetch(address)
    assert caught.value.code == "dataset_changed" and copies(home) == []
    monkeypatch.setattr(memory, "get_file", real)
    (home / "cache" / f".{'0' * 32}.left").mkdir()
    assert len(list(Path(fetch(address).path).rglob("*.png"))) == 6


def test_one_that_changes_while_it_is_copied_is_not_kept(
    home: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(memory)
    real = memory.get_file

    def changing(source: str, target: str, **options: Any) -> None:
        real(source, target, **options)
        memory.pipe_file("/data/pets/train/cat/new.png", encoded())

    monkeypatch.setattr(memory, "get_file", changing)
    with pytest.raises(SystemFault) as caught:
        fetch(parse_address("folder+gs://data/pets"))
    assert caught.value.code == "dataset_changed" and copies(home) == []


@pytest.mark.parametrize("name", ["../../evil.png", "train/../x.png", "/etc/x.png", "a\\..\\x.png", "a\0.png"])
def test_names_that_lead_out_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    class Hostile:
        def find(self, path: str, detail: bool) -> dict[str, Any]:
            return {f"{path}/{name}": {"type": "file", "size": 3}}

        def _strip_protocol(self, path: str) -> str:
            return path

    monkeypatch.setattr(remote, "filesystem", lambda store: Hostile())
    with pytest.raises(UserError) as caught:
        fetch(parse_address("folder+gs://data/pets"))
    assert caught.value.code == "bad_remote_name" and not (home / "cache").exists()


def test_too_much_is_refused_before_it_is_copied(home: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(memory)
    monkeypatch.setattr(remote, "MAX_CACHE_BYTES", 100)
    with pytest.raises(UserError) as caught:
        fetch(parse_address("folder+gs://data/pets"))
    assert caught.value.code == "dataset_too_large"


def test_old_copies_make_room_but_not_those_in_use(home: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two", "three"):
        fill(memory, f"/data/{name}")
    size = 6 * len(encoded())
    monkeypatch.setattr(remote, "MAX_CACHE_BYTES", 2 * size)
    one, two = (Path(fetch(parse_address(f"folder+gs://data/{name}")).path) for name in ("one", "two"))
    os.utime(two, (1, 1))
    with pytest.raises(CapacityError) as caught:
        fetch(parse_address("folder+gs://data/three"))
    assert caught.value.code == "disk_full" and one.exists() and two.exists()
    os.close(remote._held.pop(one.name))
    three = Path(fetch(parse_address("folder+gs://data/three")).path)
    assert not one.exists() and two.exists() and three.exists()


def test_many_at_once_copy_once(home: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(memory, count=10)
    copied, real = list[str](), remote._copy
    monkeypatch.setattr(remote, "_copy", lambda *args: (copied.append("x"), real(*args))[1])
    with ThreadPoolExecutor(6) as threads:
        paths = list(threads.map(lambda _: fetch(parse_address("folder+gs://data/pets")).path, range(6)))
    assert len(set(paths)) == 1 and copied == ["x"]


def test_without_the_library_the_extra_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str, **_: Any) -> None:
        raise ImportError(f"Install {protocol}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    for store, extra in (("s3", "d2ft[s3]"), ("gs", "d2ft[gcs]")):
        with pytest.raises(UserError) as caught:
            fetch(parse_address(f"folder+{store}://data/x"))
        assert caught.value.remedy is not None and extra in caught.value.remedy


def test_only_prefixes_that_the_operator_lists_are_allowed(tmp_path: Path) -> None:
    roots = [tmp_path, "s3://data/sets/", "gs://open"]
    for uri in ("folder+s3://data/sets", "parquet+s3://data/sets/pets?image=img", "webdataset+gs://open/x.tar"):
        assert check_address(uri, roots).store
    for uri in ("folder+s3://data/sets-too/x", "folder+gs://data/sets/x", "folder+s3://data", "folder+gs://opened/x"):
        with pytest.raises(UserError) as caught:
            check_address(uri, roots)
        assert caught.value.code == "outside_roots"
    for uri in ("folder+s3://data/sets/../x", "folder+s3://data/sets/%2e%2e/x", "folder+s3:///x", "folder+s3://a//b"):
        with pytest.raises(UserError) as caught:
            check_address(uri, roots)
        assert caught.value.code == "bad_dataset_uri"
    (tmp_path / "s3:/data/sets").mkdir(parents=True)
    with pytest.raises(UserError):
        check_address("folder://s3:/data/sets", ["s3://data/sets"])
