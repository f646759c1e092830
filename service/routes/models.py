"""Models: those of timm's that can be trained here, with what they weigh, and why the others cannot."""

from __future__ import annotations

from bisect import bisect_right
from typing import Annotated, Literal

from fastapi import APIRouter, Query

from service.checks import check_model, sizes_of
from service.errors import NotFoundError
from service.routes.world import PROBLEM, InWorld, Limit
from service.schemas import Model, Page
from service.store.jobs import page
from workers.contract import DIGITS_MODEL
from workers.shapes import Entry, shape_of

BYTES_PER_PARAM = 16  # weight, gradient and AdamW's two moments in float32
Params = Annotated[int | None, Query(ge=0, le=2**53)]

router = APIRouter(tags=["models"], responses=PROBLEM)


@router.get("/models", response_model=Page[Model])
async def list_models(
    world: InWorld,
    search: Annotated[str | None, Query(max_length=200, description="Part of the name, in any case")] = None,
    supported: Annotated[
        Literal["true", "false", "all"],
        Query(description="Those that can be trained, those that cannot, with the reason, or every name of timm's"),
    ] = "true",
    min_params: Params = None,
    max_params: Params = None,
    after: Annotated[str | None, Query(max_length=200)] = None,
    limit: Limit = 20,
) -> Page[Model]:
    """Models by name: those that can be trained, unless asked otherwise; bounds are for those whose size is known."""
    part = (search or "").lower()
    known = await world.catalogue.models()
    wanted = {"true": (True,), "false": (False,), "all": (True, False)}[supported]
    models = [
        _refused(name, entry) if isinstance(entry, str) else _model(name, entry)
        for name, entry in known.items()
        if part in name.lower() and (not isinstance(entry, str)) in wanted
    ]
    if min_params is not None or max_params is not None:
        low, high = min_params or 0, 2**63 if max_params is None else max_params
        models = [each for each in models if each.params is not None and low <= each.params <= high]
    found = sorted(models, key=lambda each: each.id)
    start = bisect_right(found, after or "", key=lambda each: each.id)
    shown = found[start : start + limit]
    return page(shown, [each.id for each in shown], more=len(found) > start + limit)


@router.get("/models/{name}", response_model=Model)
async def get_model(name: str, world: InWorld) -> Model:
    """One model, with or without the tag of its weights; one that cannot be trained is a 404 that says why."""
    known = await world.catalogue.models()
    for issue in check_model(name, known):
        raise NotFoundError(issue.message, code=issue.code, param="name")
    return _model(name, sizes_of(name, known))


def _refused(name: str, reason: str) -> Model:
    return Model(id=name, supported=False, reason=reason)


def _model(name: str, sizes: Entry) -> Model:
    """Counted with the classes that it comes with: ImageNet's, or the ten digits of the bundled one."""
    shape = shape_of(sizes, 10 if name == DIGITS_MODEL else 1000)
    params = shape.embed_params + shape.classifier_params
    params += shape.num_blocks * (sum(shape.head_params) + shape.norm_params)
    return Model(
        id=name,
        params=params,
        blocks=shape.num_blocks,
        heads=shape.num_heads,
        dim=shape.dim,
        img_size=sizes.img_size,
        patch_size=sizes.patch_size,
        in_chans=sizes.in_chans,
        memory_bytes=params * BYTES_PER_PARAM,
    )
