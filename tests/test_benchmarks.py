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


@pytest.fixture
def presses(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "kvpress", raising=False)
    return importlib.import_module("kvpress")


def _row(finch: float, press: float) -> dict:
    def runs(recalls: dict[str, float]) -> dict[str, dict]:
        return {name: {"recall": recall, "peak": 4096} for name, recall in recalls.items()}

    mine = {"finch": finch, "sinks_recent": 0.0, "infinipot": 0.5, "sirllm": 0.25}
    theirs = {"finch": press, "snapkv": 0.5, "streaming_llm": 0.0}
    about = {"task": "needle", "length": 254, "keep": 8, "kept": 16384}
    about |= {"full": 1.0, "their_full": 1.0}
    return about | {"our": runs(mine), "their": runs(theirs)}


def test_recall_at_equal_bytes_is_held_in_every_row_or_not_at_all(presses):
    assert presses.held([_row(0.75, 0.5), _row(0.5, 0.5 + presses.NOISE)])
    assert not presses.held([_row(0.75, 0.5), _row(0.5, 0.75)])
    result = {"rows": [_row(0.75, 0.5)], "versions": {"kvpress": "1"}, "held": False}
    # Nothing is a multiple of no recall at all.
    assert "| 0.75 | 0.50 | 1.50 | 0.50 | 1.50 |" in presses.table(result)
    assert "| 0.00 | 0.00 | - |" in presses.table(result)
    assert "in every row: NO" in presses.notes(result)


@pytest.mark.parametrize("keep", [8, 16])
def test_every_policy_leaves_as_many_entries_as_a_press(presses, keep):
    told = presses.episodes(3, 96, 0, 4)
    found = presses.ours(presses.recall.model().eval(), told, keep)
    assert set(found) == {"finch", "sinks_recent", "infinipot", "sirllm"}
    assert all(run["peak"] > 0 and 0 <= run["recall"] <= 1 for run in found.values())


def test_an_environment_that_cannot_be_made_is_named(presses, tmp_path, monkeypatch):
    monkeypatch.setattr(
        presses.subprocess, "run", lambda step: subprocess.CompletedProcess(step, 1)
    )
    with pytest.raises(presses.UsageError, match=r"venv .* failed; remove it"):
        presses.environment(tmp_path / "none")


def test_kvpress_reads_the_same_model_and_keeps_equal_bytes(presses):
    folder = os.environ.get("HOLDFAST_KVPRESS")
    if not folder:
        pytest.skip("HOLDFAST_KVPRESS names no environment that has kvpress")
    model = presses.recall.model().eval()
    told = presses.episodes(2, 96, 0, 4)
    found = presses.theirs(presses.environment(Path(folder)), model, told, (8,))
    entry = 2 * 2 * 2 * 64 * 4  # keys and values, layers, heads, head size, fp32
    kept = {name: run["kept"] for (name, _), run in found["runs"].items()}
    assert kept == {name: (96 if name == "full" else 8) * entry for name in presses.PRESSES}
    whole = presses.truncated_recall(model, told, 96)
    assert found["runs"]["full", 96]["recall"] == whole


def test_memories_are_added_and_searched_by_given_vectors(monkeypatch, tmp_path):
    import numpy as np

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    peer = importlib.import_module("memory_peer")
    monkeypatch.setattr(peer, "SINGLE", 20)
    pick = np.random.default_rng(0)
    vectors = pick.standard_normal((120, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    (tmp_path / "texts.json").write_text(json.dumps([f"turn {i} on tea" for i in range(120)]))
    (tmp_path / "questions.json").write_text(json.dumps(["turn 7?", "tea?"]))
    np.save(tmp_path / "vectors.npy", vectors)
    np.save(tmp_path / "tokens.npy", pick.integers(0, 255, (120, 2 * 48), dtype=np.uint8))
    np.save(tmp_path / "asked.npy", vectors[:2])
    states = {f"s{i}": vectors[i : i + 3] for i in range(2)}
    words = {f"w{i}": np.array(["turn", "on", "tea"]) for i in range(2)}
    np.savez(tmp_path / "states.npz", **states, **words)
    found = peer.ours(tmp_path, peer.Data(tmp_path), "process")
    assert found["disk_bytes"] > found["index_bytes"] > 120 * 2 * 384
    for name in ("add", "search", "fdatasync"):
        assert 0 < found[name]["p50"] <= found[name]["p99"]
