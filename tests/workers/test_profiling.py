"""A worker's first profile: every figure is there and sound, links are measured with messages of the job's size."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import pytest
import torch

from scheduler.cost import residual_bytes
from scheduler.domain import DeviceProfile, StepShape
from scheduler.profiles import FIGURES, check_fleet
from tests.workers.engine import on_threads, tiny_vit
from tests.workers.processes import on_processes
from workers.partition import model_shape
from workers.profiling import measure_handling, measure_links, profile_device
from workers.transport import Gloo, Shared

STEP = StepShape(2, 4)


def test_a_fleets_first_profiles_pass_the_schedulers_check():
    model = tiny_vit()
    profiles = on_threads(3, lambda rank, transport: profile_device(model, STEP, transport, sharers=3))
    now = profiles[0].measured_at
    check_fleet(profiles, model_shape(model), STEP, now=now)
    for profile in profiles:
        assert all(getattr(profile, name) >= 1 for name in FIGURES)
        assert profile.device_id and profile.facts["kind"] == "cpu" and profile.samples > 0
        assert DeviceProfile.from_dict(json.loads(json.dumps(asdict(profile)))) == profile


def test_profiling_leaves_the_model_as_it_was():
    model = tiny_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    on_threads(1, lambda rank, transport: profile_device(model, STEP, transport))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_one_worker_alone_has_no_links_and_sends_nothing():
    assert on_threads(1, lambda rank, transport: measure_links(transport)) == [(None,)]
    assert on_threads(1, lambda rank, transport: measure_handling(transport, torch.float32, "cpu", 1000)) == [(0, 0)]


class SizeSpy:
    """A transport that notes the sizes of what it sends."""

    def __init__(self, inner):
        self.inner, self.sizes = inner, set()

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def send(self, dst, key, tensor):
        self.sizes.add(tensor.nbytes)
        self.inner.send(dst, key, tensor)


def test_the_large_message_is_one_of_the_jobs_residual_stream():
    model = tiny_vit().float()

    def work(rank, transport):
        spy = SizeSpy(transport)
        profile_device(model, STEP, spy)
        return spy.sizes

    for sizes in on_threads(2, work):
        assert sizes == {4, residual_bytes(model_shape(model), STEP)}


def _links_over(rank, kind):
    transport = {"gloo": Gloo, "shared": Shared}[kind]()
    transport.prepare(400_000)
    handled = measure_handling(transport, torch.float32, "cpu", 400_000)
    return measure_links(transport, message_bytes=400_000, handled_us=sum(handled)), handled


@pytest.mark.parametrize("kind", [pytest.param("gloo", marks=pytest.mark.slow), "shared"])
def test_links_and_handling_are_measured_between_processes(kind):
    for rank, (links, (send_us, recv_us)) in enumerate(on_processes(3, _links_over, kind)):
        assert [link is None for link in links] == [peer == rank for peer in range(3)]
        assert 1 <= send_us < 1_000_000 and 1 <= recv_us < 1_000_000
        assert all(link.latency_us >= 1 and link.bytes_per_s > 1_000_000 for link in links if link)


class SlowWire:
    """A transport whose messages are under way as long as on a wire of this latency and width."""

    def __init__(self, inner, latency_s, bytes_per_s, sent_at):
        self.inner, self.latency_s, self.bytes_per_s, self.sent_at = inner, latency_s, bytes_per_s, sent_at
        self.free_at = 0.0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def send(self, dst, key, tensor):
        begin = max(time.monotonic(), self.free_at)
        self.free_at = begin + tensor.nbytes / self.bytes_per_s
        self.sent_at[key] = self.free_at + self.latency_s
        self.inner.send(dst, key, tensor)

    def recv(self, src, key):
        found = self.inner.recv(src, key)
        time.sleep(max(0.0, self.sent_at[key] - time.monotonic()))
        return found


def test_what_a_slow_wire_takes_is_no_work_of_the_workers():
    arrivals = {}

    def work(rank, transport):
        wire = SlowWire(transport, 0.02, 12.5e6, arrivals)
        handled = measure_handling(wire, torch.float32, "cpu", 300_000)
        return measure_links(wire, message_bytes=300_000, handled_us=sum(handled))[1 - rank], handled

    for link, (send_us, recv_us) in on_threads(2, work):
        assert send_us + recv_us < 5_000
        assert link.latency_us == pytest.approx(20_000, rel=0.3)
        assert link.bytes_per_s == pytest.approx(12.5e6, rel=0.3)
