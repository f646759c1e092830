"""Scripts, styles and pictures of the pages; anybody may have them. Browsers ask whether theirs is still the newest."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

from service.auth import PUBLIC_PREFIX
from service.web.render import STATIC

router = APIRouter()
_FILES = StaticFiles(directory=STATIC)


@router.get(PUBLIC_PREFIX + "{path:path}")
async def static(path: str, request: Request) -> Response:
    found = await _FILES.get_response(path, request.scope)
    found.headers["Cache-Control"] = "no-cache"
    if not isinstance(found, FileResponse) or "gzip" not in request.headers.get("accept-encoding", ""):
        return found
    kept = {name: value for name, value in found.headers.items() if name not in ("content-length", "content-type")}
    headers = {**kept, "Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
    packed = _packed(Path(found.path), found.headers["etag"])
    return Response(packed, found.status_code, headers, media_type=found.media_type)


@functools.lru_cache(maxsize=64)
def _packed(path: Path, etag: str) -> bytes:
    """The file as it is under this etag."""
    return gzip.compress(path.read_bytes(), mtime=0)
