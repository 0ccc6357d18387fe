"""Run a plan for several devices: one process for each, all in step, resumed together.

Every rank writes its own checkpoint and none removes an older one before all have written, so that
whenever a rank dies there is a step from which all can go on.
"""

import json
import math
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.utils import logging

from holdfast.errors import HoldfastError, UsageError
from holdfast.files import write_text
from holdfast.ledger import Ledger
from holdfast.meter import Meter
from holdfast.parallel.launch import RankFailed, launch
from holdfast.plan.file import PlanFile
from holdfast.plan.plan import Plan
from holdfast.training import adapters, checkpoint
from holdfast.training.data import BatchStream, prepare
from holdfast.training.run import LOG, METERED_STEPS, REPORT, Run, Settings, rate
from holdfast.training.show import progress
from holdfast.training.tokenizers import load_tokenizer

LOCAL = range(2, 5)  # ranks that `train --local` starts by itself
TIMEOUT = 600.0


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def train_locally(
    plan: Plan, settings: Settings, out: Path, *, overwrite: bool = False, timeout: float = TIMEOUT
) -> dict[str, Any]:
    """Run a plan in processes of this machine: CPUs with gloo, or one GPU each.

    Raises:
        HoldfastError: a rank failed; says which and how to go on.
        UsageError: the plan has one rank, or more than this machine should run at once.
    """
    ranks = _ranks(plan.spec)
    gpus = torch.cuda.device_count()
    if ranks not in LOCAL and gpus < ranks:
        raise UsageError(
            f"the plan is for {ranks} ranks; --local starts {LOCAL[0]} to {LOCAL[-1]} of them on "
            f"CPUs, or one on each GPU (here are {gpus}): use torchrun"
        )
    backend = "nccl" if gpus >= ranks else "gloo"
    threads = max(1, (os.cpu_count() or 1) // ranks)
    try:
        reports = launch(
            train_rank,
            ranks,
            plan.spec.model_dump(mode="json"),
            settings,
            str(out),
            overwrite,
            backend=backend,
            timeout=timeout,
            limit=float("inf"),
            threads=threads,
        )
    except RankFailed as failure:
        rank, said = next(iter(failure.ranks.items()))
        line = said.strip().splitlines()[-1]
        usage = line.rpartition("UsageError: ")[2] if "UsageError: " in line else None
        if usage:
            raise UsageError(usage) from failure
        raise HoldfastError(
            f"rank {rank} of {ranks} failed: {line}; the other ranks were stopped. "
            f"{_resumable(out, ranks)}"
        ) from failure
    return reports[0]


def train_under_torchrun(
    plan: Plan, settings: Settings, out: Path, *, overwrite: bool = False, timeout: float = TIMEOUT
) -> dict[str, Any]:
    """This process's part of a run that torchrun started; the report on rank 0, else empty.

    Raises:
        HoldfastError: this rank or another failed.
    """
    ranks = _ranks(plan.spec)
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout))
    try:
        return train_rank(plan.spec.model_dump(mode="json"), settings, str(out), overwrite)
    except RuntimeError as error:
        if isinstance(error, HoldfastError):
            raise
        raise HoldfastError(
            f"rank {dist.get_rank()} of {ranks} lost another rank: {str(error).splitlines()[0]}. "
            f"{_resumable(out, ranks)}"
        ) from error
    finally:
        dist.destroy_process_group()


def _ranks(spec: PlanFile) -> int:
    if spec.parallel is None:
        raise UsageError("the plan is for one device; plan with --devices to use several")
    return spec.parallel.ranks


def _resumable(out: Path, ranks: int) -> str:
    step = _common_step([checkpoint.steps(_root(out, r)) for r in range(ranks)])
    at = f"step {step}" if step else "the start"
    return f"Run the same command again to go on from {at}."


def _root(out: Path, rank: int) -> Path:
    return Path(out) / "checkpoints" / f"rank-{rank}"


def _common_step(found: list[list[int]]) -> int:
    common = set(found[0]).intersection(*found[1:])
    return max(common, default=0)


def train_rank(document: dict, settings: Settings, out: str, overwrite: bool) -> dict[str, Any]:
    """What each process runs; the process group exists."""
    plan = Plan(PlanFile(**document))
    run = RankRun(plan, settings, out, overwrite=overwrite)
    return run.run()


class RankRun(Run):
    """One rank's part of a run; files that all share are the first rank's."""

    def __init__(self, plan: Plan, settings: Settings, out: str, *, overwrite: bool = False):
        self.rank = dist.get_rank()
        spec = plan.spec
        assert spec.parallel is not None
        if spec.methods.adapter and (spec.parallel.pipeline > 1 or spec.parallel.zero == 3):
            raise UsageError(
                "adapters train on replicas of a whole model: set pipeline: 1 and zero below 3"
            )
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        super().__init__(plan, settings, out, device=device, overwrite=overwrite)

    def _claim_directory(self, overwrite: bool) -> None:
        self._first(lambda: super(RankRun, self)._claim_directory(overwrite))

    def _first(self, action: Callable[[], None]) -> None:
        """Let the first rank do something; its error is everyone's."""
        said: list[Any] = [None]
        if self.rank == 0:
            try:
                action()
            except HoldfastError as error:
                said = [error]
        dist.broadcast_object_list(said)
        if said[0] is not None:
            raise said[0]

    def run(self) -> dict[str, Any]:
        """Train to the end, from the latest step that every rank has.

        Returns:
            The report on the first rank, elsewhere an empty one.
        """
        finished = self.out / REPORT
        if finished.exists():
            self._first(lambda: self._same_settings(None))
            return json.loads(finished.read_text(encoding="utf-8")) if self.rank == 0 else {}
        self.tokenizer = load_tokenizer(self.settings.tokenizer or self._default_tokenizer())
        spec = self.plan.spec
        data = prepare(self.settings.data, self.tokenizer, spec.sequence, batch_hint=spec.batch)
        self._first(lambda: self._same_settings(data))
        self.steps = self.settings.steps or max(1, len(data.train) // spec.batch)
        self._train(data)
        ledgers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ledgers, self.measured.ledger.to_json())
        if self.rank:
            return {}
        report = self._ranks_report(data, [Ledger.from_json(cells) for cells in ledgers])
        write_text(finished, json.dumps(report, indent=1) + "\n")
        return report

    def _train(self, data) -> None:
        from holdfast.parallel.program import Layout, Program

        spec = self.plan.spec
        assert spec.parallel is not None
        layout = Layout.of(spec.parallel, self.device.type)
        model = self._loaded()
        torch.manual_seed(spec.training.seed)
        program = Program(model, spec, layout, self.plan.arenas())
        self.program, self.model, self.optimizer = program, model, program.optimizer
        # Replicas draw different dropout, ranks of one replica the same at the start.
        torch.manual_seed(spec.training.seed + layout.replica)
        self.stream = BatchStream(data.train, spec.micro_batch, spec.training.seed)
        self.step, self.losses = 0, {}
        self._resume()
        first = self.step
        with progress() if self.rank == 0 else _quiet() as on_step:
            while self.step < self.steps:
                entry = self._step(self.step - first < METERED_STEPS)
                self.step += 1
                self.losses.setdefault("first", entry["loss"])
                self.losses["last"] = entry["loss"]
                if self.rank == 0:
                    with open(self.out / LOG, "a", encoding="utf-8") as log:
                        log.write(json.dumps(entry) + "\n")
                if self._due(self.settings.checkpoint_every):
                    self._save()
                on_step({**entry, "steps": self.steps})
        self._write_model()

    def _step(self, metered: bool) -> dict[str, Any]:
        spec, started = self.plan.spec, time.perf_counter()
        micros: list[dict[str, Tensor]] = []
        # Every rank draws the whole batch, so that the stream's state is one.
        for index in range(spec.accumulation * spec.replicas):
            micro = next(self.stream)
            if index % spec.replicas == self.program.layout.replica:
                micros.append(self._to_device(micro))
        factor = rate(self.step, self.steps, spec.training.schedule, spec.training.warmup)
        learning_rate = spec.training.learning_rate * factor
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if metered:
            with Meter(self.program.whole, self.optimizer, inputs=micros) as meter:
                loss = self.program.step(micros)
            self.measured.take("steps", meter)
        else:
            loss = self.program.step(micros)
        if not math.isfinite(loss):
            raise HoldfastError(
                f"loss is {loss} at step {self.step + 1}. Lower learning_rate "
                f"({spec.training.learning_rate}), raise warmup or set clip"
            )
        seconds = time.perf_counter() - started
        if not metered:
            self.step_seconds.append(seconds)
        return {
            "step": self.step + 1,
            "loss": loss,
            "learning_rate": learning_rate,
            "seconds": seconds,
        }

    def _save(self) -> None:
        root = _root(self.out, self.rank)
        extra = {"losses": self.losses, "stream": self.stream.state_dict()}
        tensors = self.program.tensors()
        checkpoint.save(root, self.step, tensors, self.optimizer, extra, keep_older=True)
        dist.barrier()  # now every rank has this step
        checkpoint.remove_older(root, self.step)

    def _resume(self) -> None:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, checkpoint.steps(_root(self.out, self.rank)))
        step = _common_step(found)
        if step:
            path = _root(self.out, self.rank) / f"step-{step:09d}"
            extra = checkpoint.load(path, self.program.tensors(), self.optimizer)
            self.step, self.losses = step, extra["losses"]
            self.stream.load_state_dict(extra["stream"])
        if self.rank == 0:
            log = self.out / LOG
            lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
            write_text(log, "".join(f"{line}\n" for line in lines[:step]))

    def _write_model(self) -> None:
        """The whole model, or its adapter, as one process would have written it."""
        tensors = self.program.gathered()
        if tensors is not None:
            logging.disable_progress_bar()
            if self.plan.spec.methods.adapter is not None:
                adapters.save(self.model, self.out)
            else:
                dtype = getattr(torch, self.plan.spec.methods.dtype)
                model = self.source.build("cpu", dtype)
                model.load_state_dict(tensors, strict=False)
                model.save_pretrained(self.out)  # type: ignore[operator]
            self.tokenizer.save_pretrained(self.out)
        dist.barrier()

    def _ranks_report(self, data, measured: list[Ledger]) -> dict[str, Any]:
        predicted, budget = self.plan.predicted, self.plan.budget
        ranks: list[dict[str, Any]] = [
            {
                "rank": rank,
                "predicted": _column(predicted, rank),
                "measured": _column(ledger, 0),
            }
            for rank, ledger in enumerate(measured)
        ]
        worst = max(ranks, key=lambda r: r["measured"]["peak_bytes"])
        return {
            "predicted": worst["predicted"],
            "measured": worst["measured"] | {"allocator_peak_bytes": None},
            "ranks": ranks,
            "budget_bytes": budget.device,
            "within_budget": worst["measured"]["peak_bytes"] <= budget.device,
            **self._outcome(data),
        }


def _column(ledger: Ledger, rank: int) -> dict[str, Any]:
    return {
        "peak_bytes": ledger.peak("device", rank=rank),
        "by_category": ledger.at_peak("device", rank=rank),
        "by_phase": ledger.phase_peaks("device", rank=rank),
    }


class _quiet:
    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        return lambda entry: None

    def __exit__(self, *exc) -> None:
        return None
