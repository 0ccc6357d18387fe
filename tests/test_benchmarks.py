"""The benchmark against peers runs, with the job of seconds and without any peer."""

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
