"""Run a plan on data: train within the budget, resume bitwise, prove the bytes by measurement."""

import gc
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from holdfast.errors import HoldfastError, UsageError
from holdfast.files import write_text
from holdfast.host import PeakRss
from holdfast.ledger import Ledger
from holdfast.meter import Meter
from holdfast.native.allocator import AllocatorPeak, WholeRunPeak
from holdfast.plan.apply import calibrate
from holdfast.plan.models import ModelSource, loss_of, resolve
from holdfast.plan.plan import Plan
from holdfast.training import adapters, checkpoint
from holdfast.training.adapters.read import READ
from holdfast.training.data import BatchStream, Dataset, DataSource, prepare
from holdfast.training.loss import verify_chunked
from holdfast.training.step import counted_tokens
from holdfast.training.tokenizers import load_tokenizer

LOG, REPORT, SETTINGS, PLAN = "log.jsonl", "report.json", "run.json", "plan.yaml"
METERED_STEPS = 2
VALIDATION_SEQUENCES = 64
CALIBRATION_SEQUENCES = 32


@dataclass(frozen=True)
class Settings:
    """What a run does beyond its plan; recorded, and equal when it is resumed.

    Args:
        data: what to read.
        tokenizer: "bytes", a directory or a cached hub id; by default the model's own directory,
            else bytes.
        model: a directory with weights that replaces the plan's model name.
        steps: optimizer steps; by default one epoch.
        validate_every, checkpoint_every: in steps; 0 only at the end.
    """

    data: DataSource
    tokenizer: str | None = None
    model: str | None = None
    steps: int | None = None
    validate_every: int = 0
    checkpoint_every: int = 0
    merge: bool = False

    def __post_init__(self):
        for name, least in (("steps", 1), ("validate_every", 0), ("checkpoint_every", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} {value} is out of range; use {least} or more")


@dataclass
class Measured:
    """The largest ledger seen, and the allocator's peak over the whole run."""

    ledger: Ledger = field(default_factory=Ledger)
    windows: dict[str, int] = field(default_factory=dict)

    def take(self, window: str, meter: Meter) -> None:
        self.windows[window] = max(meter.peak, self.windows.get(window, 0))
        for phase in meter.ledger.phases():
            for place in ("device", "host"):
                column = meter.ledger.column(place, phase)
                if sum(column.values()) > sum(self.ledger.column(place, phase).values()):
                    self.ledger.put(place, phase, column)


def rate(step: int, steps: int, schedule: str, warmup: float) -> float:
    """The learning rate's factor at `step` (from 0) of `steps`."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    if schedule == "linear":
        return 1 - done
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0


def load_model(plan: Plan, source: ModelSource, device: torch.device) -> nn.Module:
    """The plan's model on `device`: pretrained weights, or a seeded initialisation.

    Raises:
        UsageError: fine-tuning without weights.
    """
    spec = plan.spec
    dtype = getattr(torch, spec.methods.dtype)
    if spec.task == "pretrain" or source.make is not None:
        torch.manual_seed(spec.training.seed)
        return source.build(device, dtype)
    if source.path is None:
        raise UsageError(
            f"model {source.name} has no weights to fine-tune; name a directory that holds them "
            "with --model, or plan with --task pretrain"
        )
    model = source.build("meta", dtype)
    loaded = type(model).from_pretrained(
        str(source.path), config=model.config, dtype=dtype, local_files_only=True
    )
    return loaded.to(device).train()


class Run:
    """One training run in a directory; `run()` returns the report."""

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        out: str | os.PathLike[str],
        *,
        device: str | None = None,
        overwrite: bool = False,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.plan, self.settings, self.out = plan, settings, Path(out)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.on_step = on_step
        self.measured = Measured()
        self.step_seconds: list[float] = []
        self.started = time.perf_counter()
        self.source = resolve(settings.model or plan.spec.model)
        if self.source.task_head not in ("causal-lm", "custom"):
            raise UsageError(
                f"{self.source.name} is a {self.source.task_head} model; `train` reads text for "
                "causal language models, for other models use plan.apply in a loop of your own"
            )
        if settings.merge and "read" in (plan.spec.methods.adapter or {}):
            raise UsageError(
                "READ is a net beside the model, which no weight can take up: leave --merge out, "
                "and load what the run writes with holdfast.training.adapters.read.load"
            )
        self._claim_directory(overwrite)

    def _claim_directory(self, overwrite: bool) -> None:
        """Make the directory, or take over a run's; a directory of anything else stays as it is."""
        present = {p.name for p in self.out.iterdir()} if self.out.is_dir() else set()
        # A run that was killed at once leaves its plan alone, perhaps half-named.
        foreign = {n for n in present if n != PLAN and not n.startswith(f".{PLAN}")}
        if self.out.is_file() or (foreign and SETTINGS not in present):
            raise UsageError(
                f"{self.out} exists and holds no run ({', '.join(sorted(foreign)[:3])}); "
                "name a new directory with --out"
            )
        if overwrite and present:
            shutil.rmtree(self.out)
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self) -> dict[str, Any]:
        """Train to the end, from the latest checkpoint if there is one."""
        finished = self.out / REPORT
        if finished.exists():
            self._same_settings(None)
            if self.settings.merge and (self.out / "adapter_config.json").exists():
                raise UsageError(
                    f"{self.out} holds a finished run with its adapter apart; merge it with "
                    "peft's merge_and_unload, or train again with --overwrite --merge"
                )
            return json.loads(finished.read_text(encoding="utf-8"))
        self.tokenizer = load_tokenizer(self.settings.tokenizer or self._default_tokenizer())
        spec = self.plan.spec
        data = prepare(self.settings.data, self.tokenizer, spec.sequence, batch_hint=spec.batch)
        self._same_settings(data)
        self.steps = self.settings.steps or max(1, len(data.train) // spec.batch)
        counted = self.device.type == "cuda" or AllocatorPeak.supported()[0]
        # Without the native allocator, what the Meter saw stands alone.
        whole = WholeRunPeak(self.device) if counted else nullcontext()
        with whole as self.peak, PeakRss() as self.rss:
            self._train(data)
        return self._finish(data)

    def _default_tokenizer(self) -> str:
        path = self.source.path
        has_own = path is not None and any(path.glob("tokenizer*"))
        return str(path) if has_own else "bytes"

    def _same_settings(self, data: Dataset | None) -> None:
        """Refuse to continue a run with another plan, other data or other settings."""
        document = {
            "plan": self.plan.spec.model_dump(mode="json"),
            "settings": asdict(self.settings) | {"merge": False},
            "data": None if data is None else data.fingerprint,
        }
        document = json.loads(json.dumps(document))
        path = self.out / SETTINGS
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            for part, value in document.items():
                if value is not None and known.get(part) != value:
                    raise UsageError(
                        f"{self.out} holds a run with another {part}; continue it with what it "
                        "began with, name another --out, or start over with --overwrite"
                    )
            return
        self.plan.save(self.out / PLAN)
        write_text(path, json.dumps(document, indent=1) + "\n")

    def _train(self, data: Dataset) -> None:
        spec = self.plan.spec
        model = self._loaded()
        torch.manual_seed(spec.training.seed)
        self.model, self.optimizer = self.plan.apply(model)
        # Also when resuming: it is deterministic, and checkpoints hold only what trains.
        first = range(min(len(data.train), CALIBRATION_SEQUENCES))
        sequences = torch.tensor(first).split(spec.micro_batch)
        batches = [self._to_device(data.train.batch(part)) for part in sequences]
        calibrate(self.model, batches, spec.methods)
        torch.manual_seed(spec.training.seed)
        self.stream = BatchStream(data.train, spec.micro_batch, spec.training.seed)
        self.step, self.losses = 0, {}
        self._resume()
        if spec.methods.loss_chunk:
            verify_chunked(self.model, self._to_device(data.train.batch(torch.zeros(1).long())))
        first = self.step
        with open(self.out / LOG, "a", encoding="utf-8") as log:
            while self.step < self.steps:
                metered = self.step - first < METERED_STEPS
                entry = self._one_step(metered)
                self.step += 1
                if not metered:
                    self.step_seconds.append(entry["seconds"])
                self.losses.setdefault("first", entry["loss"])
                self.losses["last"] = entry["loss"]
                if self._due(self.settings.validate_every) and len(data.validation):
                    entry["validation_loss"] = self._windowed("validation", self._validate, data)
                    self.losses["validation"] = entry["validation_loss"]
                # The line before the checkpoint: resuming drops lines, it cannot invent one.
                log.write(json.dumps(entry) + "\n")
                log.flush()
                if self._due(self.settings.checkpoint_every):
                    self._windowed("checkpoint", self._save)
                if self.on_step is not None:
                    self.on_step({**entry, "steps": self.steps})
        self._export()

    def _loaded(self) -> nn.Module:
        """The plan's model, which has an embedding for each of the tokenizer's tokens."""
        model = load_model(self.plan, self.source, self.device)
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        vocabulary = None if embeddings is None else embeddings.weight.shape[0]
        if vocabulary is not None and len(self.tokenizer) > vocabulary:
            raise UsageError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model {vocabulary} "
                "embeddings; choose the model's own tokenizer"
            )
        return model

    def _resume(self) -> None:
        path = checkpoint.latest(self.out / "checkpoints")
        kept: list[str] = []
        if path is not None:
            extra = checkpoint.load(path, self.model, self.optimizer)
            self.step, self.losses = extra["step"], extra["losses"]
            self.stream.load_state_dict(extra["stream"])
            log = self.out / LOG
            if log.exists():
                lines = log.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines if _complete(line, self.step)]
        # What was logged after the checkpoint happens again.
        write_text(self.out / LOG, "".join(f"{line}\n" for line in kept))

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _one_step(self, metered: bool) -> dict[str, Any]:
        spec = self.plan.spec
        started = time.perf_counter()
        micros = [self._to_device(next(self.stream)) for _ in range(spec.accumulation)]
        factor = rate(self.step, self.steps, spec.training.schedule, spec.training.warmup)
        learning_rate = spec.training.learning_rate * factor
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        meter = Meter(self.model, self.optimizer, inputs=micros) if metered else nullcontext()
        with meter:
            loss = self._forward_backward(micros)
            if spec.training.clip is not None:
                trainable = [p for p in self.model.parameters() if p.requires_grad]
                nn.utils.clip_grad_norm_(trainable, spec.training.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if metered:
            self.measured.take("steps", meter)  # type: ignore[arg-type]
        return {
            "step": self.step + 1,
            "loss": loss,
            "learning_rate": learning_rate,
            "seconds": time.perf_counter() - started,
        }

    def _forward_backward(self, micros: list[dict[str, Tensor]]) -> float:
        counts = [counted_tokens(m) for m in micros]
        total, mean = sum(counts), 0.0
        for micro, count in zip(micros, counts, strict=True):
            loss = loss_of(self.model(**micro))
            value = float(loss.detach())
            # Before backward: with gradients consumed there, it is too late afterwards.
            if not math.isfinite(value):
                saved = checkpoint.latest(self.out / "checkpoints")
                raise HoldfastError(
                    f"loss is {value} at step {self.step + 1}; the last good state is "
                    f"{saved or 'the start'}. Lower learning_rate "
                    f"({self.plan.spec.training.learning_rate}), raise warmup or set clip"
                )
            weight = count / total
            (loss * weight if weight != 1.0 else loss).backward()
            mean += value * weight
        return mean

    def _due(self, every: int) -> bool:
        return self.step == self.steps or bool(every and self.step % every == 0)

    def _windowed(self, name: str, function: Callable, *args):
        """Measure the first call of each kind."""
        if name in self.measured.windows:
            return function(*args)
        with Meter(self.model, self.optimizer) as meter:
            result = function(*args)
        self.measured.take(name, meter)
        return result

    def _save(self) -> None:
        extra = {"losses": self.losses, "stream": self.stream.state_dict()}
        checkpoint.save(self.out / "checkpoints", self.step, self.model, self.optimizer, extra)

    @torch.no_grad()
    def _validate(self, data: Dataset) -> float:
        """Mean loss per token over up to 64 validation sequences."""
        self.model.eval()
        total, tokens = 0.0, 0
        indices = torch.arange(min(len(data.validation), VALIDATION_SEQUENCES))
        for part in indices.split(self.plan.spec.micro_batch):
            batch = self._to_device(data.validation.batch(part))
            count = counted_tokens(batch)
            total += float(loss_of(self.model(**batch))) * count
            tokens += count
        self.model.train()
        return total / tokens

    def _finish(self, data: Dataset) -> dict[str, Any]:
        report = self._report(data)
        write_text(self.out / REPORT, json.dumps(report, indent=1) + "\n")
        return report

    def _export(self) -> None:
        """Write what opens without Holdfast: an adapter, or the whole model."""
        self.optimizer = None  # type: ignore[assignment]
        gc.collect()
        side_net = self.model._modules.get("read")
        if isinstance(side_net, READ):
            side_net.save(self.out)
            self.tokenizer.save_pretrained(self.out)
            return
        has_adapter = self.plan.spec.methods.adapter is not None
        # What rewrites whole weights has no file of its own beside the model's.
        apart = has_adapter and getattr(adapters.base.attached(self.model).cls, "apart", True)
        if apart and not self.settings.merge:
            adapters.save(self.model, self.out)
        else:
            if has_adapter:
                adapters.merge(self.model)
            logging.disable_progress_bar()
            self.model.save_pretrained(self.out)
        self.tokenizer.save_pretrained(self.out)

    def _report(self, data: Dataset) -> dict[str, Any]:
        predicted, measured = self.plan.predicted, self.measured.ledger
        budget = self.plan.budget
        whole = None if self.peak is None else self.peak.peak
        peaks = [measured.peak("device")] + ([whole] if whole is not None else [])
        return {
            "predicted": _summary(predicted),
            "measured": _summary(measured)
            | {
                "allocator_peak_bytes": whole,
                "rss_increase_bytes": self.rss.increase,
                "windows": self.measured.windows,
            },
            "budget_bytes": budget.device,
            "within_budget": max(peaks) <= budget.device,
            **self._outcome(data),
        }

    def _outcome(self, data: Dataset) -> dict[str, Any]:
        """What a report says apart from bytes."""
        return {
            "loss": self.losses,
            "steps": self.steps,
            "seconds": time.perf_counter() - self.started,
            "seconds_per_step": median(self.step_seconds) if self.step_seconds else None,
            "tokens": self.steps * self.plan.spec.batch * self.plan.spec.sequence,
            "data": asdict(data.report),
            "device": str(self.device),
        }


def _complete(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError):
        return False  # the line that a kill cut short


def _summary(ledger: Ledger) -> dict[str, Any]:
    return {
        "peak_bytes": ledger.peak("device"),
        "by_category": ledger.at_peak("device"),
        "by_phase": ledger.phase_peaks("device"),
        "ledger": ledger.to_json(),
    }
