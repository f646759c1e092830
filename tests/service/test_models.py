"""The models that can be trained, and what is said of them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.processes import child_env
from tests.service.test_routes import problem

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
        "id": TINY, "object": "model", "params": 5_717_416, "blocks": 12, "heads": 3, "dim": 192, "img_size": 224,
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


@pytest.mark.slow
def test_parameters_are_those_of_the_models_that_timm_builds(api: TestClient) -> None:
    names = [DIGITS, TINY, SMALL, LARGE]
    done = subprocess.run(
        [sys.executable, "-c", COUNT, *names], capture_output=True, text=True, timeout=120, env=child_env(), check=True
    )
    assert json.loads(done.stdout) == {name: api.get(f"/v1/models/{name}").json()["params"] for name in names}
