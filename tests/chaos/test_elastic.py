"""A node that goes and one that comes: the run goes on with the workers that there are."""

from __future__ import annotations

import pytest

from tests.chaos.runs import Run, end_tree, ray_here


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_workers_follow_the_cluster_down_and_up() -> None:
    with ray_here(cpus=1) as ray:
        second = ray.add_node(1)
        run = Run(ray, "elastic", steps=150, window=10, workers={"min": 1, "max": 2}, cpus_each=1.0)  # one a node
        run.until_step(12)
        end_tree(second)
        run.until(lambda: len(run.events("checkpoint.resumed")) == 1 and run.steps()[-1] > run.steps()[0] + 20)
        assert [set(each) for each in run.owners()] == [{0, 1}, {0}]
        ray.add_node(1)
        run.ended()
        assert run.outcome == "succeeded", run.printed()
        assert [set(each) for each in run.owners()] == [{0, 1}, {0}, {0, 1}]
        told = [event["data"] for event in run.events("phase") if event["data"]["name"] == "recovering"]
        assert [each["failures"] for each in told] == [1, 1], (told, run.printed())
        assert sorted(run.losses()) == list(range(1, 151))
