"""Which points of a sweep nothing beats, and the knee among them.

A point beats another if it is nowhere worse and somewhere better. The knee is where the front turns: with every
quantity scaled to 0 … 1 over the front, the point furthest above the straight line between its ends (Kneedle, Satopää
et al., 2011).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def pareto(points: Mapping[Key, Sequence[float]], rising: Sequence[bool]) -> list[Key]:
    """The keys of the points that no other beats, in the points' order; `rising[i]`: more of coordinate i is better.

    Equal points are all on the front.
    """
    signed = {key: [x if up else -x for x, up in zip(point, rising, strict=True)] for key, point in points.items()}

    def beaten(point: Sequence[float]) -> bool:
        return any(
            other != point and all(a >= b for a, b in zip(other, point, strict=True)) for other in signed.values()
        )

    return [key for key, point in signed.items() if not beaten(point)]


def knee(front: Mapping[Key, tuple[float, float]]) -> Key | None:
    """The key of the point where (cost, worth) turns; less cost and more worth are better. None of no points.

    Of one point that, of two the cheaper one if it loses less worth, as a share of what there is, than it saves cost.
    """
    if not front:
        return None
    costs, worths = zip(*front.values(), strict=True)
    width, height = max(costs) - min(costs), max(worths) - min(worths)
    if not width or not height:
        return min(front, key=lambda key: (front[key][0], -front[key][1]))
    if len(front) == 2:
        cheap, dear = sorted(front, key=lambda key: front[key][0])
        lost, saved = 1 - front[cheap][1] / front[dear][1], 1 - front[cheap][0] / front[dear][0]
        return cheap if lost < saved else dear

    def above(key: Key) -> float:
        cost, worth = front[key]
        return (worth - min(worths)) / height - (cost - min(costs)) / width

    return max(front, key=lambda key: (above(key), -front[key][0]))
