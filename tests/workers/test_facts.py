"""Facts name the device and its machine, whatever is missing there; the id stays from job to job."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from workers import facts
from workers.facts import device_facts, device_id, device_name


def test_a_processor_is_described_as_json():
    found = device_facts("cpu")
    assert found["kind"] == "cpu" and found["cores"] >= 1 and found["memory_bytes"] > found["free_memory_bytes"] > 0
    assert found["threads"] == torch.get_num_threads() and found["affinity"]
    assert json.loads(json.dumps(found)) == found
    assert device_name(found) == f"CPU ({torch.get_num_threads()} threads)"


def test_the_id_is_the_machine_and_the_cores_that_may_be_used():
    first, again = device_id(device_facts("cpu")), device_id(device_facts("cpu"))
    assert first == again and "/cpu:" in first
    assert device_id({"kind": "cpu", "host": "box", "affinity": [0, 1, 2, 5, 7, 8]}) == "box/cpu:0-2,5,7-8"
    assert device_id({"kind": "cpu"}) == "unknown/cpu:"
    assert device_id({"kind": "cuda", "host": "box", "uuid": "GPU-1f"}) == "box/GPU-1f"
    assert device_id({"kind": "cuda", "host": "box", "name": "H100"}) == "box/H100"


def test_nothing_fails_where_nothing_can_be_found_out(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no such thing here")

    for name in ("virtual_memory", "cpu_freq"):
        monkeypatch.setattr(facts.psutil, name, refuse)
    monkeypatch.setattr(facts.os, "sched_getaffinity", refuse)
    monkeypatch.setattr(facts.os, "getloadavg", refuse)
    found = device_facts("cpu")
    assert found["kind"] == "cpu" and "memory_bytes" not in found and "affinity" not in found
    for name in ("get_device_properties", "mem_get_info"):
        monkeypatch.setattr(facts.torch.cuda, name, refuse)
    assert device_name(device_facts("cuda:0")) == "GPU"


class FakeNvml:
    """What `pynvml` answers, as far as `facts` asks; `broken` names calls that fail."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, broken=()):
        self.broken, self.is_open = broken, False

    def __getattr__(self, name):
        answers = {
            "nvmlInit": lambda: setattr(self, "is_open", True),
            "nvmlShutdown": lambda: setattr(self, "is_open", False),
            "nvmlDeviceGetHandleByUUID": lambda uuid: {"GPU-1f": "handle"}[uuid],
            "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=37),
            "nvmlDeviceGetPowerUsage": lambda _: 250_000,
            "nvmlSystemGetDriverVersion": lambda: b"550.1",
            "nvmlDeviceGetClockInfo": lambda _, which: {1: 1980, 2: 2619}[which],
            "nvmlDeviceGetMaxClockInfo": lambda _, which: 1980,
            "nvmlDeviceGetTemperature": lambda *_: 41,
        }

        def refuse(*_):
            raise RuntimeError("not supported")

        return refuse if name in self.broken else answers[name]


@pytest.fixture
def gpu(monkeypatch):
    properties = SimpleNamespace(name="H100", uuid="1f", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(facts.torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(facts.torch.cuda, "mem_get_info", lambda _: (70 << 30, 80 << 30))


def test_a_gpu_is_asked_through_nvml_where_it_is_there(monkeypatch, gpu):
    nvml = FakeNvml()
    monkeypatch.setattr(facts, "pynvml", nvml)
    found = device_facts("cuda:0")
    assert (found["name"], found["uuid"], found["capability"]) == ("H100", "GPU-1f", "9.0")
    assert (found["sm_mhz"], found["memory_mhz"], found["max_sm_mhz"]) == (1980, 2619, 1980)
    assert (found["utilisation"], found["power_w"], found["driver"]) == (0.37, 250.0, "550.1")
    assert found["free_gpu_memory_bytes"] < found["gpu_memory_bytes"]
    assert not nvml.is_open and json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    "broken",
    [
        "nvmlInit",
        "nvmlShutdown",
        "nvmlDeviceGetHandleByUUID",
        "nvmlDeviceGetUtilizationRates",
        "nvmlDeviceGetClockInfo",
    ],
)
def test_a_driver_that_refuses_leaves_that_fact_out(monkeypatch, gpu, broken):
    monkeypatch.setattr(facts, "pynvml", FakeNvml((broken,)))
    found = device_facts("cuda:0")
    assert found["uuid"] == "GPU-1f"
    assert ("utilisation" in found) == (broken not in ("nvmlDeviceGetHandleByUUID", "nvmlDeviceGetUtilizationRates"))


def test_without_nvml_a_gpu_has_the_facts_that_torch_knows(monkeypatch, gpu):
    monkeypatch.setattr(facts, "pynvml", None)
    found = device_facts("cuda:0")
    assert found["name"] == "H100" and "sm_mhz" not in found
