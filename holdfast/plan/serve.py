"""What fits when a model is served: weights, a bounded cache per request, and working memory.

A request is read by chunks and decoded token by token. Both steps are run once on fake tensors with
caches that are full, so that peaks are those of a run, prefill included; nothing is allocated.
Working memory does not add up over layers, so a model of a few layers stands for all.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch

from holdfast.budget import Budget
from holdfast.errors import UsageError, unknown
from holdfast.ledger import Ledger
from holdfast.meter import StorageLog, fake_step
from holdfast.plan.fitter import ATTENTION_WORKSPACE
from holdfast.plan.hardware import Hardware, default_hardware, load_hardware
from holdfast.plan.models import ModelSource, resolve
from holdfast.plan.skeletons import QUALITIES
from holdfast.plan.trace import to_fake_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from holdfast.context.cache.bounded import BoundedCache

FORMS = ("dense", "int8", "int4")
_FORM_QUALITY = {"dense": "exact", "int8": "bounded", "int4": "lossy"}


@dataclass(frozen=True)
class Serve:
    """What a user asks for.

    Args:
        model: anything `resolve` takes that is a causal language model.
        batch: requests at the same time.
        sequence: tokens of a request, prompt and output.
        allow: worst quality: "exact" keeps every token as it is, "bounded" may round to int8,
            "lossy" may drop tokens.
        policies: names of cache policies; by default all that need no training.
        dtype: of the weights; auto keeps the config's.
        chunk: tokens of a prompt that are read at once.
        reserve: device bytes kept free; by default as for training.
    """

    model: Any
    budget: Budget
    batch: int = 1
    sequence: int = 1024
    allow: str = "bounded"
    policies: tuple[str, ...] = ()
    dtype: str = "auto"
    hardware: str | None = None
    reserve: int | None = None
    chunk: int = 512

    def __post_init__(self):
        for name, value, known in (
            ("allow", self.allow, QUALITIES),
            ("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16")),
        ):
            if value not in known:
                raise unknown(name, str(value), known)
        for name in ("batch", "sequence", "chunk"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} is not positive; use 1 or more")


@dataclass(frozen=True)
class Choice:
    """One way to serve.

    Attributes:
        capacity: tokens of a request that are kept.
        request_bytes: what each request's cache holds at most.
        requests: how many of them fit the budget.
        step_seconds: of one decoding step of all requests, at the roofline.
    """

    policy: str
    form: str
    quality: str
    capacity: int
    request_bytes: int
    requests: int
    ledger: Ledger
    step_seconds: float

    @property
    def peak(self) -> int:
        return self.ledger.peak("device")

    def row(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "policy": self.policy, "form": self.form, "quality": self.quality,
            "tokens_per_request": self.capacity, "request_bytes": self.request_bytes,
            "requests": self.requests, "peak_bytes": self.peak,
            "by_phase": self.ledger.phase_peaks("device"), "step_seconds": self.step_seconds,
        }  # fmt: skip


class Server:
    """Searches the ways to serve a model; `best` and `choices` are its results."""

    def __init__(self, asked: Serve):
        self.asked = asked
        self.source: ModelSource = resolve(asked.model)
        if self.source.task_head != "causal-lm":
            raise UsageError(
                f"{self.source.name} is no causal language model; --task serve needs one"
            )
        self._steps: dict[tuple[str, str, int], tuple[int, int]] = {}
        self._slopes: dict[tuple[str, str], int] = {}
        self._working = 0

    @cached_property
    def hardware(self) -> Hardware:
        name = self.asked.hardware
        return default_hardware() if name is None else load_hardware(name)

    @cached_property
    def dtype(self) -> torch.dtype:
        name = self.asked.dtype
        if name == "auto":
            name = str(getattr(self.source.config, "dtype", None) or "float32")
        return cast(torch.dtype, getattr(torch, name.removeprefix("torch.")))

    @property
    def reserve(self) -> int:
        if self.asked.reserve is not None:
            return self.asked.reserve
        return 2**30 if self.hardware.device.kind == "cuda" else ATTENTION_WORKSPACE

    @property
    def room(self) -> int:
        return self.asked.budget.device - self.reserve

    @cached_property
    def model(self) -> "PreTrainedModel":
        return cast("PreTrainedModel", self.source.build("meta", self.dtype).eval())

    @cached_property
    def weights(self) -> dict[str, int]:
        """Bytes by category, tied tensors once."""
        return {
            "parameters": sum(p.nbytes for p in self.model.parameters()),
            "buffers": sum(b.nbytes for b in self.model.buffers()),
        }

    def choices(self) -> Iterator[Choice]:
        """Every policy and form within the allowed quality, as large as the budget allows."""
        from holdfast.context.cache.policies import untrained

        names = self.asked.policies or ("full", *(n for n, c in untrained().items() if c.drops))
        for name in names:
            for form in FORMS:
                quality = _FORM_QUALITY[form] if name == "full" else "lossy"
                if QUALITIES.index(quality) <= QUALITIES.index(self.asked.allow):
                    choice = self.fit(name, form, quality)
                    if choice is not None:
                        yield choice

    def fit(self, name: str, form: str, quality: str) -> Choice | None:
        """The largest cache up to the asked length that fits; None if none does."""
        fixed = sum(self.weights.values())
        if fixed + self._held(name, form, self.asked.sequence) <= self.room:
            whole = self.choice(name, form, quality, self.asked.sequence)
            if whole.peak <= self.room:
                # Nothing is dropped: a policy that could is the full cache, less a few bytes.
                return whole if name == "full" else None
        if name == "full":
            return None
        each = self._held(name, form, 1)
        # Working memory hardly depends on the capacity, so what was found last is a good guess.
        guess = min((self.room - fixed - self._working) // each, self.asked.sequence - 1)
        # A chunk is a part of the capacity, so that a small cache also works with little memory.
        capacity = max(guess, 4 * self._least(name))
        best: Choice | None = None
        for _ in range(16):
            if capacity < self._least(name):
                break
            found = self.choice(name, form, quality, capacity)
            spare = self.room - found.peak
            if spare < 0:
                if best is not None:
                    break
                capacity = min(capacity + spare // each, capacity - 1)
            else:
                best = found
                more = min(spare // each, self.asked.sequence - 1 - capacity)
                if more == 0:
                    break
                capacity += more
        return best

    def choice(self, name: str, form: str, quality: str, capacity: int) -> Choice:
        """What a capacity takes, whether it fits or not."""
        prefill, decode = self._step(name, form, capacity)
        batch, fixed = self.asked.batch, self.weights
        held = self._held(name, form, capacity)
        ledger = Ledger()
        ledger.put("device", "load", fixed)
        ledger.put("device", "prefill", {**fixed, "cache": held, "temporary": prefill})
        ledger.put("device", "decode", {**fixed, "cache": held, "temporary": decode})
        free = self.room - sum(fixed.values()) - max(prefill, decode)
        each = held // batch
        config = self.model.config.get_text_config(decoder=True)
        count = sum(p.numel() for p in self.model.parameters())
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        looks = 4 * config.num_hidden_layers * config.num_attention_heads * width * capacity
        seconds = self.hardware.seconds(
            batch * (2 * count + looks), sum(fixed.values()) + held, self.dtype
        )
        return Choice(name, form, quality, capacity, each, max(0, free // each), ledger, seconds)

    def best(self, found: Sequence[Choice] | None = None) -> Choice | None:
        """The exact one if it fits, else the least harm; among those that drop, the first named."""
        found = list(self.choices()) if found is None else found
        order = list(self.asked.policies or ("full", "sinks_recent"))
        return min(
            found,
            key=lambda c: (
                QUALITIES.index(c.quality),
                c.capacity < self.asked.sequence and c.form != "dense",
                order.index(c.policy) if c.policy in order else len(order),
            ),
            default=None,
        )

    def smallest(self) -> Choice:
        """What exact service needs."""
        return self.choice("full", "dense", "exact", self.asked.sequence)

    def _cache(self, model: "PreTrainedModel", name: str, form: str, capacity: int, batch: int):
        from holdfast.context.cache.bounded import BoundedCache, default_chunk
        from holdfast.context.cache.forms import stored_form
        from holdfast.context.cache.policies import find

        chunk = min(self.asked.chunk, default_chunk(capacity))
        return BoundedCache.for_model(
            model, find(name), tokens=capacity, batch=batch, chunk=chunk,
            form=stored_form(form, model),
        )  # fmt: skip

    def _least(self, name: str) -> int:
        from holdfast.context.cache.policies import find

        return find(name).least(1)

    def _held(self, name: str, form: str, capacity: int) -> int:
        """Bytes of the caches of all requests between two steps."""
        if (name, form) not in self._slopes:
            with fake_step():
                model = cast("PreTrainedModel", to_fake_(self.source.build("meta", self.dtype)))
                cache = self._cache(model, name, form, 4096, 1)
                self._slopes[name, form] = cache.predict_held(1)
        return self.asked.batch * capacity * self._slopes[name, form]

    def _step(self, name: str, form: str, capacity: int) -> tuple[int, int]:
        """What a chunk of one prompt, and one token of every request, work with."""
        key = (name, form, capacity)
        if key not in self._steps:
            with fake_step(), torch.no_grad():
                model = cast("PreTrainedModel", to_fake_(self._short.build("meta", self.dtype)))
                model.eval()
                self._steps[key] = (
                    self._work(model, name, form, capacity, 1, None),
                    self._work(model, name, form, capacity, self.asked.batch, 1),
                )
        self._working = max(self._steps[key])
        return self._steps[key]

    @cached_property
    def _short(self) -> ModelSource:
        """The model with two layers, or as many as have one of each type."""
        config = copy.deepcopy(self.source.config)
        assert config is not None
        text = config.get_text_config(decoder=True)
        kinds = getattr(text, "layer_types", None)
        count = 2 if not kinds else max(2, 1 + max(map(kinds.index, set(kinds))))
        if count < text.num_hidden_layers:
            if kinds:
                text.layer_types = kinds[:count]
            text.num_hidden_layers = count
        return replace(self.source, config=config)

    def _work(
        self, model: "PreTrainedModel", name: str, form: str, capacity: int, batch: int,
        tokens: int | None,
    ) -> int:  # fmt: skip
        cache = self._cache(model, name, form, capacity, batch)
        ids = torch.ones(batch, tokens or cache.chunk, dtype=torch.long)
        return work(model, cache, ids)


def work(model: "PreTrainedModel", cache: "BoundedCache", ids: torch.Tensor) -> int:
    """Bytes that one forward pass over ids (B,n) holds at its peak beside weights and cache.

    The cache is made full first, so that what has to be dropped is.
    """
    from holdfast.context.stream import read

    cache.allocate(len(ids))
    full = cache.capacity if cache.policy.drops else cache.capacity - ids.shape[1]
    for layer in cache.bounded:
        layer.counts = layer.read = [full] * len(ids)
    log = StorageLog()
    with log:
        read(model, ids, cache)
    total = peak = 0
    for _, change, _ in log.log.events:
        total += change
        peak = max(peak, total)
    return peak
