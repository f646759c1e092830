"""A whole job without Ray: workers on threads, the scheduler called directly, a real dataset, the bundled model."""

from __future__ import annotations

import pytest
import timm
import torch

from scheduler.actor import Scheduler
from tests.workers.engine import on_threads
from tests.workers.planners import DirectPlanner
from workers.contract import JobSpec
from workers.data import open_dataset
from workers.events import EventLog, read_events
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
        {},
        {"budgets": {"compute": 0.6, "bytes": 0.5}},
        {"ratios": {"full": 3, "skip": 2}, "hold": "none", "skip_fill": "rescale"},
        {"ratios": {"full": 2, "forward": 1, "skip": 2}, "skip_fill": "mean"},
    ],
    ids=["all-full", "budgets", "coherent rescale", "held mean"],
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


def _input_of(model):
    from workers.model import model_input

    return model_input(model)
