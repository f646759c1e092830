"""The whole product as a user meets it: `d2ft` as a process, a real Ray, real training, plain timm as the reader."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

D2FT = str(Path(sys.executable).with_name("d2ft"))
SMALL = ["--micro-batch-size", "8", "--steps", "12", "--images-per-class", "20", "--lr", "1e-3"]


class Service:
    """A running service with a home of its own."""

    def __init__(self, home, port):
        self.home, self.port = home, port
        self.env = {**os.environ, "D2FT_HOME": str(home), "D2FT_START_TIMEOUT_S": "3", "OMP_NUM_THREADS": "1"}

    def __call__(self, *args, code=0, timeout=180):
        done = subprocess.run([D2FT, *args], env=self.env, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def run(self, *flags, code=0):
        """Submit, watch to the end, and return the job as the API shows it."""
        job = json.loads(self("submit", "--json", *flags))["id"]
        self("watch", job, code=code)
        return json.loads(self("get", job, "--json"))


@pytest.fixture(scope="module")
def service():
    home = Path(tempfile.mkdtemp(prefix="d2e", dir="/tmp"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    running = Service(home, port)
    try:
        running("up", "--port", str(port), "--num-cpus", "2")
        yield running
    finally:
        running("down")
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.timeout(400)
def test_a_job_within_budgets_gives_a_checkpoint_that_timm_opens(service, tmp_path):
    job = service.run("--compute", "0.6", "--bytes", "0.5", *SMALL)
    assert job["status"] == "succeeded" and job["progress"]["step"] == 12
    assert job["usage"]["compute_fraction"] <= 0.62 and job["usage"]["bytes_fraction"] <= 0.52
    ledger = json.loads(service("ledger", job["id"], "--json"))
    ledger = ledger.get("ledger", ledger)
    assert ledger["accuracy"]["after"] > ledger["accuracy"]["before"]
    service("artifacts", job["id"], "-o", str(tmp_path / "result"))
    model = timm.create_model(f"local-dir:{tmp_path / 'result'}", pretrained=True).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    types = {event["type"] for event in events_of(service, job["id"])}
    assert {"job.created", "job.status", "plan.created", "metrics", "evaluation", "artifact.ready"} <= types
    plan = json.loads(service("plan", job["id"], "--json"))
    assert [[head["owner"] for head in row] for row in plan["heads"]] == plan["placement"]["owners"]
    step = json.loads(service("timeline", job["id"], "--json"))
    assert step["forecast"] == plan["gantt"] and step["measured"]["step"] >= 3
    assert len(step["measured"]["workers"]) == len(step["forecast"]["workers"]) == len(plan["devices"])
    assert "measured in step" in service("timeline", job["id"])
    (used_by,) = {tuple(device["used_by"]) for device in json.loads(service("devices", "--json"))["data"]}
    assert used_by == ()  # the job has ended


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_image_folder_and_a_timm_model_with_weights_of_ones_own(service):
    folder = service.home / "shapes"
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("test", 6)):
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = (torch.rand(24, 24, 3, generator=generator) * 100 + label * 120).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    (folder / "train" / "dark" / "broken.png").write_bytes(b"no image")
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 24, "patch_size": 8}
    weights = service.home / "start.safetensors"
    safetensors.torch.save_file(timm.create_model("vit_tiny_patch16_224", num_classes=7, **args).state_dict(), weights)
    flags = [flag for key, value in args.items() for flag in ("--model-arg", f"{key}={value}")]
    job = service.run(
        *("--model", "vit_tiny_patch16_224", "--weights", str(weights), "--dataset", f"folder://{folder}", *flags),
        *("--ratios", "3,0,2", "--micro-batch-size", "4", "--steps", "20", "--lr", "3e-3"),
    )
    assert job["status"] == "succeeded"
    events = service("events", job["id"], "--json")
    assert "broken.png" in events

    wrong = service.home / "wrong.safetensors"
    safetensors.torch.save_file({"pos_embed": torch.zeros(3)}, wrong)
    failed = service.run("--weights", str(wrong), *SMALL, code=1)
    assert failed["status"] == "failed"
    assert failed["error"]["code"] == "weights_mismatch" and failed["error"]["param"] == "weights"
    assert failed["error"]["fault"] == "user"


@pytest.mark.timeout(400)
def test_what_cannot_be_done_fails_by_name_and_the_service_stays_up(service):
    infeasible = service.run("--compute", "0.05", "--bytes", "0.01", *SMALL, code=1)
    assert infeasible["error"]["param"] == "method.budgets" and infeasible["error"]["fault"] == "user"
    crowded = service.run("--workers", "9", "--queue-timeout", "3", *SMALL, code=1)
    assert crowded["error"]["code"] == "queue_timeout" and crowded["error"]["fault"] == "capacity"
    assert "9 workers need 4.5 CPU, and the whole cluster has 2" in crowded["error"]["message"]
    assert httpx2.get(f"http://127.0.0.1:{service.port}/readyz", timeout=10).status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_paused_job_keeps_what_it_has_learnt_and_goes_on(service):
    job = json.loads(service("submit", "--json", "--steps", "120", "--micro-batch-size", "8"))["id"]
    until(service, job, lambda seen: seen["progress"]["step"] >= 5)
    service("pause", job)
    paused = until(service, job, lambda seen: seen["status"] == "paused")
    stopped_at = paused["progress"]["step"]
    assert 5 <= stopped_at < 120
    newest = json.loads(service("checkpoints", job, "--json"))["data"][0]
    assert newest["step"] == stopped_at and newest["bytes"] > 1_000_000
    service("resume", job)
    service("watch", job)
    ended = json.loads(service("get", job, "--json"))
    assert ended["status"] == "succeeded" and ended["attempt"] == 2 and ended["progress"]["step"] == 120
    steps = [event["data"]["step"] for event in events_of(service, job) if event["type"] == "metrics"]
    assert steps == list(range(1, 121)), "every step once"
    assert "rank" in service("logs", job) or service("logs", job, "--rank", "0")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_running_job_is_cancelled_and_frees_its_devices(service):
    job = json.loads(service("submit", "--json", "--steps", "100000", "--micro-batch-size", "8"))["id"]
    key = (service.home / "key").read_text().strip()
    with httpx2.Client(base_url=f"http://127.0.0.1:{service.port}", headers={"Authorization": f"Bearer {key}"}) as api:
        with api.stream(
            "GET", f"/v1/jobs/{job}/events", headers={"Accept": "text/event-stream"}, timeout=120
        ) as stream:
            for line in stream.iter_lines():
                if "metrics" in line:
                    break
        service("cancel", job)
        service("watch", job, code=1)
        assert api.get(f"/v1/jobs/{job}").json()["status"] == "cancelled"
    again = service.run(*SMALL)
    assert again["status"] == "succeeded"


def test_a_second_service_on_the_same_port_says_so(service):
    with tempfile.TemporaryDirectory(dir="/tmp") as other:
        env = {**service.env, "D2FT_HOME": other}
        done = subprocess.run(
            [D2FT, "up", "--port", str(service.port)], env=env, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 6
    assert str(service.port) in done.stderr and "--port" in done.stderr


def until(service, job, reached):
    """The job once it is so."""
    deadline = time.monotonic() + 120
    while not reached(seen := json.loads(service("get", job, "--json"))):
        assert seen["status"] not in ("failed", "succeeded", "cancelled"), seen
        assert time.monotonic() < deadline, seen
        time.sleep(0.3)
    return seen


def events_of(service, job):
    return [json.loads(line) for line in service("events", job, "--json").splitlines()]
