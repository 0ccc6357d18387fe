"""Fit the codes and the adapter of one block to what the block did before; `apiq` goes through all.

Rounding is imitated in floating point here, with gradients; what is kept afterwards are real codes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast.attach import hook
from holdfast.forms.bits import pack
from holdfast.forms.packed import Packed

# Clipping starts at sigmoid(4) = 0.982 of a group's range.
START, CLIP_LR, LORA_LR, DECAY = 4.0, 5e-3, 5e-4, 0.1
Batch = Mapping[str, Any] | Tensor


class Call:
    """One batch's call of a block, for other hidden states each time."""

    def __init__(self, args: tuple, kwargs: dict[str, Any]):
        self.name = None if args else next(k for k, v in kwargs.items() if isinstance(v, Tensor))
        self.args, self.kwargs = args[1:], {k: v for k, v in kwargs.items() if k != self.name}

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        named = {self.name: hidden} if self.name else {}
        out = block(*([] if named else [hidden]), *self.args, **named, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


class _Stop(Exception):
    pass


def calls_of(
    model: nn.Module, first: nn.Module, batches: list[Batch]
) -> tuple[list[Call], list[Tensor]]:
    """How the model calls its first block for each batch, and with which hidden states."""
    calls: list[Call] = []
    hidden: list[Tensor] = []

    def seen(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(call := Call(args, kwargs))
        hidden.append(kwargs[call.name] if call.name else args[0])
        raise _Stop

    handle = first.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        for batch in batches:
            with suppress(_Stop):
                model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        handle.remove()
    return calls, hidden


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and without a cache that calls of one block would fill again and again."""
    config, was_training = getattr(model, "config", None), model.training
    cached = getattr(config, "use_cache", None)
    model.eval()
    if cached:
        config.use_cache = False
    try:
        yield
    finally:
        model.train(was_training)
        if cached:
            config.use_cache = cached


class Fitted(nn.Module):
    """A linear while its block is optimised: exact, or rounded as now with the adapter beside."""

    def __init__(self, layer: Any, dense: Tensor):
        super().__init__()
        form: Any = layer.packed.form
        self.dense, self.bias = dense, layer.bias
        self.bits, self.group, self.scale, self.exact = form.bits, form.group, layer.scale, False
        shape = (len(dense), dense.shape[1] // form.group)
        self.low, self.high = (nn.Parameter(dense.new_full(shape, START).float()) for _ in "lh")
        # Beside bfloat16 weights, steps of 5e-4 would be lost.
        self.a = nn.Parameter(layer.lora_A.detach().float().clone())
        self.b = nn.Parameter(layer.lora_B.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.exact:
            return F.linear(x, self.dense, self.bias)
        if not torch.is_grad_enabled():
            return self.imitate(x)
        # Or every linear of the block would keep a dozen floats a weight until backward.
        return checkpoint(self.imitate, x, use_reentrant=False, preserve_rng_state=False)

    def imitate(self, x: Tensor) -> Tensor:
        codes, zero, scale = clipped(self.dense, self.low, self.high, self.bits, self.group)
        rounded = ((codes - zero) * scale).flatten(1)
        y = F.linear(x, rounded.to(x.dtype), self.bias)
        return y + self.scale * F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))

    def packed(self, like: Packed) -> Packed:
        """The codes as they are now."""
        codes, zero, scale = clipped(self.dense, self.low, self.high, self.bits, self.group)
        buffers = {
            "codes": pack(codes.flatten(1).to(torch.uint8), self.bits),
            "scale": scale.squeeze(2).to(like.buffers["scale"].dtype),
            "zero": zero.squeeze(2).to(torch.uint8),
        }
        return Packed.from_buffers(like.form, like.stored_shape, like.dtype, buffers)


def clipped(
    w: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int,
    group: int,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round each group of w (m, n) over a learned part of its range, fp32.

    low and high (m, n / group) -> codes (m, n / group, group), zeros and scales
    (m, n / group, 1): whole numbers that fit `bits` bits, and numbers that `scale_dtype` holds.
    Gradients pass through every rounding.
    """
    top = 2**bits - 1
    groups = w.float().unflatten(1, (-1, group))
    above = torch.sigmoid(high)[..., None] * groups.amax(2, keepdim=True).clamp(min=0)
    below = torch.sigmoid(low)[..., None] * groups.amin(2, keepdim=True).clamp(max=0)
    scale = (above - below) / top
    # Half a unit in fp16's last place more, so that it rounds up and nothing more is clipped.
    scale = _through(scale, lambda s: (s * (1 + 2**-11)).to(scale_dtype).float())
    scale = torch.where(scale > 0, scale, 1.0)
    zero = _through(-below / scale, torch.round).clamp(0, top)
    codes = _through(groups / scale, torch.round) + zero
    return codes.clamp(0, top), zero, scale


def _through(x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    return x + (f(x) - x).detach()


class BlockFit:
    """Fits the linears of one block; `given` and `coded` are its inputs in the two streams."""

    def __init__(self, block: nn.Module, calls: list[Call], fitted: dict[str, Fitted], epochs: int):
        self.block, self.calls, self.fitted, self.epochs = block, calls, fitted, epochs

    def run(self, hidden: list[Tensor], *, exact: bool) -> list[Tensor]:
        self.exact(exact)
        return [call(self.block, h) for call, h in zip(self.calls, hidden, strict=True)]

    def exact(self, exact: bool) -> None:
        for part in self.fitted.values():
            part.exact = exact

    def whole(self, given: list[Tensor], coded: list[Tensor], aug_loss: bool) -> list[Tensor]:
        after = self.run(given, exact=True)
        targets = [after, *([self.run(coded, exact=True)] if aug_loss else [])]
        self.exact(False)
        self.descend(
            list(self.fitted.values()), lambda k: self.calls[k](self.block, coded[k]), targets
        )
        return after

    def linears(self, given: list[Tensor], coded: list[Tensor], aug_loss: bool) -> list[Tensor]:
        order: list[Fitted] = []
        names = hook(self.fitted.values(), lambda part, inputs, output: order.append(part))
        with names:
            after = self.run(given, exact=True)
        for part in dict.fromkeys(order):
            _, wanted = self.through(part, given, exact=True)
            inputs, _ = self.through(part, coded, exact=False)
            part.exact = True
            targets = [wanted, *([[part(x) for x in inputs]] if aug_loss else [])]
            part.exact = False
            self.descend([part], lambda k, p=part, x=inputs: p(x[k]), targets)
        return after

    def through(
        self, part: Fitted, hidden: list[Tensor], *, exact: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What one linear gets and gives while the block runs."""
        seen: list[tuple[Tensor, Tensor]] = []
        with hook([part], lambda _, inputs, output: seen.append((inputs[0], output))):
            self.run(hidden, exact=exact)
        return [x for x, _ in seen], [y for _, y in seen]

    @torch.enable_grad()
    def descend(
        self, parts: list[Fitted], output: Callable[[int], Tensor], targets: list[list[Tensor]]
    ) -> None:
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for part in parts for p in (part.low, part.high)], "lr": CLIP_LR},
                {"params": [p for part in parts for p in (part.a, part.b)], "lr": LORA_LR},
            ],
            weight_decay=DECAY,
            fused=True,
        )
        for k in list(range(len(targets[0]))) * self.epochs:
            got = output(k).float()
            losses = [F.mse_loss(got, target[k].float()) for target in targets]
            optimizer.zero_grad()
            sum(losses[1:], losses[0]).backward()
            optimizer.step()
