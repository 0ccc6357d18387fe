"""Trace the operations of a training step or of serving, without weights and without data.

The same trace as everywhere in `plan`: a shallow copy of the model runs on fake tensors, and what a
block does counts as often as the full model has such a block.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from holdfast.errors import HoldfastError, UsageError, unknown
from holdfast.meter import FORWARD, fake_step
from holdfast.plan.blocks import Stack, stacks_of, truncate_, whole
from holdfast.plan.models import ModelSource, loss_of
from holdfast.plan.ops import Op, OpTable, Watcher, merged
from holdfast.plan.trace import CATEGORY_CODES, Key, record, to_fake_

Task = Literal["pretrain", "finetune", "serve"]
TASKS = ("pretrain", "finetune", "serve")


def source_dtype(source: ModelSource, dtype: str) -> torch.dtype:
    """The dtype named, or for "auto" the one of the config, else fp32.

    Raises:
        UsageError: no floating-point dtype has that name.
    """
    if dtype == "auto":
        stored = str(getattr(source.config, "dtype", None) or "float32").removeprefix("torch.")
        return getattr(torch, stored)
    known = ("float32", "bfloat16", "float16")
    if dtype not in known:
        raise unknown("dtype", dtype, ("auto", *known))
    return getattr(torch, dtype)


def trace_ops(
    source: ModelSource,
    task: Task,
    batch: int,
    sequence: int,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
) -> OpTable:
    """The operations of one training step, or of serving, at full depth.

    Phases: `forward`, `backward` and `step` (AdamW) of training; for causal language models
    `prefill` of `sequence` tokens and `decode` of one more; for others `forward` alone.

    Raises:
        UsageError: unknown task, or a batch or sequence that the model does not take.
        HoldfastError: the model cannot be traced.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    for what, value in (("batch", batch), ("sequence", sequence)):
        if value < 1:
            raise UsageError(f"{what} {value} is not positive; use 1 or more")
    limit = source.max_sequence
    decoded = int(task == "serve" and source.task_head == "causal-lm")
    if limit is not None and sequence + decoded > limit:
        raise UsageError(
            f"{source.name} has {limit} positions, {sequence + decoded} are needed; "
            f"use sequence {limit - decoded} or less"
        )
    if task != "serve":
        step = _training(batch, sequence, dtype)
        table = _trace(source, dtype, attention, step, ("forward", "backward"))
        update = optimizer_ops(source.build("meta", dtype).parameters())
        states = {
            name: sum(dict(op.traffic)[name] * op.count for op in update) // passes
            for name, passes in (("gradients", 1), ("optimizer", 2))
        }
        return table + OpTable(update, states)
    if source.task_head != "causal-lm":
        return _trace(
            source, dtype, attention, _inference(batch, sequence, dtype), ("forward",) * 2
        )
    prefill = _trace(source, dtype, attention, _prefill(batch, sequence), ("prefill",) * 2)
    return prefill + decode_ops(source, batch, sequence, dtype, attention)


def decode_ops(
    source: ModelSource,
    batch: int,
    context: int,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
) -> OpTable:
    """The operations that make one token when the cache holds `context` tokens."""
    return _trace(source, dtype, attention, _decode(batch, context), ("decode",) * 2)


def optimizer_ops(parameters: Iterable[nn.Parameter]) -> list[Op]:
    """AdamW as one fused kernel per parameter: it reads the gradient, all else it also writes."""
    ops = []
    for p in {id(p): p for p in parameters if p.requires_grad}.values():
        size = p.numel() * p.element_size()
        traffic = (("gradients", size), ("optimizer", 4 * size), ("parameters", 2 * size))
        dtype = str(p.dtype).removeprefix("torch.")
        ops.append(Op("step", "adamw", (tuple(p.shape),), dtype, 0, traffic))
    return merged(ops)


# Given the source and its fake model: the inputs, the run that is traced, and the cache it fills.
_Made = tuple[dict[str, Any], Callable[[], Any], Any]
_Make = Callable[[ModelSource, nn.Module], _Made]


def _training(batch: int, sequence: int, dtype: torch.dtype) -> _Make:
    def make(source: ModelSource, model: nn.Module) -> _Made:
        inputs = source.example_inputs(batch, sequence, "cpu", dtype)
        return inputs, lambda: loss_of(model.train()(**inputs)).backward(), None

    return make


def _inference(batch: int, sequence: int, dtype: torch.dtype) -> _Make:
    def make(source: ModelSource, model: nn.Module) -> _Made:
        inputs = source.example_inputs(batch, sequence, "cpu", dtype)
        if source.config is not None and not source.config.is_encoder_decoder:
            inputs.pop("labels", None)
        return inputs, torch.no_grad()(lambda: model.eval()(**inputs)), None

    return make


def _prefill(batch: int, sequence: int) -> _Make:
    def make(source: ModelSource, model: nn.Module) -> _Made:
        inputs = {"input_ids": source.example_inputs(batch, sequence, "cpu")["input_ids"]}
        cache = _new_cache(source)
        return inputs, lambda: _generate(model, cache, inputs["input_ids"]), cache

    return make


def _decode(batch: int, context: int) -> _Make:
    def make(source: ModelSource, model: nn.Module) -> _Made:
        ids = source.example_inputs(batch, context, "cpu")["input_ids"]
        cache = _new_cache(source)
        _generate(model, cache, ids)
        inputs = {"input_ids": ids[:, :1].clone()}
        return inputs, lambda: _generate(model, cache, inputs["input_ids"]), cache

    return make


def _new_cache(source: ModelSource) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=source.config)


@torch.no_grad()
def _generate(model: nn.Module, cache: Any, ids: Tensor) -> None:
    known = inspect.signature(model.forward).parameters
    more = {"past_key_values" if "past_key_values" in known else "cache_params": cache}
    if "logits_to_keep" in known:
        more["logits_to_keep"] = 1  # as `generate` calls it
    model.eval()(input_ids=ids, use_cache=True, **more)
    if not cache_tensors(cache):
        raise HoldfastError("the model leaves transformers' DynamicCache empty")


def cache_tensors(cache: Any) -> list[Tensor]:
    """Every tensor that a transformers cache keeps between calls."""
    return [t for layer in cache.layers for t in _layer_tensors(layer)]


def _layer_tensors(layer: Any) -> list[Tensor]:
    # A sliding layer keeps its window's length as a tensor of one number, no state of a token.
    values = {k: v for k, v in vars(layer).items() if k != "_sliding_window_tensor"}
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _trace(source, dtype, attention, make: _Make, phases) -> OpTable:
    stacks = stacks_of(source.build("meta", dtype, attention))
    for attempt in (stacks, whole(stacks)):
        try:
            return _trace_stacks(source, dtype, attention, make, phases, attempt)
        except UsageError:
            raise
        except Exception as error:  # whatever a model's own code may raise
            if attempt == whole(stacks):
                reason = (str(error).splitlines() or ["no message"])[0]
                raise HoldfastError(
                    f"{source.name} cannot be traced ({type(error).__name__}: {reason}); "
                    "check its config, or try another attention, for example eager"
                ) from error
    raise AssertionError("the last attempt returns or raises")


def _trace_stacks(source, dtype, attention, make: _Make, phases, stacks: list[Stack]) -> OpTable:
    # Constructors do not work on fake tensors.
    model = source.build("meta", dtype, attention)
    resident = {
        "parameters": _held(model.parameters()),
        "buffers": _held(model.buffers()),
    }
    watcher = Watcher()
    with fake_step():
        model = to_fake_(truncate_(model, stacks))
        inputs, run, cache = make(source, model)
        trace = record(
            model, stacks, run, inputs=inputs, op_seconds=lambda *_: 0.0, observe=watcher
        )
        if cache is not None and watcher.log is not None:
            watcher.log.tag("cache", cache_tensors(cache))
            resident["cache"] = _cache_bytes(cache, stacks)
    if not trace.regular and any(len(s.kept) != s.depth for s in stacks):
        raise HoldfastError("blocks do not run once each in order")
    repeats = {(s.path, k): s.representative.count(k) for s in stacks for k in range(len(s.kept))}

    def times(key: Key) -> int:
        name, path, k = key
        return repeats[path, k] if name in ("F", "end", "B") and trace.regular else 1

    ops = watcher.ops(times, phases)
    saved = CATEGORY_CODES["activations"]
    resident["inputs"] = trace.base["inputs"]
    resident["activations"] = sum(
        times(key) * int(part.change[(part.category == saved) & (part.phase == FORWARD)].sum())
        for key, part in trace.segments.items()
    )
    resident["temporary"] = max(dict(op.traffic).get("temporary", 0) for op in ops)
    return OpTable(ops, {category: nbytes for category, nbytes in resident.items() if nbytes})


def _held(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _cache_bytes(cache: Any, stacks: list[Stack]) -> int:
    """At full depth: a traced block's layer of the cache stands for those of its equals."""
    layers = [_held(_layer_tensors(layer)) for layer in cache.layers]
    stack = next((s for s in stacks if s.depth == len(layers)), None)
    if stack is None:
        return sum(layers)
    # Layers are numbered by the model, not by the position among the kept blocks.
    return sum(layers[stack.kept[k]] for k in stack.representative)
