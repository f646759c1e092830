"""The model card: what a hub reads of it, and that nobody's names become its markup."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import ModelCard

from workers.card import escaped, model_card
from workers.contract import JobSpec
from workers.model import ModelInput

GREY = ModelInput(28, 1, (0.5,), (0.5,), "bicubic")
ROWS = [
    {"name": "compute fraction", "unit": "fraction", "predicted": 0.473, "measured": 0.4731, "all_full": 1.0},
    {"name": "forecast error", "unit": "fraction", "predicted": None, "measured": 0.047, "all_full": 0.255},
    {"name": "step seconds", "unit": "s", "predicted": 0.1093, "measured": 0.1088, "all_full": 0.2021},
]
LEDGER: dict[str, Any] = {"rows": ROWS, "accuracy": {"before": 0.141, "after": 0.971}}
HOSTILE = (
    "</h1><script>alert(1)</script>\n---\nlicense: mit\n# [x](javascript:y) |`*_\u202e![i](http://evil.example/p.png)"
)


def card(**given: Any) -> ModelCard:
    return ModelCard(model_card(JobSpec(**given), GREY, ("cat", "dog"), LEDGER))


def test_a_hub_finds_what_it_looks_for() -> None:
    told = card().data
    assert (told.license, told.library_name, told.pipeline_tag) == ("apache-2.0", "timm", "image-classification")
    assert told.datasets == ["digits"] and "d2ft" in told.tags and "base_model" not in told.to_dict()
    assert [(each.metric_type, each.metric_value) for each in told.eval_results] == [("accuracy", 0.971)]


def test_what_it_began_as_is_named_only_where_it_is_known() -> None:
    name = "vit_tiny_patch16_224.augreg_in21k"
    assert card(model=name, weights="/w/a.safetensors").data.base_model == f"timm/{name}"
    assert card(model=name, weights="/w/a.safetensors").data.license == "apache-2.0"
    untagged = card(model="vit_tiny_patch16_224", weights="/w/a.safetensors").data.to_dict()
    assert "base_model" not in untagged and untagged["license"] == "unknown"
    assert card(model=name).data.license == "unknown"  # nothing was loaded


def test_the_ledger_is_shown_with_its_units() -> None:
    text = card().text
    assert "| compute fraction | 47.3% | 47.31% | 100% |" in text
    assert "| forecast error | - | 4.7% | 25.5% |" in text and "| step seconds | 0.1093 s |" in text
    assert "| on the test images | 14.1% | 97.1% |" in text


def test_a_folder_is_called_by_its_last_name() -> None:
    text = model_card(JobSpec(dataset="folder:///home/ann/secret%20project/flowers"), GREY, ("a",), LEDGER)
    assert "flowers" in text and "secret" not in text and "ann" not in text


def test_of_many_classes_the_first_are_listed() -> None:
    text = model_card(JobSpec(), GREY, [f"c{index}" for index in range(1000)], {})
    assert "0. c0\n" in text and "19. c19" in text and "c20" not in text and "and 980 more." in text


@pytest.mark.parametrize("where", ["name", "class", "dataset"])
def test_names_are_text_and_nothing_else(where: str) -> None:
    job = JobSpec(
        name=HOSTILE[:200] if where == "name" else None,
        dataset="folder:///data/" + ("%3Cscript%3E%0A---%0Alicense: mit" if where == "dataset" else "x"),
    )
    classes = (HOSTILE, "dog") if where == "class" else ("cat", "dog")
    found = ModelCard(model_card(job, GREY, classes, LEDGER))
    assert found.data.license == "apache-2.0"
    assert "<script" not in found.content and "\u202e" not in found.content and "](javascript" not in found.content
    assert "![i]" not in found.content and "http://evil" not in found.content
    assert found.content.count("\n---\n") == 1  # the end of the front matter


def test_escaping_keeps_what_is_read() -> None:
    assert escaped("a_b|c <d>") == r"a\_b\|c &lt;d&gt;"
    assert escaped("Bäume 木 \t\n x") == "Bäume 木 x"
    assert escaped("half \udc80 sign") == "half sign"
