"""Links of a placement: those that stand for all others are never less busy than any of them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.cost import Costs
from scheduler.domain import LinkProfile, StaticPart, StepShape
from scheduler.placement.chains import binding_links, chains_of
from scheduler.placement.instance import Instance, Row
from scheduler.placement.patterns import all_rows
from tests.scheduler.fleet import fleet, vit_shape

WIDTHS = (10**7, 10**8, 10**9)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), static=st.booleans())
def test_no_link_is_busier_than_the_busiest_of_those_that_bind(data: st.DataObject, static: bool) -> None:
    instance = instance_of(data, static)
    kind = data.draw(st.sampled_from(["split", "whole", "mixed"]))
    chain = data.draw(st.sampled_from(chains_of(instance, kind)))
    rows = [data.draw(st.sampled_from(all_rows(instance, team) or [])) for team in chain]
    crossed = instance.fixed(chain).wires
    every = list(itertools.permutations(range(instance.num_workers), 2))

    def busiest(links: list[tuple[int, int]]) -> int:
        return max(
            (crossed.get(link, 0) + sum(taken(instance, row, link) for row in rows) for link in links), default=0
        )

    binding = binding_links(instance, chain)
    assert busiest(binding) == busiest(every)
    assert len(binding) <= len(every)


def test_alike_links_are_one() -> None:
    shape = vit_shape(4, 8, 96)
    instance = Instance(Costs(shape, StepShape(3, 16), fleet((1.0,) * 8, shape=shape)))
    assert len(binding_links(instance, (tuple(range(8)),))) == 1


def taken(instance: Instance, row: Row, link: tuple[int, int]) -> int:
    """Two messages of an exchange in each sub-layer, shared out over the members, forward and backward."""
    us = 0
    for group in (row.team, row.trainers):
        if set(link) <= set(group):
            us += 2 * 2 * instance.taken_us(*link) // len(group)
    return us


def instance_of(data: st.DataObject, static: bool) -> Instance:
    """Up to four workers; links of a few widths in any pattern."""
    workers = data.draw(st.integers(3, 4))
    shape = vit_shape(4, 4, 96)
    profiles = []
    for profile in fleet(tuple(data.draw(st.sampled_from([1.0, 1.0, 2.0])) for _ in range(workers)), shape=shape):
        links = [
            None if link is None else LinkProfile(50, data.draw(st.sampled_from(WIDTHS))) for link in profile.links
        ]
        profiles.append(replace(profile, links=tuple(links)))
    part = StaticPart(np.ones((4, 4)), 6) if static else None
    return Instance(Costs(shape, StepShape(3, 16), profiles), part)
