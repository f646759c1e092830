"""A quick look at a result: what its model says of a few images."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from service.errors import InvalidRequestError, Issue, UnsupportedMediaError
from service.results import result_folder
from service.routes.world import PROBLEM, ByCaller, InWorld
from service.schemas import MAX_PREDICT_IMAGES, Prediction, PredictionList

FORM = "multipart/form-data"
IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp", "image/bmp", "application/octet-stream")
_BYTES = {"type": "string", "format": "binary"}
_FORM_SCHEMA = {
    "type": "object",
    "properties": {"images": {"type": "array", "items": _BYTES, "minItems": 1, "maxItems": MAX_PREDICT_IMAGES}},
    "required": ["images"],
}
BODY: dict[str, Any] = {
    "required": True,
    "content": {**{name: {"schema": _BYTES} for name in IMAGE_TYPES}, FORM: {"schema": _FORM_SCHEMA}},
}

router = APIRouter(tags=["jobs"], responses=PROBLEM)


@router.post("/{job_id}/predict", response_model=PredictionList, openapi_extra={"requestBody": BODY})
async def predict(
    job_id: str,
    request: Request,
    world: InWorld,
    caller: ByCaller,
    top: Annotated[int, Query(ge=1, le=100, description="How many classes of each image")] = 5,
) -> PredictionList:
    """What the model of a job that has succeeded says of an image, or as a form of up to 16."""
    began = time.monotonic()
    folder = await asyncio.to_thread(lambda: result_folder(world.store, world.settings, job_id, owner=caller.reach))
    named = await _images(request)
    tops = await world.predictors.predict(folder, [content for _, content in named], top)
    said = [{"file": name, "top": classes} for (name, _), classes in zip(named, tops, strict=True)]
    data = [Prediction.model_validate(each) for each in said]
    return PredictionList(job_id=job_id, data=data, seconds=round(time.monotonic() - began, 4))


async def _images(request: Request) -> list[tuple[str | None, bytes]]:
    """(name, bytes) of every image in the body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == FORM:
        found = await _from_form(request)
    elif kind in IMAGE_TYPES:
        found = [(None, await request.body())]
    else:
        message = f"The body is of the type '{kind[:80]}', which is none that is tried."
        remedy = f"Send an image as {', '.join(IMAGE_TYPES)}, or several as {FORM}."
        raise UnsupportedMediaError(message, code="unsupported_media_type", remedy=remedy)
    if not found or not all(content for _, content in found):
        raise InvalidRequestError([Issue("images", "There is no image in the body, or an empty one.", "no_image")])
    return found


async def _from_form(request: Request) -> list[tuple[str | None, bytes]]:
    try:
        async with request.form(max_files=MAX_PREDICT_IMAGES, max_fields=MAX_PREDICT_IMAGES) as form:
            files = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
            return [(file.filename, await file.read()) for file in files]
    except HTTPException as error:
        message = f"The form cannot be read: {error.detail} At most {MAX_PREDICT_IMAGES} files are taken at once."
        raise InvalidRequestError([Issue("images", message, "invalid_form")]) from None
