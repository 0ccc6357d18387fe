"""A long-tailed day of requests, simulated under one KV budget; and a real model, token by token.

The model is of 30 billion parameters in half precision on an A100 of 80 GB, by roofline: what it
leaves is the budget. Each request's text carries a planted cue of its length; the predictor learns
from other such requests, and its real latency counts.
"""

import time
from typing import Any

import numpy as np
import torch

from holdfast.checks import Result, check, tinylm
from holdfast.plan.hardware import load_hardware
from holdfast.plan.length_aware import LengthAwareScheduler, PagedScheduler
from holdfast.plan.length_predictor import LengthPredictor
from holdfast.plan.selective_batching import SelectiveBatching, kv_bytes_per_token
from holdfast.plan.serving_sim import Job, Served, ServingCost, simulate_serving

LONGEST, MEAN, SPREAD = 2048, 150, 0.9
REQUESTS, TAUGHT = 1000, 1500
BUCKETS = 10
PARAMETERS, LAYERS, WIDTH = 30_000_000_000, 48, 7168
KV = 2 * LAYERS * WIDTH * 2
BUDGET = 16 * 2**30
ACCURACY = 0.7
CUES = ["sum", "name", "list", "tell", "sketch", "compare", "essay", "explain", "story", "chapter"]


class Told:
    """A predictor whose answers were decided beforehand; texts are their positions."""

    def __init__(self, answers: np.ndarray):
        self.answers = answers

    def predict(self, texts):
        return [int(self.answers[int(text)]) for text in texts]

    def partial_fit(self, texts, lengths):
        raise AssertionError("what was decided beforehand is not taught")


def lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    drawn = rng.lognormal(np.log(MEAN) - SPREAD**2 / 2, SPREAD, count)
    return np.clip(drawn, 1, LONGEST).astype(int)


def texts(rng: np.random.Generator, outputs: np.ndarray) -> list[str]:
    """Prompts of nonsense, with a word that names the length's bucket."""
    words = rng.integers(0, 500, (len(outputs), 10))
    buckets = np.minimum(outputs * BUCKETS // (LONGEST + 1), BUCKETS - 1)
    return [
        f"please {CUES[b]} " + " ".join(f"w{w}" for w in row)
        for b, row in zip(buckets, words, strict=True)
    ]


def serve(jobs: list[Job], scheduler, seconds: float = 0.0) -> Served:
    cost = ServingCost(load_hardware("a100-80gb"), PARAMETERS, KV)
    return simulate_serving(jobs, scheduler, cost, max_output=LONGEST, predictor_seconds=seconds)


def simulated(seed: int) -> tuple[dict[str, Served], float, float]:
    """What each way of reserving serves; the predictor's accuracy and its latency."""
    rng = np.random.default_rng(seed)
    taught = lengths(rng, TAUGHT)
    # The tail is rare: lessons cover all buckets.
    taught[: TAUGHT // 2] = rng.integers(1, LONGEST + 1, TAUGHT // 2)
    predictor = LengthPredictor(LONGEST, buckets=BUCKETS)
    predictor.fit(texts(rng, taught), taught.tolist())
    outputs, prompts = lengths(rng, REQUESTS), rng.integers(16, 128, REQUESTS)
    asked = texts(rng, outputs)
    start = time.perf_counter()
    guesses = np.array([predictor.predict([text])[0] for text in asked])
    latency = (time.perf_counter() - start) / REQUESTS
    accuracy = float((predictor.bucket(guesses) == predictor.bucket(outputs)).mean())
    ends = np.array([(k + 1) * LONGEST // BUCKETS for k in range(BUCKETS)])
    right = ends[predictor.bucket(outputs)]
    wrong = ends[(predictor.bucket(outputs) + rng.integers(1, BUCKETS, REQUESTS)) % BUCKETS]
    seven = np.where(rng.random(REQUESTS) < ACCURACY, right, wrong)

    def jobs(names: list[str]) -> list[Job]:
        return [Job(int(p), int(n), t) for p, n, t in zip(prompts, outputs, names, strict=True)]

    numbered = jobs([str(i) for i in range(REQUESTS)])

    def told(answers: np.ndarray, seconds: float = 0.0) -> Served:
        scheduler = LengthAwareScheduler(BUDGET, KV, Told(answers), retrain_every=0)
        return serve(numbered, scheduler, seconds)

    found = {
        "predicted": serve(jobs(asked), LengthAwareScheduler(BUDGET, KV, predictor), latency),
        "oracle": told(outputs),
        "accuracy_70": told(seven, latency),
        "reserve_max": told(np.full(REQUESTS, LONGEST)),
        "paged": serve(numbered, PagedScheduler(BUDGET, KV)),
    }
    return found, accuracy, latency


def identical(seed: int) -> tuple[int, int, int]:
    """Requests of the tiny model whose tokens equal generation alone; all; preemptions."""
    model: Any = tinylm.trained(seed)
    kv = kv_bytes_per_token(model.config, model.dtype)
    rng = np.random.default_rng(seed)
    corpus = tinylm.corpus()[1]
    asked = []
    for n in np.clip(rng.lognormal(3, 0.8, 24), 1, 120).astype(int):
        at = int(rng.integers(0, len(corpus) - 64))
        asked.append((corpus[at : at + int(rng.integers(4, 48))], int(n)))
    # Half are told too little, so that they are preempted, some several times.
    answers = np.array([n if i % 2 else 4 for i, (_, n) in enumerate(asked)])
    scheduler = LengthAwareScheduler(256 * kv, kv, Told(answers), retrain_every=0)
    batching = SelectiveBatching(model, scheduler, host_budget=256 * kv * len(asked))
    for i, (prompt, n) in enumerate(asked):
        batching.submit(i, prompt, n, str(i))
    while scheduler.busy:
        batching.step()
        assert batching.device_bytes == scheduler.reserved_bytes <= scheduler.budget
    batching.close()
    equal = 0
    for i, (prompt, n) in enumerate(asked):
        found = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            max_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )
        equal += found[0, len(prompt) :].tolist() == batching.outputs[i]
    return equal, len(asked), scheduler.preemptions


@check(
    "length_aware",
    claim="serves 3 x the tokens of worst-case reservation, 2 x with 70 % of lengths right, and "
    "no token changes",
)
def run(seed: int) -> Result:
    found, accuracy, latency = simulated(seed)
    equal, asked, preempted = identical(seed)
    rate = {name: served.throughput for name, served in found.items()}
    ours, least = rate["predicted"], rate["reserve_max"]
    return Result(
        measured={
            "tokens_per_second": ours,
            "ratio": ours / least,
            "ratio_at_70_percent": rate["accuracy_70"] / least,
            "ratio_of_oracle": rate["oracle"] / least,
            "predictor_accuracy": accuracy,
            "predictor_seconds": latency,
            "preemptions": found["predicted"].preemptions,
            "preemptions_at_70_percent": found["accuracy_70"].preemptions,
            "preemptions_of_oracle": found["oracle"].preemptions,
            "peak_reserved_bytes": max(s.peak_reserved_bytes for s in found.values()),
            "identical_outputs": equal,
            "real_preemptions": preempted,
        },
        baseline={
            "reserve_max_tokens_per_second": least,
            "paged_tokens_per_second": rate["paged"],
            "paged_ratio": rate["paged"] / least,
            "paged_preemptions": found["paged"].preemptions,
            "budget_bytes": BUDGET,
            "outputs": asked,
        },
        threshold="ratio >= 3 and <= oracle, >= 2 at 70 % accuracy, predictor accuracy >= 0.9, "
        "no preemption with the oracle, reserved <= budget, all outputs identical across "
        "preemption",
        passed=ours >= 3 * least
        and ours <= rate["oracle"]
        and rate["accuracy_70"] >= 2 * least
        and accuracy >= 0.9
        and found["oracle"].preemptions == 0
        and all(s.peak_reserved_bytes <= BUDGET for s in found.values())
        and equal == asked
        and preempted > 0,
    )
