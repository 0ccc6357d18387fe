"""The global choices of a plan: what a request allows, enumerated with their quality.

A skeleton decides the dtype, weights, adapter, optimizer, saved tensors, micro-batch and when
gradients are consumed. What remains is an option for every block.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from holdfast.budget import Budget
from holdfast.errors import UsageError, unknown
from holdfast.plan.method import EXACT, Method, Quality
from holdfast.plan.records import BACKWARD, refusal
from holdfast.plan.registry import method, methods, of_slot

QUALITIES = ("exact", "bounded", "lossy")
TUNES = ("any", "full", "adapter")
BF16 = Quality("lossy", 0.03, "holdfast check bf16")


@dataclass(frozen=True)
class Request:
    """What a user asks `fit` for.

    Args:
        model: anything `resolve` takes; budget: anything `Budget.parse` takes.
        batch: sequences in one optimizer step; the plan may split it into micro-batches.
        tune: which parameters train; by default any for finetune, full for pretrain.
        allow: the worst quality that is considered.
        dtype: of parameters; auto keeps a config's bfloat16 for frozen weights, else float32.
        optimizer, adapter: a method's key, or any.
        methods: keys of methods; a plan then has these and no others, whatever their quality.
        hardware: preset or file that time is predicted for.
        reserve: device bytes kept free; by default 1 GiB on CUDA hardware, on a CPU what its
            allocator holds beside tensors.
    """

    model: Any
    budget: Budget
    task: str = "finetune"
    batch: int = 1
    sequence: int = 1024
    tune: str | None = None
    allow: str = "bounded"
    dtype: str = "auto"
    optimizer: str = "any"
    adapter: str = "any"
    methods: tuple[str, ...] = ()
    hardware: str | None = None
    reserve: int | None = None
    clip: float | None = None

    def __post_init__(self):
        for name, value, known in (
            ("task", self.task, ("finetune", "pretrain")),
            ("tune", self.tune, (None, *TUNES)),
            ("allow", self.allow, QUALITIES),
            ("dtype", self.dtype, ("auto", "float32", "bfloat16")),
        ):
            if value not in known:
                options = ", ".join(str(k) for k in known if k)
                raise UsageError(f"{name} {value!r} is unknown; use one of {options}")
        for name in ("batch", "sequence"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{name} {value!r} is not a positive integer; use 1 or more")

    @property
    def tuning(self) -> str:
        return self.tune or ("full" if self.task == "pretrain" else "any")


@dataclass(frozen=True)
class Globals:
    """The part of a skeleton that needs a trace of its own."""

    dtype: str
    weights: str | None
    adapter: str | None
    saved: tuple[str, ...]
    micro: int

    def label(self) -> str:
        return " + ".join(
            [self.dtype, *(p for p in (self.weights, self.adapter) if p), *self.saved]
        )


@dataclass(frozen=True)
class Skeleton:
    """All global choices: what remains is an option for every block."""

    globals: Globals
    optimizer: str
    in_backward: bool
    quality: Quality

    def label(self) -> str:
        parts = [self.globals.dtype]
        parts += [p for p in (self.globals.weights, self.globals.adapter) if p]
        parts += [self.optimizer, *self.globals.saved]
        if self.in_backward:
            parts.append("gradients in backward")
        return " + ".join(parts)


def combined(parts: list[Quality]) -> Quality:
    """Of methods together: the worst kind, the sum of what they may cost."""
    worst = max(parts, key=lambda q: q.rank)
    sources = ", ".join(dict.fromkeys(q.source for q in parts if q.source))
    return Quality(worst.kind, sum(q.estimate for q in parts), sources)


def _dtypes(request: Request, stored: str) -> list[tuple[str, Quality, Quality]]:
    """(dtype, quality when everything trains, quality when only an adapter trains)."""
    known = {
        "float32": ("float32", EXACT, EXACT),
        "bfloat16": ("bfloat16", BF16, EXACT if stored == "bfloat16" else BF16),
    }
    return [known[request.dtype]] if request.dtype != "auto" else list(known.values())


def _named(request: Request) -> dict[str, list[Method]]:
    """Slot -> the methods of it that the request names."""
    for key in request.methods:
        if key not in methods():
            raise unknown("method", key, methods())
    reason = refusal(request.methods)
    if reason is not None:
        raise UsageError(f"methods {','.join(request.methods)} do not go together: {reason}")
    found: dict[str, list[Method]] = {}
    for key in request.methods:
        found.setdefault(methods()[key].slot, []).append(methods()[key])
    return found


def _choices(
    request: Request, applies: Callable[[str], bool]
) -> tuple[list[str | None], list[str | None], list[tuple[str, ...]], list[str]]:
    """Adapters, weights, sets of saved methods and optimizers to try."""
    if request.methods:
        named = {slot: [m.key for m in found] for slot, found in _named(request).items()}
        adapters: list[str | None] = [*named.get("adapter", [None])]
        forms: list[str | None] = [*named.get("weights", [None])]
        return adapters, forms, [tuple(named.get("saved", ()))], named.get("optimizer", ["adamw"])

    def automatic(slot: str) -> list[str]:
        return [m.key for m in of_slot(slot) if m.automatic]

    tunes = ["full", "adapter"] if request.tuning == "any" else [request.tuning]
    adapters = [None] if "full" in tunes else []
    if "adapter" in tunes:
        keys = automatic("adapter")
        if request.adapter != "any":
            keys = [method(request.adapter, "adapter").key]
        adapters += [k for k in keys if applies(k)]
    forms = [None, *filter(applies, automatic("weights"))]
    saved: list[tuple[str, ...]] = [(), *((k,) for k in automatic("saved") if applies(k))]
    optimizers = automatic("optimizer")
    if request.optimizer != "any":
        optimizers = [method(request.optimizer, "optimizer").key]
    return adapters, forms, saved, optimizers


def generate(request: Request, stored: str, applies: Callable[[str], bool]) -> Iterator[Skeleton]:
    """All skeletons of a request.

    Args:
        stored: the dtype in which the model's file keeps its parameters, or "".
        applies: whether a method, given by key, applies to the model.
    """
    micros = [m for m in range(request.batch, 0, -1) if request.batch % m == 0]
    for dtype, full, frozen in _dtypes(request, stored):
        for adapter, form, saved, optimizer, micro in itertools.product(
            *_choices(request, applies), micros
        ):
            if form is not None and adapter is None:
                continue  # integer weights do not train
            wider = request.dtype == "auto" and dtype != stored == "bfloat16"
            if adapter and wider:
                continue  # frozen weights hold no more than their file does
            keys = [k for k in (adapter, form, optimizer, *saved) if k]
            if refusal(keys):
                continue
            chosen = [methods()[k] for k in keys]
            parts = [frozen if adapter else full]
            parts += [m.quality(**m.defaults()) for m in chosen]
            common = Globals(dtype, form, adapter, saved, micro)
            for in_backward in (False, True):
                if in_backward and (micro != request.batch or request.clip is not None):
                    continue
                if in_backward and refusal([*keys, BACKWARD]):
                    continue
                yield Skeleton(common, optimizer, in_backward, combined(parts))
