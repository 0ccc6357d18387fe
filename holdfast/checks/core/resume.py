"""Resume: a training run killed with SIGKILL at random moments ends as if nothing had happened."""

import filecmp
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from holdfast.checks import Result, check
from holdfast.plan import file
from holdfast.plan.file import Methods, PlanFile, Training

KILLS, KILLS_IN_WRITE = 20, 8
STEPS, SEQUENCE = 12, 64
VOCABULARY = 1024  # more than the bytes, so that a checkpoint takes a while to write
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": SEQUENCE,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": SEQUENCE,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
    },
}
WRITTEN = "model.safetensors"


@dataclass(frozen=True)
class Case:
    """One plan to interrupt."""

    shape: str
    batch: int = 2
    micro_batch: int = 2
    methods: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> Path:
        """Model, plan and data in `directory`; returns the plan's path."""
        directory.mkdir(parents=True)
        config = directory / "config.json"
        config.write_text(json.dumps(SHAPES[self.shape]))
        rng = random.Random(0)
        words = ["".join(rng.choices("etaoins", k=rng.randint(1, 7))) for _ in range(64)]
        (directory / "data.txt").write_text(" ".join(rng.choices(words, k=4000)))
        plan = PlanFile(
            model=str(config),
            task="pretrain",
            batch=self.batch,
            micro_batch=self.micro_batch,
            sequence=SEQUENCE,
            budget={"device": 2**30},
            methods=Methods(**self.methods),
            training=Training(**self.training),
        )
        file.write(plan, directory / "plan.yaml")
        return directory / "plan.yaml"


CASES = {
    "accumulation, recompute, clip": Case(
        "llama",
        batch=4,
        methods={"blocks": {"model.layers": "recompute*2"}, "loss_chunk": 64},
        training={"clip": 1.0},
    ),
    "dropout": Case("gpt2"),
    "dropout, accumulation, adamw4": Case("gpt2", batch=4, methods={"optimizer": {"adamw4": {}}}),
    "gradients in backward, bfloat16": Case(
        "llama", methods={"gradients": "backward", "dtype": "bfloat16"}
    ),
}


def command(plan: Path, out: Path) -> list[str]:
    data = plan.parent / "data.txt"
    options = {"--data": data, "--out": out, "--steps": STEPS, "--checkpoint-every": 1}
    return ["train", str(plan), *(str(word) for pair in options.items() for word in pair)]


def _child(arguments: list[str], log: Path) -> None:
    from holdfast.cli import main

    with open(log, "a") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    # Tiny matrices: on a busy machine a second thread is mostly waited for.
    torch.set_num_threads(1)
    main(arguments)


class Trainer:
    """Runs `holdfast train` in processes of their own.

    They are forked from a server that has imported torch but run nothing, which saves the import;
    a kill ends the whole training process all the same.
    """

    def __init__(self, plan: Path):
        self.plan = plan
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            [
                "holdfast.training.run",
                "torch._dynamo",
                "holdfast.training.show",
                "transformers.models.gpt2.modeling_gpt2",
                "transformers.models.llama.modeling_llama",
            ]
        )

    def start(self, out: Path) -> multiprocessing.process.BaseProcess:
        log = self.plan.parent / "output.txt"
        process = self.context.Process(target=_child, args=(command(self.plan, out), log))
        process.start()
        return process

    def finish(self, process: multiprocessing.process.BaseProcess) -> None:
        process.join()
        if process.exitcode != 0:
            output = (self.plan.parent / "output.txt").read_text()
            raise RuntimeError(f"training ended with {process.exitcode}: {output[-2000:]}")


def writing(out: Path) -> bool:
    """Whether a checkpoint is being written, or was when the process was killed."""
    return any((out / "checkpoints").glob(".*.partial"))


def kill(process: multiprocessing.process.BaseProcess, delay: float, when: Callable[[], bool]):
    """SIGKILL after `delay` seconds, then as soon as `when()`; False if it ended before."""
    process.join(delay)
    while process.is_alive() and not when():
        time.sleep(1e-4)
    process.kill()
    process.join()
    return process.exitcode != 0


@dataclass
class Outcome:
    """How often a run was killed, and whether what it left equals the uninterrupted run."""

    kills: int = 0
    in_write: int = 0
    runs: int = 0
    different: list[str] = field(default_factory=list)


def interrupt(case: Case, directory: Path, kills: int, in_write: int, seed: int) -> Outcome:
    """Kill runs of `case` at `kills` random moments, `in_write` or more inside a checkpoint write.

    Moments are uniform over the duration of an uninterrupted run; a run that ends before its
    moment is compared, and another is begun.
    """
    trainer = Trainer(case.write(directory))
    reference = directory / "whole"
    trainer.finish(trainer.start(directory / "first"))  # what only a first run waits for
    started = time.perf_counter()
    trainer.finish(trainer.start(reference))
    duration = time.perf_counter() - started
    rng, outcome = random.Random(seed), Outcome()
    while outcome.kills < kills:
        outcome.runs += 1
        out = directory / f"run{outcome.runs}"
        while outcome.kills < kills:
            process = trainer.start(out)
            wanted = in_write > outcome.in_write
            moment = rng.uniform(0, duration)
            if not kill(process, moment, lambda: not wanted or writing(out)):  # noqa: B023
                break
            outcome.kills += 1
            outcome.in_write += writing(out)
        trainer.finish(trainer.start(out))
        outcome.different += differences(reference, out)
    return outcome


def differences(one: Path, other: Path) -> list[str]:
    """Names of what differs between two finished runs: weights, final state, losses."""
    checkpoint = f"checkpoints/step-{STEPS:09d}"
    names = (WRITTEN, f"{checkpoint}/state.safetensors", f"{checkpoint}/state.json")
    found = [n for n in names if not filecmp.cmp(one / n, other / n, shallow=False)]
    if losses(one) != losses(other):
        found.append("losses")
    return found


def losses(out: Path) -> list[tuple[int, float]]:
    lines = (out / "log.jsonl").read_text().splitlines()
    return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines)]


@check(
    "resume",
    claim="a run killed at random moments and resumed ends with the same bytes of weights and "
    "optimizer state as an uninterrupted one",
)
def run(seed: int) -> Result:
    total, per_case = Outcome(), {}
    with tempfile.TemporaryDirectory() as directory:
        for number, (name, case) in enumerate(CASES.items()):
            outcome = interrupt(
                case,
                Path(directory) / str(number),
                KILLS // len(CASES),
                KILLS_IN_WRITE // len(CASES),
                seed + number,
            )
            total.kills += outcome.kills
            total.in_write += outcome.in_write
            total.runs += outcome.runs
            per_case[name] = outcome.different or "equal"
    differ = sum(value != "equal" for value in per_case.values())
    return Result(
        measured={
            "kills": total.kills,
            "kills_in_write": total.in_write,
            "resumed_runs": total.runs,
            "cases_that_differ": differ,
            **per_case,
        },
        baseline={"uninterrupted_runs": len(CASES), "steps": STEPS},
        threshold=f"kills >= {KILLS}, kills_in_write >= 5, no byte differs",
        passed=total.kills >= KILLS and total.in_write >= 5 and not differ,
    )
