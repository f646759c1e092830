"""The models that can be trained, and what is said of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.home import read_secret
from service.processes import child_env
from service.settings import Settings
from tests.service.conftest import URL, write_catalogue
from tests.service.test_routes import problem
from workers.shapes import Measured, Sizes, shape_of

DIGITS, TINY, SMALL, LARGE = "d2ft_digits", "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_large_patch16_224"
COUNT = """
import json, sys, timm, torch
from workers import bundled
counts = {}
with torch.device("meta"):
    for name in sys.argv[1:]:
        timm_name, args = (bundled.TIMM_NAME, bundled.MODEL_ARGS) if name == "d2ft_digits" else (name, {})
        model = timm.create_model(timm_name, pretrained=False, **args, **({"num_classes": 10} if args else {}))
        counts[name] = sum(parameter.numel() for parameter in model.parameters())
print(json.dumps(counts))
"""


def ids(api: TestClient, **params: Any) -> list[str]:
    answer = api.get("/v1/models", params=params)
    assert answer.status_code == 200, answer.text
    return [each["id"] for each in answer.json()["data"]]


def test_models_that_work_are_listed_by_name(api: TestClient) -> None:
    assert ids(api) == [DIGITS, LARGE, SMALL, TINY]
    assert ids(api, search="TINY") == [TINY] and ids(api, search="resnet") == []
    found = api.get("/v1/models", params={"search": "tiny"}).json()["data"][0]
    assert found == {
        "id": TINY, "object": "model", "supported": True, "reason": None, "params": 5_717_416,
        "blocks": 12, "heads": 3, "dim": 192, "img_size": 224,
        "patch_size": 16, "in_chans": 3, "memory_bytes": 16 * 5_717_416,
    }  # fmt: skip
    assert api.get(f"/v1/models/{TINY}").json() == found


def test_models_page_by_name_and_are_narrowed_by_size(api: TestClient) -> None:
    first = api.get("/v1/models", params={"limit": 3}).json()
    assert first["has_more"] and first["last_id"] == SMALL
    rest = api.get("/v1/models", params={"after": SMALL, "limit": 3}).json()
    assert [each["id"] for each in rest["data"]] == [TINY] and not rest["has_more"]
    assert ids(api, after="vit_m") == [SMALL, TINY] and ids(api, after="zz") == []
    assert ids(api, min_params=5_717_416, max_params=30_000_000) == [SMALL, TINY]
    assert ids(api, max_params=5_717_415) == [DIGITS] and ids(api, max_params=0) == []
    for params in ({"limit": 0}, {"limit": 101}, {"min_params": -1}, {"max_params": "many"}):
        problem(api.get("/v1/models", params=params), 422)


def test_models_that_are_refused_are_listed_with_the_reason(api: TestClient, models: dict[str, Any]) -> None:
    (refused,) = api.get("/v1/models", params={"supported": "false"}).json()["data"]
    assert refused["id"] == "resnet50" and refused["supported"] is False and refused["params"] is None
    assert refused["reason"] == models["resnet50"]
    assert refused["reason"] in api.get("/v1/models/resnet50").json()["detail"]
    assert ids(api, supported="all") == sorted(models) and ids(api, supported="true") == ids(api)
    assert ids(api, supported="all", search="NET") == ["resnet50"]
    assert ids(api, supported="all", after=DIGITS, limit=2) == ["resnet50", LARGE]
    assert ids(api, supported="all", max_params=10**12) == ids(api)
    assert ids(api, supported="false", min_params=0) == []
    problem(api.get("/v1/models", params={"supported": "maybe"}), 422)


@pytest.mark.slow
def test_every_name_of_timm_is_listed_once_as_supported_or_refused(home: Path, settings: Settings) -> None:
    command = [sys.executable, "-c", "import json, timm; print(json.dumps(timm.list_models()))"]
    names = json.loads(subprocess.run(command, capture_output=True, text=True, env=child_env(), check=True).stdout)
    app = create_app(settings.model_copy(update={"catalogue_wait_s": 300}), supervise=False)
    with TestClient(app, base_url=URL) as api:
        api.headers["Authorization"] = f"Bearer {read_secret(home / 'key')}"
        found: dict[str, list[str]] = {}
        for supported in ("true", "false", "all"):
            rows, after = [], None
            while True:
                page = api.get("/v1/models", params={"supported": supported, "after": after or "", "limit": 100}).json()
                rows += page["data"]
                after = page["last_id"]
                if not page["has_more"]:
                    break
            assert all(each["supported"] == (each["reason"] is None) == (each["params"] is not None) for each in rows)
            found[supported] = [each["id"] for each in rows]
    assert sorted(found["true"] + found["false"]) == found["all"] == sorted([DIGITS, *names])


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [
        ("resnet50", "model_refused", "not a vision transformer"),
        ("vit_smal_patch16_224", "unknown_model", "vit_small_patch16_224"),
        ("..%2f..%2fetc", "not_found", ""),
        ("<script>", "unknown_model", ""),
    ],
)
def test_a_model_that_cannot_be_trained_is_a_404_that_says_why(
    api: TestClient, name: str, code: str, word: str
) -> None:
    found = problem(api.get(f"/v1/models/{name}"), 404)
    assert found["code"] == code and word in found["detail"]


def test_the_tag_of_weights_does_not_change_a_model(api: TestClient) -> None:
    tagged = api.get(f"/v1/models/{TINY}.augreg_in21k").json()
    assert tagged == {**api.get(f"/v1/models/{TINY}").json(), "id": f"{TINY}.augreg_in21k"}


@pytest.fixture
def measured_too(home: Path, models: dict[str, Any]) -> None:
    """A model that was measured is in the catalogue, before the application reads it."""
    eva = Measured(224, 16, 3, ("avg", "token"), 384, False, shape_of(Sizes.from_dict(models[SMALL]), 2))
    write_catalogue(home, {**models, "eva02_small_patch14_224": eva.to_dict()})


@pytest.mark.parametrize(
    ("model", "args", "param"),
    [
        ("eva02_small_patch14_224", {"embed_dim": 96}, "model_args.embed_dim"),
        ("eva02_small_patch14_224", {"global_pool": "map"}, "model_args.global_pool"),
        (TINY, {"num_heads": 5}, "model_args.num_heads"),
        (TINY, {"patch_size": 1.5}, "model_args.patch_size"),
        (DIGITS, {"depth": 0}, "model_args.depth"),
    ],
)
def test_a_job_and_a_plan_refuse_the_same_arguments_in_the_same_words(
    measured_too: None, api: TestClient, model: str, args: dict[str, Any], param: str
) -> None:
    by_job = problem(api.post("/v1/jobs", json={"model": model, "model_args": args}), 422)
    by_plan = problem(api.post("/v1/plans", json={"model": model, "model_args": args, "devices": ["fast"]}), 422)
    assert (by_job["code"], by_job["param"]) == ("bad_model_args", param)
    assert all(by_job[name] == by_plan[name] for name in ("code", "param", "detail"))
    assert by_job["errors"][0]["pointer"] == by_plan["errors"][0]["pointer"] == "/" + param.replace(".", "/")
    taken = {"in_chans": 1, "depth": 2, "global_pool": "avg"}
    assert api.post("/v1/jobs", json={"model": model, "model_args": taken}).status_code == 201


@pytest.mark.slow
def test_parameters_are_those_of_the_models_that_timm_builds(api: TestClient) -> None:
    names = [DIGITS, TINY, SMALL, LARGE]
    done = subprocess.run(
        [sys.executable, "-c", COUNT, *names], capture_output=True, text=True, timeout=120, env=child_env(), check=True
    )
    assert json.loads(done.stdout) == {name: api.get(f"/v1/models/{name}").json()["params"] for name in names}
