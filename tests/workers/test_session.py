"""A whole job without Ray: workers on threads, the scheduler called directly, a real dataset, the bundled model."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from scheduler.actor import Scheduler
from tests.workers.engine import on_threads
from tests.workers.planners import DirectPlanner
from workers.contract import JobSpec
from workers.data import open_dataset
from workers.events import EventLog, read_events
from workers.model import build_model, model_input
from workers.optimiser import schedule
from workers.order import MicroBatches
from workers.session import Place, Session


def run_job(spec, run_dir, size=2):
    scheduler = Scheduler()

    def work(rank, transport):
        log = EventLog(run_dir) if rank == 0 else None
        try:
            return Session(
                spec, run_dir, transport, DirectPlanner(scheduler, rank, size), log, Place(sharers=size)
            ).run()
        finally:
            if log:
                log.close()

    torch.set_num_threads(1)
    ledgers = on_threads(size, work)
    return ledgers[0], [event for _, event in read_events(run_dir / "events.jsonl", 0)]


def spec_of(**fields):
    base = {
        "steps": 12,
        "window": 8,
        "micro_batch_size": 8,
        "images_per_class": 20,
        "optimiser": {"learning_rate": 1e-3},
    }
    return JobSpec.model_validate({**base, **fields})


@pytest.mark.parametrize(
    "method",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"budgets": {"compute": 0.6, "bytes": 0.5}},
        pytest.param({"budgets": {"compute": 0.6, "bytes": 0.5}, "strategy": "hull"}, marks=pytest.mark.slow),
        pytest.param(
            {"ratios": {"full": 3, "skip": 2}, "hold": "none", "skip_fill": "rescale"}, marks=pytest.mark.slow
        ),
        pytest.param({"ratios": {"full": 2, "forward": 1, "skip": 2}, "skip_fill": "mean"}, marks=pytest.mark.slow),
    ],
    ids=["all-full", "budgets", "budgets of heads", "coherent rescale", "held mean"],
)
def test_a_job_trains_and_leaves_a_timm_checkpoint_and_a_ledger(tmp_path, method):
    spec = spec_of(method=method)
    ledger, events = run_job(spec, tmp_path)
    rows = {row["name"]: row for row in ledger["rows"]}
    compute, sent = rows["compute fraction"], rows["bytes fraction"]
    assert compute["measured"] == pytest.approx(compute["predicted"], abs=1e-9)
    assert sent["measured"] == pytest.approx(sent["predicted"], abs=1e-9)
    if "budgets" in method:
        # Budgets hold over whole cycles of op tables; this run ends in the middle of one.
        assert compute["measured"] <= 0.61 and sent["measured"] <= 0.51
    losses = [event["data"]["loss"] for event in events if event["type"] == "metrics"]
    assert len(losses) == 12
    assert ledger["accuracy"]["after"] > ledger["accuracy"]["before"]

    model = timm.create_model(f"local-dir:{tmp_path / 'result'}", pretrained=True).eval()
    session_data = open_dataset(spec, _input_of(model))
    images, labels = session_data.test_batch(torch.arange(session_data.num_test).numpy())
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).double().mean().item()
    assert accuracy == pytest.approx(ledger["accuracy"]["after"], abs=2 / session_data.num_test)


def test_a_job_in_narrow_numbers_learns_as_well_and_its_bytes_are_those_predicted(tmp_path):
    method = {"ratios": {"full": 3, "forward": 1, "skip": 1}}
    narrow = {"compute": "bf16", "wire": "bf16", "recompute": True}
    (plain, _), (ledger, _) = (
        run_job(spec_of(method=method, placement="split", precision=words), tmp_path / name)
        for name, words in (("fp32", {}), ("bf16", narrow))
    )
    for name, unit in (("traffic per step", 0.5), ("compute per step", 1.3)):
        [(was, now)] = zip(*([r for r in each["rows"] if r["name"] == name] for each in (plain, ledger)), strict=True)
        assert now["measured"] == pytest.approx(now["predicted"], rel=1e-9)
        assert now["measured"] == pytest.approx(unit * was["measured"], rel=0.06)
    assert ledger["accuracy"]["after"] == pytest.approx(plain["accuracy"]["after"], abs=0.03)


def test_whole_micro_batches_train_as_plain_timm_does_on_their_images(tmp_path):
    """Three of five micro-batches over three epochs: the same losses as a loop that sorts by hand."""
    spec = spec_of(method={"ratios": {"full": 3, "skip": 2}}, optimiser={"learning_rate": 1e-4, "clip_norm": 0})
    ledger, events = run_job(spec, tmp_path)
    found = [event["data"]["loss"] for event in events if event["type"] == "metrics"]
    assert found == pytest.approx(plain_losses(spec, full=3), rel=2e-3)
    rows = {row["name"]: row for row in ledger["rows"]}
    assert rows["compute fraction"]["measured"] == pytest.approx(0.6, abs=1e-6)
    assert rows["bytes fraction"]["measured"] == pytest.approx(0.6, abs=0.01)
    assert ledger["phases"]["score"] < 0.5  # no head is chosen, so none is scored


def plain_losses(spec, full):
    torch.manual_seed(0)
    probe = build_model(spec, num_classes=1, load=False)
    data = open_dataset(spec, model_input(probe))
    model, rate = build_model(spec, len(data.classes)), spec.optimiser.learning_rate
    order = MicroBatches(data.num_train, spec.micro_batch_size, spec.micro_batches, spec.seed)
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and n not in model.no_weight_decay()]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1 or n in model.no_weight_decay()]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    adam, known, fresh, losses = torch.optim.AdamW(groups, lr=rate), {}, {}, []
    for step in range(spec.steps):
        for group in adam.param_groups:
            group["lr"] = schedule(step, spec.steps, rate, 0.1)
        images = [int(i) for part in order.indices(step) for i in part]
        chosen = sorted(images, key=lambda i: -known.get(i, float("inf")))[: full * spec.micro_batch_size]
        pixels, labels = data.train_batch(np.array(chosen))
        each = F.cross_entropy(model(pixels), labels, reduction="none")
        adam.zero_grad()
        each.mean().backward()
        adam.step()
        known |= fresh  # a step is fetched, and its order fixed, while the one before it runs
        fresh = dict(zip(chosen, each.tolist(), strict=True))
        losses.append(each.mean().item())
    return losses


def _input_of(model):
    return model_input(model)
