"""Lengthen a checkpoint and go on with its masked-LM training on a domain: the recipe of 057.

The result is a directory of transformers' own Longformer or BigBird; it appears under its name when
it is complete. Until then `.NAME.lengthening` beside it holds the run, which goes on from there.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from holdfast.context.attention.clinical import copy_global, lengthen, to_stock
from holdfast.errors import HoldfastError, UsageError
from holdfast.files import whole_directory, write_text
from holdfast.ledger import Ledger
from holdfast.meter import Meter, predict
from holdfast.training import checkpoint
from holdfast.training.data import BatchStream, Dataset, DataSource, prepare
from holdfast.training.run import rate
from holdfast.training.tokenizers import load_tokenizer

LOG, REPORT, SETTINGS = "log.jsonl", "lengthen.json", "run.json"
SHARE, WARMUP, CLIP = 0.15, 0.1, 1.0
METERED_STEPS, VALIDATION_SEQUENCES = 2, 16
IGNORED = -100


@dataclass(frozen=True)
class Settings:
    """One run; equal when it is resumed.

    Args:
        model: a directory or a cached hub id of an encoder with 512 positions or so.
        data: text of the domain; None where nothing is trained.
        steps: optimizer steps; None is one epoch, 0 converts alone.
        batch: sequences of `length` tokens in a step.
        window, block: as in `lengthen`.
    """

    model: str
    data: DataSource | None
    attention: str = "longformer"
    length: int = 4096
    steps: int | None = None
    batch: int = 1
    learning_rate: float = 3e-5
    window: int = 512
    block: int = 64
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self):
        for name, least in (("steps", 0), ("batch", 1), ("checkpoint_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} {value} is out of range; use {least} or more")
        if self.data is None and self.steps != 0:
            raise UsageError("no --domain to train on; name text of it, or give --steps 0")

    def lengthened(self, model: PreTrainedModel) -> PreTrainedModel:
        return lengthen(model, self.attention, self.length, window=self.window, block=self.block)


def mask_tokens(
    ids: Tensor, mask_id: int, special: Tensor, vocabulary: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """`input_ids` and `labels` for masked-LM: ids (B,n) int64 on a CPU.

    15 % of the tokens that are not special carry loss, in each batch one at least; of them 80 % are
    masked, 10 % replaced by any token, 10 % left.
    """
    ordinary = ~torch.isin(ids, special)
    chosen = (torch.rand(ids.shape, generator=generator) < SHARE) & ordinary
    if not chosen.any():
        chosen.view(-1)[int(ordinary.view(-1).int().argmax())] = True
    kind = torch.rand(ids.shape, generator=generator)
    words = torch.randint(vocabulary, ids.shape, generator=generator)
    inputs = torch.where(chosen & (kind < 0.8), mask_id, ids)
    inputs = torch.where(chosen & (kind >= 0.9), words, inputs)
    return {"input_ids": inputs, "labels": ids.masked_fill(~chosen, IGNORED)}


def trainable(model: PreTrainedModel) -> torch.optim.Optimizer:
    """Prepare a lengthened model for training, and its optimizer."""
    for name, parameter in model.named_parameters():
        # Without global tokens no gradient reaches their projections; they are copied at the end.
        parameter.requires_grad_("_global." not in name)
    base: Any = model.base_model
    for layer in base.encoder.layer:
        # The fused kernels drop no probabilities; hidden states are dropped as ever.
        layer.attention.self.dropout.p = 0.0
    model.train()
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.01
    )


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> Tensor:
    loss = model(**inputs).loss
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def predicted(settings: Settings, config: Any, dtype: torch.dtype) -> Ledger:
    """Bytes of a training step, without allocating any."""

    def build() -> tuple[Any, Any, Any]:
        model = settings.lengthened(AutoModelForMaskedLM.from_config(config, dtype=dtype))
        ids = torch.zeros(settings.batch, settings.length, dtype=torch.long)
        return model, trainable(model), {"input_ids": ids, "labels": ids.clone()}

    return predict(build, _step).ledger


class Run:
    """One run of the recipe; `run()` returns the report."""

    def __init__(
        self,
        settings: Settings,
        out: str | Path,
        *,
        device: str | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.settings, self.out, self.on_step = settings, Path(out), on_step
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.state = self.out.with_name(f".{self.out.name}.lengthening")
        self.started = time.perf_counter()
        self.measured: dict[str, Any] = {"peak_bytes": 0, "by_category": {}}

    def run(self) -> dict[str, Any]:
        """Lengthen, train from the latest checkpoint if there is one, write the directory."""
        if self.out.exists():
            return self._finished()
        tokenizer = load_tokenizer(self.settings.model)
        model = self._load()
        config = type(model.config).from_dict(model.config.to_dict())
        self.settings.lengthened(model)
        report: dict[str, Any] = {"loss": {}, "steps": 0}
        if self.settings.steps != 0:
            self._check(tokenizer, model)
            ledger = predicted(self.settings, config, model.dtype)
            report = self._train(model, tokenizer) | {
                "predicted": _summary(ledger),
                "measured": self.measured,
            }
            copy_global(model)
        report |= {
            "settings": self._document(),
            "seconds": time.perf_counter() - self.started,
        }
        self._write(model, tokenizer, report)
        return report

    def _finished(self) -> dict[str, Any]:
        path = self.out / REPORT
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if known is None or known.get("settings") != self._document():
            what = "a run with other settings" if known else "something else"
            raise UsageError(f"{self.out} exists and holds {what}; name a new directory with --out")
        return known

    def _document(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self.settings)))

    def _load(self) -> PreTrainedModel:
        name = self.settings.model
        try:
            config = AutoConfig.from_pretrained(name, local_files_only=True)
            kind: Any = AutoModelForMaskedLM
            if self.settings.steps == 0 and not str(config.architectures).count("ForMaskedLM"):
                kind = AutoModel
            logging.disable_progress_bar()
            model, info = kind.from_pretrained(
                name, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UsageError(
                f"checkpoint {name!r} does not open as a masked-LM encoder ({reason}); give a "
                "directory that save_pretrained wrote, or a hub id in the local cache"
            ) from error
        base = f"{model.base_model_prefix}."
        missing = sorted(x for x in info["missing_keys"] if not x.startswith(base))
        if missing and self.settings.steps != 0:
            raise UsageError(
                f"checkpoint {name!r} has no masked-LM head ({missing[0]} is missing); give one "
                "that has, or --steps 0 to convert without training"
            )
        return model.to(self.device)

    def _check(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        if tokenizer.mask_token_id is None:
            raise UsageError(
                f"the tokenizer of {self.settings.model!r} has no mask token, which masked-LM "
                'training writes; set "mask_token" in its tokenizer_config.json'
            )
        embeddings: Any = model.get_input_embeddings()
        rows = embeddings.weight.shape[0]
        if len(tokenizer) > rows:
            raise UsageError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {rows} embeddings; they do "
                "not belong together"
            )

    def _data(self, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        # BERT's tokenizers bound a text by tokens of other names; the saved one keeps its own.
        reader = load_tokenizer(self.settings.model)
        if reader.eos_token is None:
            reader.eos_token = tokenizer.sep_token
        if reader.bos_token is None:
            reader.bos_token = tokenizer.cls_token
        assert self.settings.data is not None
        data = prepare(
            self.settings.data, reader, self.settings.length, batch_hint=self.settings.batch
        )
        document = {"settings": self._document(), "data": data.fingerprint}
        path = self.state / SETTINGS
        if path.exists():
            if json.loads(path.read_text(encoding="utf-8")) != document:
                raise UsageError(
                    f"{self.state} holds a run with other settings or data; continue it with what "
                    "it began with, remove it, or name another --out"
                )
        else:
            write_text(path, json.dumps(document, indent=1) + "\n")
        return data

    def _train(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        settings = self.settings
        data = self._data(tokenizer)
        steps = settings.steps or max(1, len(data.train) // settings.batch)
        special = torch.tensor(tokenizer.all_special_ids)

        def masked(batch: dict[str, Tensor], draw: int) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed((settings.seed << 32) + draw)
            ids = batch["input_ids"]
            inputs = mask_tokens(ids, tokenizer.mask_token_id, special, len(tokenizer), generator)
            return {name: tensor.to(self.device) for name, tensor in inputs.items()}

        torch.manual_seed(settings.seed)
        optimizer = trainable(model)
        stream = BatchStream(data.train, settings.batch, settings.seed)
        losses: dict[str, float | None] = {}
        done = 0
        path = checkpoint.latest(self.state / "checkpoints")
        if path is None:
            losses["held_out_before"] = self._held_out(model, data, masked)
        else:
            extra = checkpoint.load(path, model, optimizer)
            done, losses, self.measured = extra["step"], extra["losses"], extra["measured"]
            stream.load_state_dict(extra["stream"])
        first = done
        self._keep_log(done)
        with open(self.state / LOG, "a", encoding="utf-8") as log:
            while done < steps:
                began = time.perf_counter()
                # Validation draws its masks below 2^20, training above.
                inputs = masked(next(stream), (1 << 20) + done)
                factor = settings.learning_rate * rate(done, steps, "linear", WARMUP)
                for group in optimizer.param_groups:
                    group["lr"] = factor
                loss = self._step(model, optimizer, inputs, metered=done - first < METERED_STEPS)
                done += 1
                if not math.isfinite(loss):
                    raise HoldfastError(
                        f"loss is {loss} at step {done}; the last good state is {path or 'none'}. "
                        f"Remove {self.state} and lower --learning-rate ({settings.learning_rate})"
                    )
                losses.setdefault("first", loss)
                losses["last"] = loss
                entry = {"step": done, "loss": loss, "seconds": time.perf_counter() - began}
                log.write(json.dumps(entry) + "\n")
                log.flush()
                if done == steps or done % settings.checkpoint_every == 0:
                    extra = {
                        "losses": losses, "stream": stream.state_dict(), "measured": self.measured,
                    }  # fmt: skip
                    root = self.state / "checkpoints"
                    path = checkpoint.save(root, done, model, optimizer, extra)
                if self.on_step is not None:
                    self.on_step(entry | {"steps": steps})
        losses["held_out_after"] = self._held_out(model, data, masked)
        return {"loss": losses, "steps": steps, "data": asdict(data.report)}

    def _step(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        inputs: dict[str, Tensor],
        *,
        metered: bool,
    ) -> float:
        if not metered:
            return float(_step(model, optimizer, inputs))
        with Meter(model, optimizer, inputs=inputs) as meter:
            loss = float(_step(model, optimizer, inputs))
        if meter.peak > self.measured["peak_bytes"]:
            self.measured = _summary(meter.ledger)
        return loss

    def _keep_log(self, done: int) -> None:
        """What was logged after the checkpoint happens again."""
        path = self.state / LOG
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        write_text(path, "".join(f"{line}\n" for line in lines[:done]))

    @torch.no_grad()
    def _held_out(self, model: PreTrainedModel, data: Dataset, masked: Callable) -> float | None:
        """Mean loss over the first held-out sequences, always under the same masks."""
        count = min(len(data.validation), VALIDATION_SEQUENCES)
        if not count:
            return None
        model.eval()
        losses = []
        for index in range(count):
            batch = data.validation.batch(torch.tensor([index]))
            losses.append(float(model(**masked(batch, index)).loss))
        model.train()
        return sum(losses) / count

    def _write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, report: dict[str, Any]
    ) -> None:
        stock = to_stock(model.eval())
        if stock.config.sep_token_id is None:
            stock.config.sep_token_id = tokenizer.sep_token_id
        tokenizer.model_max_length = self.settings.length
        with whole_directory(self.out) as folder:
            stock.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if (self.state / LOG).exists():
                shutil.copy(self.state / LOG, folder / LOG)
            write_text(folder / REPORT, json.dumps(report, indent=1) + "\n")
        shutil.rmtree(self.state, ignore_errors=True)


def _summary(ledger: Ledger) -> dict[str, Any]:
    return {"peak_bytes": ledger.peak("device"), "by_category": ledger.at_peak("device")}
