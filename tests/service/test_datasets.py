"""Registered datasets: named, listed, looked into, and used by jobs."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from hypothesis import given
from hypothesis import settings as tries
from PIL import Image
from starlette.testclient import TestClient

from service.app import create_app
from service.errors import ConflictError, NotFoundError
from service.home import read_secret
from service.schemas import DatasetBody, UserBody
from service.settings import Settings
from service.store import Caller, DatasetQuery, Store
from service.store import datasets as shelf
from service.thumbnails import Thumbnails
from tests.service.conftest import URL
from tests.service.test_routes import problem
from tests.service.test_thumbnails import HOSTILE, child_peak_bytes, draw
from workers import images

CODE = "dataset_not_registered"


@pytest.fixture
def data(home: Path, api: TestClient) -> Path:
    """An image folder under the roots: two classes with three images each, and one test image."""
    for label in ("cat", "dog"):
        for n in range(3):
            draw(home / "data" / "train" / label / f"{n}.png")
    draw(home / "data" / "test" / "cat" / "9.jpg", (300, 200))
    return home / "data"


@pytest.fixture
def register(api: TestClient) -> Callable[..., dict[str, Any]]:
    def send(name: str, folder: Path, client: TestClient = api) -> dict[str, Any]:
        answer = client.post("/v1/datasets", json={"name": name, "uri": f"folder://{folder}"})
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    return send


@pytest.fixture
def member(api: TestClient) -> TestClient:
    """A second client of the same application, with the key of a user who is no administrator."""
    assert api.post("/v1/users", json={"name": "bea"}).status_code == 201
    key = api.post("/v1/keys", json={"user": "bea"}).json()["key"]
    other = TestClient(api.app, base_url=URL, raise_server_exceptions=False)
    other.headers["Authorization"] = f"Bearer {key}"
    return other


def samples(api: TestClient, name: str, **params: Any) -> list[dict[str, Any]]:
    answer = api.get(f"/v1/datasets/{name}/samples", params=params)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


def picture(sample: dict[str, Any]) -> Image.Image:
    assert sample["error"] is None, sample
    return Image.open(BytesIO(base64.b64decode(sample["thumbnail"].removeprefix("data:image/png;base64,"))))


def test_a_folder_is_registered_and_read_back_by_id_and_by_name(
    api: TestClient, data: Path, register: Callable[..., Any]
) -> None:
    made = register("pets", data)
    assert made["object"] == "dataset" and made["owner"] == "admin"
    assert (made["num_classes"], made["num_train"], made["num_test"]) == (2, 6, 1)
    assert made["classes"][0] == {"name": "cat", "num_train": 3, "num_test": 1}
    assert api.get(f"/v1/datasets/{made['id']}").json() == made
    assert api.get("/v1/datasets/pets").json() == made
    assert api.get("/datasets").json()["data"] == [{**made, "classes": []}]


def test_the_same_again_is_listed_anew_and_another_folder_is_a_conflict(
    api: TestClient, data: Path, register: Callable[..., Any]
) -> None:
    made = register("pets", data)
    draw(data / "train" / "cow" / "0.png")
    again = api.post("/v1/datasets", json={"name": "pets", "uri": f"folder://{data}/"})
    assert again.status_code == 200 and again.json()["id"] == made["id"] and again.json()["num_classes"] == 3
    draw(data.parent / "more" / "train" / "cat" / "0.png")
    draw(data.parent / "more" / "train" / "dog" / "0.png")
    found = problem(api.post("/v1/datasets", json={"name": "pets", "uri": f"folder://{data.parent}/more"}), 409)
    assert (found["code"], found["param"]) == ("dataset_exists", "name") and "delete" in found["detail"]


def test_inspecting_updates_the_summary_and_names_what_broke(
    api: TestClient, data: Path, register: Callable[..., Any]
) -> None:
    register("pets", data)
    draw(data / "train" / "dog" / "7.png")
    assert api.post("/v1/datasets/pets/inspect").json()["num_train"] == 7
    assert api.get("/v1/datasets/pets").json()["num_train"] == 7
    (data / "train" / "empty").mkdir()
    for answer in (api.post("/v1/datasets/pets/inspect"), api.get("/v1/datasets/pets/samples")):
        found = problem(answer, 409)
        assert found["code"] == "empty_class" and "'empty'" in found["detail"]
    assert api.get("/v1/datasets/pets").json()["num_train"] == 7


def test_a_forgotten_dataset_is_gone_and_its_files_stay(
    api: TestClient, data: Path, register: Callable[..., Any]
) -> None:
    made = register("pets", data)
    assert api.delete("/v1/datasets/pets").json()["id"] == made["id"]
    assert problem(api.get("/v1/datasets/pets"), 404)["code"] == CODE
    assert problem(api.delete(f"/v1/datasets/{made['id']}"), 404)["code"] == CODE
    assert (data / "train" / "cat" / "0.png").exists()
    assert register("pets", data)["id"] != made["id"]


@pytest.mark.parametrize(
    ("name", "uri", "param", "code"),
    [
        ("pets", "folder:///etc", "uri", "outside_roots"),
        ("pets", "folder://HOME/data/../../../../etc", "uri", "outside_roots"),
        ("pets", "folder://HOME/%2e%2e/%2e%2e/etc", "uri", "outside_roots"),
        ("pets", "folder://HOME/none", "uri", "dataset_not_found"),
        ("pets", "folder://HOME/none%ff", "uri", "dataset_not_found"),
        ("pets", "folder://HOME/data/train", "uri", "dataset_no_train"),
        ("pets", "folder://HOME/nul%00", "uri", "bad_dataset_uri"),
        ("pets", "s3://bucket", "uri", "bad_dataset_uri"),
        ("pets", "digits", "uri", "bad_dataset_uri"),
        ("pets", "", "uri", "invalid_request"),
        ("a/b", "folder://HOME/data", "name", "invalid_request"),
        ("<b>", "folder://HOME/data", "name", "invalid_request"),
        ("x" * 81, "folder://HOME/data", "name", "invalid_request"),
    ],
)
def test_what_cannot_be_registered_is_refused_by_field(
    api: TestClient, home: Path, data: Path, name: str, uri: str, param: str, code: str
) -> None:
    found = problem(api.post("/v1/datasets", json={"name": name, "uri": uri.replace("HOME", str(home))}), 422)
    assert (found["param"], found["code"]) == (param, code)
    assert api.get("/v1/datasets").json()["data"] == []


def test_lists_page_newest_first_and_search_names_and_folders(
    api: TestClient, data: Path, register: Callable[..., Any]
) -> None:
    for name in ("one", "Two", "three_x"):
        register(name, data)

    def names(**params: Any) -> list[str]:
        return [each["name"] for each in api.get("/v1/datasets", params=params).json()["data"]]

    assert names() == ["three_x", "Two", "one"]
    first = api.get("/v1/datasets", params={"limit": 2}).json()
    assert first["has_more"] and names(limit=2, after=first["last_id"]) == ["one"]
    assert names(search="tW") == ["Two"] and names(search="/DATA") == ["three_x", "Two", "one"]
    assert names(search="e_x") == ["three_x"] and names(search="t_o") == names(search="%") == []
    assert problem(api.get("/v1/datasets", params={"after": "dataset_none"}), 404)["code"] == CODE
    assert problem(api.get("/v1/datasets", params={"limit": 0}), 422)["param"] == "limit"


def test_users_do_not_see_each_others_datasets(
    api: TestClient, member: TestClient, data: Path, register: Callable[..., Any]
) -> None:
    mine, theirs = register("pets", data), register("pets", data, member)
    hidden = register("hidden", data)
    assert [each["id"] for each in member.get("/v1/datasets").json()["data"]] == [theirs["id"]]
    assert len(api.get("/v1/datasets").json()["data"]) == 3  # an administrator sees all, and by name the own
    assert api.get("/v1/datasets/pets").json()["id"] == mine["id"]
    assert member.get("/v1/datasets/pets").json()["id"] == theirs["id"]
    for key in (mine["id"], hidden["id"], "hidden"):
        root = f"/v1/datasets/{key}"
        asked = (member.get(root), member.get(f"{root}/samples"), member.post(f"{root}/inspect"), member.delete(root))
        assert [problem(answer, 404)["code"] for answer in asked] == [CODE] * 4
        assert problem(member.get("/v1/datasets", params={"after": key}), 404)["code"] == CODE
    assert problem(member.post("/v1/jobs", json={"dataset": "dataset:hidden"}), 422)["code"] == CODE
    assert api.delete(f"/v1/datasets/{theirs['id']}").status_code == 200


@pytest.mark.parametrize("kind", ["store_url", "database"])
def test_sqlite_and_postgres_agree(request: pytest.FixtureRequest, kind: str) -> None:
    store = Store(request.getfixturevalue(kind))
    first = Caller("user_first", "key_x", "admin", frozenset({"admin"}))
    bea = Caller(store.access.make_user(UserBody(name="bea")).id, "key_y", "member", frozenset({"read"}))
    summary = {"classes": [{"name": "\ufffd<b>\n", "num_train": 2, "num_test": 1}], "inspected_at": 5}
    body = DatasetBody(name="Pets", uri="folder:///a%20b")
    made, fresh = store.datasets.register(body, summary, first)
    assert fresh and store.datasets.get("Pets", first) == store.datasets.get(made.id, first) == made
    assert store.datasets.register(DatasetBody(name="Pets", uri="folder:///a b/"), summary, first) == (made, False)
    with pytest.raises(ConflictError, match="another address"):
        store.datasets.register(DatasetBody(name="Pets", uri="folder:///c"), summary, first)
    theirs, _ = store.datasets.register(body, summary, bea)
    assert [each.id for each in store.datasets.list(DatasetQuery(search="pET"), first).data] == [theirs.id, made.id]
    assert [each.id for each in store.datasets.list(DatasetQuery(after=theirs.id), first).data] == [made.id]
    assert [each.id for each in store.datasets.list(DatasetQuery(), bea).data] == [theirs.id]
    assert store.datasets.update(made.id, {**summary, "classes": []}, first).num_train == 0
    assert store.datasets.forget("Pets", bea) == theirs and store.datasets.uris(bea.user_id) == {}
    with pytest.raises(NotFoundError):
        store.datasets.forget(made.id, bea)
    store.close()


def test_a_user_can_register_only_so_many(
    api: TestClient, data: Path, register: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "MAX_EACH", 1)
    register("one", data)
    answer = api.post("/v1/datasets", json={"name": "two", "uri": f"folder://{data}"})
    assert problem(answer, 429)["code"] == "too_many_datasets"


def test_a_job_names_a_registered_dataset_and_keeps_its_folder(
    api: TestClient, data: Path, register: Callable[..., Any]
) -> None:
    register("pets", data)
    made = api.post("/v1/jobs", json={"dataset": "dataset:pets"})
    assert made.status_code == 201 and made.json()["dataset"] == f"folder://{data}"
    found = problem(api.post("/v1/jobs", json={"dataset": "dataset:pet"}), 422)
    assert (found["code"], found["param"]) == (CODE, "dataset") and "Did you mean pets?" in found["detail"]
    assert "POST /v1/datasets" in problem(api.post("/v1/jobs", json={"dataset": "dataset:qqq"}), 422)["detail"]
    headers = {"Idempotency-Key": "k"}
    first = api.post("/v1/jobs", json={"dataset": "dataset:pets"}, headers=headers).json()
    assert api.post("/v1/jobs", json={"dataset": "dataset:pets"}, headers=headers).json()["id"] == first["id"]
    assert api.post("/v1/jobs", json={"dataset": "dataset:pets\nx"}).status_code == 422


def test_samples_show_images_of_every_class(api: TestClient, data: Path, register: Callable[..., Any]) -> None:
    register("pets", data)
    found = samples(api, "pets", per_class=2)
    assert [(each["label"], each["file"]) for each in found] == [
        ("cat", "train/cat/0.png"),
        ("cat", "train/cat/1.png"),
        ("dog", "train/dog/0.png"),
        ("dog", "train/dog/1.png"),
    ]
    assert all(each["split"] == "train" and picture(each).size == (32, 24) for each in found)
    assert [each["label"] for each in samples(api, "pets", per_class=8, limit=3)] == ["cat", "cat", "dog"]
    (shown,) = samples(api, "pets", split="test")
    assert (shown["width"], shown["height"]) == (300, 200) and picture(shown).size == (96, 64)
    for params in ({"per_class": 0}, {"per_class": 9}, {"limit": 65}, {"limit": 0}, {"split": "val"}):
        problem(api.get("/v1/datasets/pets/samples", params=params), 422)


def test_samples_of_a_folder_without_a_test_split_are_none(
    api: TestClient, home: Path, register: Callable[..., Any]
) -> None:
    draw(home / "x" / "train" / "cat" / "0.png")
    draw(home / "x" / "train" / "dog" / "0.png")
    register("x", home / "x")
    assert samples(api, "x", split="test") == []


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_that_training_reads_has_a_thumbnail(
    api: TestClient, home: Path, register: Callable[..., Any], mode: str
) -> None:
    draw(home / "x" / "train" / "cat" / "0.png", mode=mode)
    draw(home / "x" / "train" / "dog" / "0.png")
    register("x", home / "x")
    assert picture(samples(api, "x")[0]).mode in ("L", "RGB")
    assert images.decode((home / "x/train/cat/0.png").read_bytes(), "RGB").size == (32, 24)


def test_a_thumbnail_carries_no_colour_profile(api: TestClient, home: Path, register: Callable[..., Any]) -> None:
    draw(home / "x" / "train" / "cat" / "0.png", icc_profile=os.urandom(300_000))
    draw(home / "x" / "train" / "dog" / "0.png")
    register("x", home / "x")
    shown = samples(api, "x")[0]
    assert len(shown["thumbnail"]) < 1000 and "icc_profile" not in picture(shown).info


def test_names_are_shown_as_they_are_but_as_unicode(api: TestClient, home: Path, register: Callable[..., Any]) -> None:
    label, broken = "<img src=x onerror=alert(1)>\x1b[31m\n", os.fsdecode(b"caf\xe9")
    draw(home / "x" / "train" / label / "a'\"&\t.png")
    draw(home / "x" / "train" / broken / f"{broken}.png")
    made = register("x", home / "x")
    assert [each["name"] for each in made["classes"]] == [label, "caf\ufffd"]
    found = samples(api, "x")
    assert [each["label"] for each in found] == [label, "caf\ufffd"] and all(picture(each) for each in found)
    (home / "x" / "train" / broken / f"{broken}.png").unlink()
    assert "caf\ufffd" in problem(api.post("/v1/datasets/x/inspect"), 409)["detail"]
    answer = api.post("/v1/datasets", json={"name": "y", "uri": f"folder://{home}/x"})
    assert "caf\ufffd" in problem(answer, 422)["detail"]


def test_a_link_out_of_the_folder_is_not_followed(
    api: TestClient, settings: Settings, home: Path, register: Callable[..., Any]
) -> None:
    secret = draw(home / "secret.png")
    draw(home / "x" / "train" / "cat" / "0.png")
    draw(home / "x" / "train" / "dog" / "0.png")
    register("x", home / "x")
    (home / "x" / "train" / "cat" / "1.png").symlink_to(secret)
    assert problem(api.get("/v1/datasets/x/samples"), 409)["code"] == "outside_roots"
    (told,) = asyncio.run(Thumbnails(settings).make((home / "x").resolve(), ["train/cat/1.png"]))
    assert "leads out" in told["error"]


@pytest.mark.parametrize("side", [9_000, 13_000])
def test_a_bomb_is_an_error_and_takes_no_memory(
    api: TestClient, home: Path, register: Callable[..., Any], side: int
) -> None:
    bomb = draw(home / "x" / "train" / "cat" / "0.png", (side, side), "1", compress_level=9)
    assert bomb.stat().st_size < 40_000
    draw(home / "x" / "train" / "dog" / "0.png")
    register("x", home / "x")
    before = psutil.Process().memory_info().rss
    cat, dog = samples(api, "x")
    assert "more than 25000000 pixels" in cat["error"] and picture(dog)
    assert psutil.Process().memory_info().rss - before < 50e6
    assert child_peak_bytes(home / "x", ["train/cat/0.png"])[1] < 60e6


def test_five_thousand_files_are_quick(api: TestClient, home: Path, register: Callable[..., Any]) -> None:
    content = draw(home / "x" / "train" / "c0" / "0.png").read_bytes()
    for n in range(5000):
        file = home / "x" / "train" / f"c{n % 50}" / f"{n}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    start = time.monotonic()
    made = register("x", home / "x")
    found = samples(api, "x", per_class=1)
    assert (made["num_classes"], made["num_train"]) == (50, 5000)
    assert len(found) == 50 and all(each["error"] is None for each in found)
    assert time.monotonic() - start < 5


@tries(max_examples=60, deadline=None)
@given(name=HOSTILE)
def test_hostile_addresses_never_register_what_lies_outside(walls: tuple[TestClient, Path], name: str) -> None:
    api, root = walls
    with contextlib.suppress(UnicodeEncodeError, httpx2.InvalidURL):
        answer = api.post("/v1/datasets", json={"name": "x", "uri": f"folder://{root}/{name}"})
        assert answer.status_code == 422, answer.text


@pytest.fixture(scope="module")
def walls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Path]]:
    """An application with one root, and a whole dataset beside that root."""
    top = tmp_path_factory.mktemp("walls")
    draw(top / "train" / "cat" / "0.png")
    draw(top / "train" / "dog" / "0.png")
    (top / "home" / "in").mkdir(parents=True)
    (top / "home" / "away").symlink_to(top)
    app = create_app(Settings(home=top / "home", use_gpu=False), supervise=False)
    api = TestClient(app, base_url=URL, raise_server_exceptions=False)
    api.headers["Authorization"] = f"Bearer {read_secret(top / 'home' / 'key')}"
    yield api, top / "home"
    app.state.world.store.close()
