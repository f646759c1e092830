"""Datasets that are registered, and models that can be trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from service.schemas.access import Name
from service.schemas.base import Wire
from workers.method import Frozen

MAX_PREDICT_IMAGES = 16  # of one request


class DatasetBody(Frozen):
    """A dataset to register: a name for `dataset: "dataset:NAME"` in a job, and its address, as in a job."""

    name: Name
    uri: Annotated[str, Field(min_length=1, max_length=4096)]


class DatasetClass(Wire):
    """One class and its images."""

    name: str
    num_train: int
    num_test: int


class Dataset(Wire):
    """A registered dataset, as it was listed when it was registered or inspected last.

    `classes` is left away in lists of datasets. Into one in an object store or at the hub the API does not look: its
    counts and `inspected_at` are null, and what is wrong with it a job's workers say when they begin.
    """

    id: str
    object: Literal["dataset"] = "dataset"
    owner: str | None = None
    name: str
    uri: str
    num_classes: int | None = None
    num_train: int | None = None
    num_test: int | None = None
    classes: list[DatasetClass] = Field(default_factory=list)
    created_at: int
    inspected_at: int | None = None


class Sample(Wire):
    """One image of a dataset, small: `thumbnail` is a data URI of a PNG; `error` says why there is none."""

    split: str
    label: str
    file: str
    width: int | None = None
    height: int | None = None
    thumbnail: str | None = None
    error: str | None = None


class SampleList(Wire):
    """A few images of every class."""

    object: Literal["list"] = "list"
    data: list[Sample]


class PredictedClass(Wire):
    """A class that an image may be of. `index` counts from 0, as in the result's `classes.json`."""

    index: int
    label: str
    probability: float


class Prediction(Wire):
    """The most probable classes of one image, best first; `file` is the name that it was sent under."""

    file: str | None = None
    top: list[PredictedClass]


class PredictionList(Wire):
    """What the model of a job says of images, in their order. `seconds` is what it took, waiting included."""

    object: Literal["list"] = "list"
    job_id: str
    data: list[Prediction]
    seconds: float


class Model(Wire):
    """A timm model that can be trained: its shape, and the memory that one worker would need for all of it.

    `memory_bytes` is weights, gradients and AdamW's two moments in float32, without activations. Its weights are not
    downloaded: a job names a local file. Of one that is not `supported`, `reason` says why, and no size is known.
    """

    id: str
    object: Literal["model"] = "model"
    supported: bool = True
    reason: str | None = None
    params: int | None = None
    blocks: int | None = None
    heads: int | None = None
    dim: int | None = None
    img_size: int | None = None
    patch_size: int | None = None
    in_chans: int | None = None
    memory_bytes: int | None = None
