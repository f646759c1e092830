"""Datasets that are no folders: checked when a job is submitted, registered, and never with torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from starlette.testclient import TestClient

from service.app import create_app
from service.checks import check_paths
from service.cli.request import dataset_uri, job_body
from service.home import read_secret
from service.settings import Settings
from tests.service.conftest import URL
from tests.service.test_datasets import picture
from tests.service.test_routes import problem
from tests.workers.sources.makers import BLUE, RED, archive, encoded, member, pair, table
from tests.workers.sources.test_hf import made, saved
from tests.workers.sources.test_torchvision import idx
from workers.contract import Augment, JobSpec


def test_a_job_s_table_and_archive_are_checked_at_submit(api: TestClient, home: Path) -> None:
    table(home / "set/train.parquet", [0, 1], names=["cat", "dog"])
    table(home / "odd.parquet", [0, 1], columns=("picture", "label"))
    archive(home / "good.tar", *pair("a", 0), *pair("b", 1))
    archive(home / "bad.tar", *pair("a", 0), member("../b.png"))
    for good in (f"parquet://{home}/set", f"webdataset://{home}/good.tar"):
        answer = api.post("/v1/jobs", json={"dataset": good, "augment": {"flip": True}})
        assert answer.status_code == 201, answer.text
    for bad, code in (
        (f"parquet://{home}/odd.parquet", "missing_column"),
        (f"parquet://{home}/odd.parquet?split=train", "bad_dataset_uri"),
        (f"parquet://{home}/../../etc", "outside_roots"),
        (f"webdataset://{home}/bad.tar", "bad_member"),
        (f"webdataset://{home}/odd.parquet", "bad_archive"),
        ("folder+s3://data/pets", "outside_roots"),
    ):
        (error,) = problem(api.post("/v1/jobs", json={"dataset": bad}), 422)["errors"]
        assert error["pointer"] == "/dataset", error
        assert problem(api.post("/v1/jobs", json={"dataset": bad}), 422)["code"] == code


def test_other_kinds_are_registered_with_their_classes(api: TestClient, home: Path) -> None:
    table(home / "set/train.parquet", [0, 1, 1], names=["cat", "dog"])
    table(home / "set/test.parquet", [0], names=["cat", "dog"])
    made = api.post("/v1/datasets", json={"name": "pets", "uri": f"parquet://{home}/set"}).json()
    assert made["classes"] == [
        {"name": "cat", "num_train": 1, "num_test": 1},
        {"name": "dog", "num_train": 2, "num_test": 0},
    ]
    assert api.post("/v1/jobs", json={"dataset": "dataset:pets"}).json()["dataset"] == f"parquet://{home}/set"


def test_every_kind_has_samples(api: TestClient, home: Path) -> None:
    images: list[bytes | None] = [encoded(RED), encoded(BLUE), b"no picture"]
    table(home / "set/train.parquet", [0, 1, 1], images=images, names=["cat", "dog"])
    archive(home / "x.tar", *pair("a", 0, RED), *pair("b", 1, BLUE))
    idx(home / "torch")
    saved(home / "hf", train=made([1, 0]))
    for name, uri, labels in (
        ("rows", f"parquet://{home}/set", ["cat", "dog", "dog"]),
        ("tars", f"webdataset://{home}/x.tar", ["0", "1"]),
        ("digits", f"torchvision:MNIST?root={home}/torch", [str(n // 2 if n < 4 else n - 2) for n in range(12)]),
        ("saved", f"hf:{home}/hf", ["ant", "zebra"]),
    ):
        answer = api.post("/v1/datasets", json={"name": name, "uri": uri})
        assert answer.status_code == 201, answer.text
        found = api.get(f"/v1/datasets/{name}/samples").json()["data"]
        assert [each["label"] for each in found] == labels
        shown = [picture(each) for each in found if each["error"] is None]
        assert len(shown) == len(found) - (name == "rows")
        if name in ("rows", "tars"):
            assert [image.getpixel((1, 1)) for image in shown] == [RED, BLUE]
        if name == "rows":
            assert "no image of the formats" in found[2]["error"]


def test_object_stores_are_open_as_far_as_the_operator_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2FT_ROOTS", f"{tmp_path}/a:s3://data/sets:{tmp_path}/b:gs://open")
    settings = Settings(home=tmp_path / "home", use_gpu=False)
    assert settings.roots == (tmp_path / "a", "s3://data/sets", tmp_path / "b", "gs://open")
    monkeypatch.setenv("D2FT_ROOTS", settings.as_env()["D2FT_ROOTS"])
    assert Settings(home=tmp_path / "home").roots == settings.roots
    assert check_paths(JobSpec(dataset="folder+s3://data/sets/pets"), settings.all_roots) == []
    (issue,) = check_paths(JobSpec(dataset="folder+s3://data/other"), settings.all_roots)
    assert issue.code == "outside_roots" and "s3://data/sets" in issue.message
    app = create_app(settings, supervise=False)
    with TestClient(app, base_url=URL) as api:
        api.headers["Authorization"] = f"Bearer {read_secret(settings.home / 'key')}"
        assert api.post("/v1/jobs", json={"dataset": "parquet+gs://open/pets"}).status_code == 201


@pytest.mark.parametrize("uri", ["folder+s3://data/sets/pets", f"hf:ann/pets@{'0' * 40}"])
def test_datasets_that_lie_elsewhere_are_registered_without_a_look(settings: Settings, uri: str) -> None:
    told = settings.model_copy(update={"roots": ("s3://data/sets", "hf://ann")})
    with TestClient(create_app(told, supervise=False), base_url=URL) as api:
        api.headers["Authorization"] = f"Bearer {read_secret(settings.home / 'key')}"
        answer = api.post("/v1/datasets", json={"name": "pets", "uri": uri})
        assert answer.status_code == 201, answer.text
        made = answer.json()
        unknown = ("num_classes", "num_train", "num_test", "inspected_at")
        assert made["uri"] == uri and made["classes"] == [] and all(made[name] is None for name in unknown)
        assert api.post("/v1/datasets", json={"name": "pets", "uri": uri}).status_code == 200
        assert api.get("/v1/datasets").json()["data"] == [made] and api.get("/v1/datasets/pets").json() == made
        for answer in (api.post("/v1/datasets/pets/inspect"), api.get("/v1/datasets/pets/samples")):
            found = problem(answer, 409)
            assert found["code"] == "remote_not_inspected" and "when a job begins" in found["detail"]
        assert api.post("/v1/jobs", json={"dataset": "dataset:pets"}).json()["dataset"] == uri
        for outside in ("folder+s3://data/other", "folder+gs://data/sets", f"hf:bob/pets@{'0' * 40}"):
            found = problem(api.post("/v1/datasets", json={"name": "x", "uri": outside}), 422)
            assert (found["code"], found["param"]) == ("outside_roots", "uri")
        assert api.delete("/v1/datasets/pets").status_code == 200


def test_flags_say_all_of_a_dataset() -> None:
    flags = {"dataset": "hf:/data/pets", "augment": ["flip=true", "crop_scale=[0.3,1]", "randaugment=rand-m9"]}
    spec = JobSpec.model_validate(job_body(flags))
    assert spec.dataset == "hf:/data/pets"
    assert spec.augment == Augment(flip=True, crop_scale=(0.3, 1.0), randaugment="rand-m9")
    for uri in ("torchvision:MNIST?root=/x", "parquet+s3://data/x", "webdataset:///x.tar", "dataset:pets", "digits"):
        assert dataset_uri(uri) == uri
    with pytest.raises(typer.BadParameter):
        job_body({"augment": ["flip"]})


def test_no_kind_loads_torch_or_decodes_images(tmp_path: Path) -> None:
    table(tmp_path / "t.parquet", [0, 1])
    archive(tmp_path / "x.tar", *pair("a", 0), *pair("b", 1))
    script = (
        "import sys; from workers.sources.opening import open_source;"
        "from workers.sources.address import parse_address;"
        "[open_source(parse_address(uri)) for uri in sys.argv[1:]];"
        "print(sorted({'torch', 'PIL', 'timm', 'ray', 'pandas'} & set(sys.modules)))"
    )
    uris = [f"parquet://{tmp_path}/t.parquet", f"webdataset://{tmp_path}/x.tar"]
    done = subprocess.run([sys.executable, "-c", script, *uris], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
