"""The model card of a result, `README.md`: what Hugging Face's hub and people read first.

Names of jobs, classes and folders are whatever somebody wrote. In the text every sign of theirs that Markdown or HTML
could take for its own is escaped; in the front matter stand only names that a hub allows.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData

from workers.contract import DIGITS_MODEL, HUB, JobSpec
from workers.model import ModelInput, resolve
from workers.sources.address import parse_address

SHOWN_CLASSES = 20
UNKNOWN_LICENSE = "unknown"
OUR_LICENSE = "apache-2.0"  # of the bundled model
_ESCAPES = str.maketrans({**{sign: f"\\{sign}" for sign in string.punctuation}, "<": "&lt;", ">": "&gt;", "&": "&amp;"})
_NO_HUB_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_SCALES = {"fraction": (100.0, "%"), "s": (1.0, " s"), "MB": (1.0, " MB"), "GFLOP": (1.0, " GFLOP")}


def model_card(
    spec: JobSpec, model_input: ModelInput, classes: Sequence[str], ledger: Mapping[str, Any], *, has_onnx: bool = False
) -> str:
    """The whole card, front matter first."""
    accuracy = ledger.get("accuracy") or {}
    parts = [
        f"---\n{_front_matter(spec, accuracy.get('after'))}\n---",
        f"# {escaped(spec.name or spec.model)}",
        _about(spec, classes),
        _loading(model_input, has_onnx=has_onnx),
        _accuracy_table(accuracy),
        _ledger_table(ledger.get("rows") or []),
        _class_list(classes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """`text` on one line, as it is to be read: none of it is Markdown, HTML, a link or a sign that turns the line."""
    plain = "".join(" " if unicodedata.category(sign)[0] in "CZ" else sign for sign in text)
    return " ".join(plain.split()).translate(_ESCAPES)


def dataset_name(spec: JobSpec) -> str:
    """What the dataset is called: of a folder its last name, since where it lies is nobody's business."""
    return spec.dataset if spec.dataset == "digits" else Path(parse_address(spec.dataset).path).name


def _front_matter(spec: JobSpec, accuracy: float | None) -> str:
    name, dataset = _hub_name(spec.model), _hub_name(dataset_name(spec))
    base, license = _origin(spec)
    results = [] if accuracy is None else [_result(dataset, accuracy)]
    card = ModelCardData(
        license=license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "d2ft"],
        base_model=base,
        datasets=[dataset],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return str(card.to_yaml()).strip()


def _result(dataset: str, accuracy: float) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type=dataset,
        dataset_name=dataset,
        metric_type="accuracy",
        metric_value=round(accuracy, 6),
    )


def _origin(spec: JobSpec) -> tuple[str | None, str]:
    """(the hub's name of the model that it began as, its license), as far as the job says: a file has no name."""
    if spec.weights is not None and spec.weights.startswith(HUB):
        return spec.weights.removeprefix(HUB).partition("@")[0], UNKNOWN_LICENSE
    if spec.weights is None:
        return None, OUR_LICENSE if spec.model == DIGITS_MODEL else UNKNOWN_LICENSE
    known = timm.get_pretrained_cfg(resolve(spec).timm_name) if "." in spec.model else None
    return (None, UNKNOWN_LICENSE) if known is None else (known.hf_hub_id, known.license or UNKNOWN_LICENSE)


def _about(spec: JobSpec, classes: Sequence[str]) -> str:
    return (
        f"A vision transformer, {escaped(spec.model)}, fine-tuned by d2ft to tell apart {len(classes)} classes of the "
        f"dataset {escaped(dataset_name(spec))}. `classes.json` names the classes, `preprocessing.json` says what to "
        f"do with an image. Where the license above is `{UNKNOWN_LICENSE}`, nobody has said it: set it before you "
        f"publish this."
    )


def _loading(model_input: ModelInput, *, has_onnx: bool) -> str:
    mode = "L" if model_input.in_chans == 1 else "RGB"
    onnx = (
        "\n\n`model.onnx` is the same model: `images` [batch, channels, height, width] to `logits` [batch, classes]."
        if has_onnx
        else ""
    )
    return f"""## Load it

```python
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:ORG/NAME", once it is there
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
probabilities = model(transform(Image.open("image.png").convert("{mode}")).unsqueeze(0)).softmax(1)
```{onnx}"""


def _accuracy_table(accuracy: Mapping[str, Any]) -> str:
    if accuracy.get("after") is None:
        return ""
    rows = [("on the test images", _shown(accuracy.get("before"), "fraction"), _shown(accuracy["after"], "fraction"))]
    return "## Accuracy\n\n" + _table(("", "before", "after"), rows)


def _ledger_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = ("predicted", "measured", "all_full")
    shown = [(str(row["name"]), *(_shown(row[column], row["unit"]) for column in columns)) for row in rows]
    return "## What it took\n\n" + _table(("", "predicted", "measured", "all FULL"), shown) if shown else ""


def _class_list(classes: Sequence[str]) -> str:
    lines = [f"{index}. {escaped(name)}" for index, name in enumerate(classes[:SHOWN_CLASSES])]
    more = len(classes) - len(lines)
    return "## Classes\n\n" + "\n".join(lines) + (f"\n\nand {more} more." if more > 0 else "")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _shown(value: float | None, unit: str) -> str:
    scale, sign = _SCALES[unit]
    return "-" if value is None else f"{value * scale:.4g}{sign}"


def _hub_name(text: str) -> str:
    return _NO_HUB_NAME.sub("-", text).strip("-.") or "unnamed"
