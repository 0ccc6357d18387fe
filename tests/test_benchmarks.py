"""The benchmarks against peers run, with jobs of seconds, and without peers."""

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]


def test_training_memory_compares_plain_with_a_plan(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/training_memory.py", "--job", "tiny", "--json"),
            *("--methods", "plain", "holdfast"),
        ],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    plain, plan = result["rows"]["plain"], result["rows"]["holdfast"]
    assert plan["meter_bytes"] <= result["plan"]["budget_bytes"] < plain["meter_bytes"]
    assert plan["trainable"] == plain["trainable"]
    assert result["verdict"] == result["verdict"] | {"equal_loss": True, "fewer_bytes": True}
    assert list(tmp_path.glob("holdfast/finetune-*/model.safetensors"))


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("training_memory")


def test_a_method_that_fails_is_an_error_not_a_crash(benchmark, tmp_path):
    ours, theirs = multiprocessing.Pipe()
    ours.send(True)
    missing = str(tmp_path / "plan.yaml")
    benchmark.serve(theirs, "holdfast", 1e-3, benchmark.JOBS["tiny"], tmp_path, missing)
    assert ours.recv()["error"].startswith("UsageError: plan")


def test_verdict_compares_with_the_best_peer_in_default_use(benchmark):
    measured = {"peak_bytes": 100, "loss": 2.0, "default": True}
    rows = {
        "plain": measured,
        "torchao 4-bit": {"error": "ModuleNotFoundError: No module named 'torchao'"},
        "peft LoRA": measured | {"peak_bytes": 80},
        "peft LoRA + recompute": measured | {"peak_bytes": 40, "default": False},
        "holdfast": measured | {"peak_bytes": 60, "loss": 2.05},
    }
    found = benchmark.verdict(rows)
    assert found["best_peer"] == "peft LoRA" and found["fewer_bytes"] and found["equal_loss"]
    assert found["fewer_still"] == ["peft LoRA + recompute"]
    assert not benchmark.verdict(rows | {"holdfast": {"error": "x"}})["fewer_bytes"]
    assert not benchmark.verdict(rows | {"holdfast": measured | {"loss": 2.07}})["equal_loss"]


@pytest.fixture
def plans(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("plans")


def _plan_of(plans, name: str, share: float):
    """What a peer runs of the tiny job, and the bytes of plain training."""
    peer, job = plans.PEERS[name], plans.JOBS["tiny"]
    for module in peer.needs:
        pytest.importorskip(module)
    plain = plans.Running(job, job.model())
    theirs, _, _ = peer.plan(job, int(share * plain.peak))
    return theirs, plain


def _flops(running) -> int:
    with FlopCounterMode(display=False) as counter:
        running.step()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["device_map", "recompute", "sac_milp"])
def test_a_peers_plan_trains_as_plain_torch_does(plans, name):
    theirs, plain = _plan_of(plans, name, 0.8)
    for ours, reference in zip(theirs.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("name", ["device_map", "recompute"])
def test_in_as_many_bytes_our_plan_computes_no_more(plans, name):
    theirs, plain = _plan_of(plans, name, 1.0)
    mine, _, predicted = plans.ours(plans.JOBS["tiny"], theirs.peak)
    assert predicted <= mine.peak <= theirs.peak <= plain.peak
    assert _flops(mine) <= _flops(theirs)


def test_device_map_counts_weights_and_not_their_training(plans):
    job = plans.JOBS["tiny"]
    theirs, plain = _plan_of(plans, "device_map", 0.8)
    mine, _, _ = plans.ours(job, int(0.8 * plain.peak))
    assert mine.peak <= 0.8 * plain.peak < theirs.peak
    weights = sum(p.nbytes for p in plain.model.parameters())
    with pytest.raises(ValueError, match="on disk"):
        plans.device_map(job, weights // 2)


def test_a_peer_that_is_not_installed_is_named(plans, monkeypatch):
    monkeypatch.setitem(sys.modules, "pulp", None)
    result = plans.compare(["sac_milp"], plans.JOBS["tiny"])
    assert "needs pulp" in plans.table(result) and not result["held"]
