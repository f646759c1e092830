"""The page that plans for devices which nobody has: a fleet, a model, a method, and what a step would take."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.web.errors import PageRoute
from service.web.new_job import SPOKEN_KINDS, STRATEGIES, usual
from service.web.render import page

LINKS = ("100Mbps/1ms", "1Gbps", "10Gbps/50us", "25Gbps/20us", "100Gbps/10us", "10GB/s/5us")

router = APIRouter(route_class=PageRoute)


@router.get("/ui/what-if")
def what_if(request: Request) -> Response:
    """The form; what is asked stands in the address, which the page's script reads and writes."""
    return page(
        request, "what_if.html", kinds=SPOKEN_KINDS, links=LINKS, strategies=STRATEGIES, usual=usual(),
        known={"usual": usual()},
    )  # fmt: skip
