"""The front against its definition, and where a front turns."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.sweeps.front import knee, pareto

coordinate = st.integers(0, 6).map(float)
clouds = st.lists(st.tuples(coordinate, coordinate), max_size=14).map(lambda points: dict(enumerate(points)))


@given(st.lists(st.tuples(coordinate, coordinate, coordinate), max_size=14), st.tuples(*[st.booleans()] * 3))
def test_the_front_is_what_no_point_beats(points: list[tuple[float, ...]], rising: tuple[bool, ...]) -> None:
    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        better = [x > y if up else x < y for x, y, up in zip(a, b, rising, strict=True)]
        worse = [x < y if up else x > y for x, y, up in zip(a, b, rising, strict=True)]
        return any(better) and not any(worse)

    expected = [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]
    assert pareto(dict(enumerate(points)), rising) == expected


@given(clouds, st.sampled_from([1.0, 8.0]), st.sampled_from([1.0, 0.25]))
def test_the_knee_is_on_the_front_whatever_the_units(
    points: dict[int, tuple[float, float]], cost: float, worth: float
) -> None:
    front = {key: points[key] for key in pareto(points, (False, True))}
    found = knee(front)
    assert (found is None) == (not front) and (found is None or found in front)
    if len(front) != 2:
        assert knee({key: (a * cost + 1, b * worth - 1) for key, (a, b) in front.items()}) == found


def test_the_knee_is_where_more_compute_stops_paying() -> None:
    assert knee({"a": (0.2, 0.5), "b": (0.4, 0.9), "c": (0.7, 0.92), "d": (1.0, 0.93)}) == "b"
    assert knee({"only": (0.3, 0.2)}) == "only"
    assert knee({"half": (0.5, 0.90), "full": (1.0, 0.91)}) == "half"
    assert knee({"half": (0.5, 0.10), "full": (1.0, 0.91)}) == "full"
    assert knee({"one": (0.5, 0.9), "same": (0.5, 0.9)}) == "one"
