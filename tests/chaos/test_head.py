"""A Ray that is lost whole: its head, and with it every driver and worker."""

from __future__ import annotations

import psutil
import pytest

from service.home import read_server
from tests.served import served
from tests.waiting import until


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_goes_on_when_its_ray_was_killed_and_another_is_brought_up() -> None:
    with served() as service:
        spec = {"steps": 400, "window": 50, "checkpoint": {"every_steps": 10}}
        job = service.client.submit(spec)
        until(lambda: len(job.checkpoints()) >= 2, 150)
        head = psutil.Process(read_server(service.home)["ray"]["pid"])
        for process in [*head.children(recursive=True), head]:
            process.kill()
        service.up()
        done = job.wait(timeout_s=200)
        assert done.status == "succeeded" and done.attempt == 2
        told = [event for event in job.events() if event.type == "checkpoint.resumed"]
        assert len(told) == 1 and told[0].data["step"] >= 20
        steps = [row["step"] for row in job.metrics()]
        assert sorted(set(steps)) == steps and steps[-1] == 400
