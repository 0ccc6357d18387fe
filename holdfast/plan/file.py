"""plan.yaml: a versioned file that people may edit; errors name the field, the value and the fix.

holdfast: 1                   format version
model, task                   what is trained; pretrain or finetune
batch, micro_batch, sequence  sequences per optimizer step, per forward pass; tokens in each
budget                        bytes per place, for example device: 24GiB
methods                       what is kept, in what form, where and for how long
  dtype                       of parameters: float32 or bfloat16
  weights, adapter            {key: {knob: value}} or null
  optimizer                   {key: {knob: value}}
  gradients                   step: kept until the step; backward: consumed as they appear
  saved                       list of {key: {knob: value}}
  loss_chunk                  tokens whose logits exist at once; 0 for the model's own loss
  blocks                      path of a block list -> runs such as "recompute*3 keep*5"
parallel                      how several ranks share the work; null for one device
  data, zero                  replicas of the model, and the ZeRO stage that spreads their states
  pipeline, chunks            ranks that a replica is spread over, parts of the model on each
  order, offload              pipeline schedule, chunks per rank whose activations wait on the host
  costs                       per part: nanoseconds of F, I, W; bytes saved; nanoseconds to copy
                              them off and back; bytes left for W
training                      learning_rate, schedule, warmup, weight_decay, clip, seed
hardware                      what time is predicted for
predicted                     peak_bytes, step_seconds and the ledger
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from holdfast.budget import PLACES
from holdfast.errors import UsageError
from holdfast.files import write_text
from holdfast.units import format_bytes, parse_bytes

Choice = dict[str, dict[str, Any]]
BLOCK_OPTIONS = ("keep", "recompute", "host", "disk")
_RUN = re.compile(r"([a-z]+)(?:\*(\d+))?")
_Size = Annotated[int, BeforeValidator(parse_bytes)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def parse_runs(text: str) -> list[str]:
    """ "recompute*2 keep" -> ["recompute", "recompute", "keep"]."""
    options: list[str] = []
    for word in text.split():
        match = _RUN.fullmatch(word)
        if match is None or match[1] not in BLOCK_OPTIONS:
            raise ValueError(
                f"{word!r} is not a run of blocks; write for example recompute*3 keep*5, "
                f"with one of {', '.join(BLOCK_OPTIONS)}"
            )
        options += [match[1]] * int(match[2] or 1)
    return options


def format_runs(options: list[str]) -> str:
    runs: list[list] = []
    for option in options:
        if runs and runs[-1][0] == option:
            runs[-1][1] += 1
        else:
            runs.append([option, 1])
    return " ".join(f"{option}*{count}" for option, count in runs)


class Methods(_Strict):
    dtype: Literal["float32", "bfloat16"] = "float32"
    weights: Choice | None = None
    adapter: Choice | None = None
    optimizer: Choice = Field(default={"adamw": {}})
    gradients: Literal["step", "backward"] = "step"
    saved: list[Choice] = Field(default_factory=list)
    loss_chunk: Annotated[int, Field(ge=0)] = 0
    blocks: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _checked(self):
        for name in ("weights", "adapter", "optimizer"):
            choice = getattr(self, name)
            if choice is not None and len(choice) != 1:
                raise ValueError(f"{name} names {len(choice)} methods; name exactly one")
        if any(len(choice) != 1 for choice in self.saved):
            raise ValueError("each entry of saved names exactly one method")
        for runs in self.blocks.values():
            parse_runs(runs)
        return self


class Parallel(_Strict):
    data: Annotated[int, Field(ge=1)] = 1
    zero: Annotated[int, Field(ge=0, le=3)] = 0
    pipeline: Annotated[int, Field(ge=1)] = 1
    chunks: Annotated[int, Field(ge=1)] = 1
    order: Literal["1f1b", "bfs", "gis", "uniform", "zero-bubble"] = "1f1b"
    offload: Annotated[int, Field(ge=0)] = 0
    costs: list[tuple[int, int, int, int, int, int, int]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _checked(self):
        if self.ranks < 2:
            raise ValueError("one rank is not parallel; set data or pipeline to 2 or more")
        if self.pipeline > 1 and self.zero:
            raise ValueError(
                f"zero {self.zero} with pipeline {self.pipeline}: a pipeline's replicas are whole; "
                "set zero: 0, or pipeline: 1"
            )
        if self.pipeline == 1 and (self.chunks > 1 or self.offload):
            raise ValueError("chunks and offload belong to a pipeline; set pipeline to 2 or more")
        if self.pipeline > 1 and len(self.costs) != self.pipeline * self.chunks:
            raise ValueError(
                f"costs has {len(self.costs)} entries for {self.pipeline * self.chunks} parts "
                "(pipeline * chunks); let `holdfast fit --devices` write them"
            )
        return self

    @property
    def ranks(self) -> int:
        return self.data * self.pipeline


class Training(_Strict):
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0


def training(**fields: Any) -> Training:
    """A plan's training section.

    Raises:
        UsageError: names the field, the value and what is allowed.
    """
    try:
        return Training(**fields)
    except ValidationError as error:
        raise UsageError(_explain(error)) from error


class PlanFile(_Strict):
    holdfast: Literal[1] = 1
    model: str
    task: Literal["pretrain", "finetune"] = "finetune"
    batch: Annotated[int, Field(ge=1)] = 1
    micro_batch: Annotated[int, Field(ge=1)] = 1
    sequence: Annotated[int, Field(ge=1)]
    budget: dict[Literal["device", "host", "disk"], _Size]
    methods: Methods = Field(default_factory=Methods)
    parallel: Parallel | None = None
    training: Training = Field(default_factory=Training)
    hardware: str = "cpu-2core"
    predicted: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _checked(self):
        if self.batch % (self.micro_batch * self.replicas):
            shared = f" on each of {self.replicas} replicas" if self.replicas > 1 else ""
            raise ValueError(
                f"micro_batch {self.micro_batch}{shared} does not divide batch {self.batch}"
            )
        if self.parallel is not None and self.methods.gradients == "backward":
            raise ValueError("gradients: backward is for one device; set gradients: step")
        if not self.budget.get("device", 0):
            raise ValueError("budget leaves no device bytes; write for example device: 24GiB")
        if self.methods.gradients == "backward":
            if self.micro_batch != self.batch:
                raise ValueError(
                    "gradients: backward consumes each gradient at once and so excludes "
                    "accumulation; set micro_batch equal to batch or gradients: step"
                )
            if self.training.clip is not None:
                raise ValueError(
                    "gradients: backward excludes clip, which needs all gradients at once; "
                    "remove clip or set gradients: step"
                )
        return self

    @property
    def replicas(self) -> int:
        return 1 if self.parallel is None else self.parallel.data

    @property
    def accumulation(self) -> int:
        """Micro-batches of one replica in one optimizer step."""
        return self.batch // (self.micro_batch * self.replicas)


def read(path: str | os.PathLike[str]) -> PlanFile:
    """Read and validate a plan.

    Raises:
        UsageError: missing file, malformed YAML, unknown or wrong field.
    """
    name = os.fspath(path)
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"plan {name} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"plan {name} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"plan {name} holds {type(content).__name__}; expected fields like model:")
    try:
        return PlanFile(**content)
    except ValidationError as error:
        raise UsageError(f"plan {name}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "plan"
        message = problem["msg"].removeprefix("Value error, ")
        given = problem.get("input")
        if problem["type"] == "extra_forbidden":
            message = "unknown field; remove it or check the spelling"
        shown = "" if isinstance(given, dict | list | BaseModel) else f" = {given!r}"
        lines.append(f"{where}{shown}: {message}")
    return "; ".join(lines)


def write(plan: PlanFile, path: str | os.PathLike[str]) -> None:
    """Write atomically; sizes are written for people where that loses nothing."""
    content = plan.model_dump(mode="json")
    content["budget"] = {p: n for p in PLACES for q, n in plan.budget.items() if p == q and n}
    text = yaml.safe_dump(content, sort_keys=False, width=100)
    comments = ", ".join(f"{p} {format_bytes(v)}" for p, v in content["budget"].items())
    text = (
        f"# A plan of Holdfast for {comments}; edit it freely, it is validated when read.\n{text}"
    )
    write_text(path, text)
