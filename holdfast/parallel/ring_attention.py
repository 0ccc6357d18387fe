"""Attention over a sequence of which each rank holds a part, by a ring of keys and values.

Two forms: "rsa" keeps each query's probabilities over the whole sequence, "online" merges blocks by
their log-sum-exps and keeps none. Both send the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from holdfast.context import kernels
from holdfast.context.masks import Causal, Dropout, MaskMod, blocks
from holdfast.errors import unknown
from holdfast.parallel.ring import Traffic, ring, ring_sum

ATTENTION = ("rsa", "online")


def saved_nbytes(
    attention: str, ranks: int, *, batch: int, length: int, heads: int, key_heads: int, size: int,
    itemsize: int = 4,
) -> int:  # fmt: skip
    """Bytes that one attention saves for backward on each rank; `length` a multiple of `ranks`."""
    if attention not in ATTENTION:
        raise unknown("attention", attention, ATTENTION)
    n = length // ranks
    queries, keys = batch * heads * n * size, batch * key_heads * n * size
    if attention == "rsa":
        return itemsize * (queries + 2 * keys + batch * heads * n * length)
    return itemsize * 2 * (queries + keys) + max(itemsize, 4) * batch * heads * n


def ring_nbytes(
    ranks: int, *, batch: int, length: int, key_heads: int, size: int, itemsize: int = 4
) -> tuple[int, int]:
    """Bytes that each rank sends in one attention, forward and backward."""
    elements = 2 * (ranks - 1) * batch * key_heads * (length // ranks) * size
    return itemsize * elements, (itemsize + max(itemsize, 4)) * elements


class Layout(NamedTuple):
    """Who holds which of `length` tokens; `length` is a multiple of `ranks`, in zig-zag twice."""

    length: int
    ranks: int
    zigzag: bool

    def runs(self, rank: int) -> list[tuple[slice, int]]:
        """Consecutive tokens of a rank: (where it has them, position of the first)."""
        if not self.zigzag:
            n = self.length // self.ranks
            return [(slice(0, n), rank * n)]
        # An early chunk sees few keys under a causal mask, its partner at the other end many.
        n = self.length // (2 * self.ranks)
        last = 2 * self.ranks - 1 - rank
        return [(slice(0, n), rank * n), (slice(n, 2 * n), last * n)]

    def split(self, x: Tensor, rank: int) -> Tensor:
        """A rank's part of x (B,length,...)."""
        runs = self.runs(rank)
        return torch.cat([x[:, start : start + at.stop - at.start] for at, start in runs], 1)

    def join(self, parts: list[Tensor]) -> Tensor:
        """The parts of all ranks, in order, as one (B,length,...)."""
        runs = [
            (start, part[:, at]) for rank, part in enumerate(parts) for at, start in self.runs(rank)
        ]
        return torch.cat([x for _, x in sorted(runs, key=lambda run: run[0])], 1)


@dataclass(frozen=True, eq=False)
class Pattern:
    """What attention must know of a batch beside q, k and v; models hand it on as their mask.

    Args:
        attention: "rsa" or "online".
        valid: (B,length) bool, None where no token is padding.
        seed: of attention's dropout, equal on all ranks.
        sees: the model's mask as a function of positions in the sequence.
    """

    layout: Layout
    rank: int
    group: dist.ProcessGroup | None
    traffic: Traffic
    attention: str
    valid: Tensor | None
    seed: int
    sees: Callable = causal_mask_function

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise unknown("attention", self.attention, ATTENTION)

    def pairs(
        self, owner: int, scale: float, rate: float, layer: int
    ) -> Iterator[tuple[slice, slice, kernels.Spec]]:
        """Our queries and another rank's keys that see each other: (rows, columns, how)."""
        for rows, row in self.layout.runs(self.rank):
            for cols, col in self.layout.runs(owner):
                n = rows.stop - rows.start
                mask = self._mask(row, col, n)
                if mask is not False:
                    drop = Dropout(rate, self.seed + 1000003 * layer, row, col) if rate else None
                    yield rows, cols, kernels.Spec(mask=mask, scale=scale, dropout=drop)

    def _mask(self, row: int, col: int, n: int) -> MaskMod | Literal[False] | None:
        """The mask of n queries from `row` on and n keys from `col` on; False hides all."""
        sees, valid = self.sees, self.valid
        found: MaskMod | None = None
        if sees is causal_mask_function:
            if row < col:
                return False
            found = Causal() if row == col else None
        elif sees is not bidirectional_mask_function:
            found = lambda b, h, i, j: sees(b, h, i + row, j + col)  # noqa: E731
        if valid is None or bool(valid[:, col : col + n].all()):
            return found
        if found is None:
            return lambda b, h, i, j: valid[b, j + col]
        return lambda b, h, i, j: valid[b, j + col] & found(b, h, i, j)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    layer: int = 0,
) -> Tensor:
    """This rank's rows of softmax(scale * q k^T) v over the whole sequence; all ranks call it.

    Args:
        q: (B,Z,n,A), of this rank's tokens.
        k, v: (B,H,n,A), Z a multiple of H.
        dropout: share of probabilities that are dropped, the same ones whatever the ranks.
        layer: so that layers drop different ones.

    Returns:
        (B,Z,n,A) in q's dtype; can be differentiated once.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    function = _Rsa if pattern.attention == "rsa" else _Online
    return function.apply(q, k, v, pattern, (scale, dropout, layer))


class _Online(torch.autograd.Function):
    """Blocks of keys and values go round; outputs are merged by their log-sum-exps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, how: tuple):
        out, lse = kernels.empty_sums(q, v)
        for owner, (keys, values) in ring((k, v), pattern.group, traffic=pattern.traffic):
            for rows, cols, spec in pattern.pairs(owner, *how):
                part = kernels.forward(q[:, :, rows], keys[:, :, cols], values[:, :, cols], spec)
                kernels.merge_(out[:, :, rows], lse[:, :, rows], *part)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pattern, ctx.how = pattern, how
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        pattern, how = ctx.pattern, ctx.how
        dq = torch.zeros_like(q, dtype=lse.dtype)

        def parts() -> Iterator[list[Tensor]]:
            own: list[Tensor] = []
            for owner, block in ring((k, v), pattern.group, traffic=pattern.traffic):
                sums = [torch.zeros_like(x, dtype=lse.dtype) for x in block]
                for rows, cols, spec in pattern.pairs(owner, *how):
                    keys, values = (x[:, :, cols] for x in block)
                    grads = kernels.backward(
                        dout[:, :, rows], q[:, :, rows], keys, values,
                        out[:, :, rows], lse[:, :, rows], spec,
                    )  # fmt: skip
                    dq[:, :, rows] += grads[0]
                    for total, grad in zip(sums, grads[1:], strict=True):
                        total[:, :, cols] += grad
                if owner == pattern.rank:
                    own = sums
                else:
                    yield sums
            yield own

        dk, dv = ring_sum(parts(), pattern.group, traffic=pattern.traffic)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


class _Rsa(torch.autograd.Function):
    """All keys go round, then all values; the probabilities in between are whole rows."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, how: tuple):
        b, h, n, _ = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        p = q.new_full((b, h, n, pattern.layout.length), -torch.inf, dtype=wide)
        for owner, (keys,) in ring((k,), pattern.group, traffic=pattern.traffic):
            mine = p[..., _cols(owner, n)]
            for rows, cols, spec in pattern.pairs(owner, *how):
                queries, some = q[:, :, rows], keys[:, :, cols]
                here = mine[:, :, rows, cols]
                for block in blocks(spec.mask, queries, some, (n, n), whole=False):
                    here.copy_(kernels.scores_of(queries, some, spec, block))
        top = p.amax(-1, keepdim=True)
        p.sub_(top.masked_fill_(top == -torch.inf, 0)).exp_()
        total = p.sum(-1, keepdim=True)
        p = p.div_(total.masked_fill_(total == 0, 1)).to(q.dtype)
        out = q.new_zeros(b, n, h, v.shape[-1], dtype=wide).transpose(1, 2)
        for owner, (values,) in ring((v,), pattern.group, traffic=pattern.traffic):
            used = _used(p, owner, pattern, how).to(wide)
            out += (kernels.per_key_head(used, k) @ values.to(wide)).view(out.shape)
        ctx.save_for_backward(q, k, v, p)
        ctx.pattern, ctx.how = pattern, how
        return out.to(q.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor):
        q, k, v, p = ctx.saved_tensors
        pattern, how = ctx.pattern, ctx.how
        scale, n = how[0], q.shape[2]
        wide = torch.promote_types(q.dtype, torch.float32)
        do, queries = (kernels.per_key_head(x.to(wide), k) for x in (dout, q))
        ds = torch.empty_like(p, dtype=wide)
        # The sum over all keys of P * dP, which is also rowsum(dout * out).
        delta = ds.new_zeros(*p.shape[:3], 1)
        for owner, (values,) in ring((v,), pattern.group, traffic=pattern.traffic):
            mine = ds[..., _cols(owner, n)]
            mine.copy_((do @ values.to(wide).mT).view(mine.shape))
            _drop_(mine, owner, pattern, how)
            delta += (mine * p[..., _cols(owner, n)]).sum(-1, keepdim=True)
        ds.sub_(delta).mul_(p)
        dq = torch.zeros_like(q, dtype=wide)
        for owner, (keys,) in ring((k,), pattern.group, traffic=pattern.traffic):
            mine = kernels.per_key_head(ds[..., _cols(owner, n)], k)
            dq += (mine @ keys.to(wide)).view(q.shape)

        def parts() -> Iterator[list[Tensor]]:
            ranks = pattern.layout.ranks
            for hop in range(ranks):
                owner = (pattern.rank - 1 - hop) % ranks
                mine = kernels.per_key_head(ds[..., _cols(owner, n)], k)
                used = kernels.per_key_head(_used(p, owner, pattern, how).to(wide), k)
                yield [(mine.mT @ queries).mul_(scale), used.mT @ do]

        dk, dv = ring_sum(parts(), pattern.group, traffic=pattern.traffic)
        return dq.mul_(scale).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _cols(owner: int, n: int) -> slice:
    """Where an owner's keys are in rows of probabilities: in the order of ranks, not of tokens."""
    return slice(owner * n, (owner + 1) * n)


def _used(p: Tensor, owner: int, pattern: Pattern, how: tuple) -> Tensor:
    """The probabilities of an owner's keys after dropout."""
    n = p.shape[2]
    mine = p[..., _cols(owner, n)]
    return _drop_(mine.clone(), owner, pattern, how) if how[1] else mine


def _drop_(x: Tensor, owner: int, pattern: Pattern, how: tuple) -> Tensor:
    for rows, cols, spec in pattern.pairs(owner, *how) if how[1] else ():
        part = x[:, :, rows, cols]
        part *= cast(Dropout, spec.dropout).factor(part.shape, (0, 0), part)
    return x
