"""Attention over gathered panels: each block of queries against the blocks of keys that it sees.

Keeps    q, k, v, the output and one log-sum-exp per query for backward; no score, no gathered key.
Form     inputs and output in their dtype; log-sum-exp and sums of gradients fp32 (fp64 for fp64).
Bytes    saved: b*(2*B*Hq*n*d + 2*B*H*n*d) + 4*B*Hq*n for dv = d, and B*n where keys are padding.
         Above that, while it runs: panels of at most n keys and values per query head,
         b*2*B*Hq*n*d; in backward their gradients too.
Source   the panels are of Zaheer, Guruganesh, Dubey, Ainslie, Alberti, Ontanon, Pham, Ravula,
         Wang, Yang, Ahmed, "Big Bird: Transformers for Longer Sequences", NeurIPS 2020.
Departs  panels are gathered in chunks and again in backward, and scores live in the kernels of
         `holdfast.context.kernels` alone, so that nothing of the panels' size is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.context import kernels
from holdfast.context.kernels import Spec
from holdfast.context.masks import Dropout
from holdfast.context.patterns import Panel
from holdfast.errors import UsageError


def panel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    panels: Sequence[Panel],
    block: int,
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v over the keys that `panels` list, and its log-sum-exp.

    Args:
        q: (B,Hq,n,d).
        k, v: (B,H,n,d) and (B,H,n,dv) with Hq a multiple of H.
        panels: blocks of keys for each of the ceil(n / block) blocks of queries, each row once.
        block: tokens in a block; a last block that is not full is padded and masked.
        valid: (B,n) bool, False for keys that nobody sees.
        scale: of the scores; d ** -0.5 by default.
        dropout: share of probabilities that are dropped after the softmax.
        seed: of the dropout.

    Returns:
        out (B,Hq,n,dv) in q's dtype and lse (B,Hq,n) fp32, fp64 for fp64. A query that sees no
        key has out 0 and lse -inf.

    Raises:
        UsageError: queries and keys of different lengths.
    """
    n = q.shape[2]
    if k.shape[2] != n:
        raise UsageError(
            f"{n} queries and {k.shape[2]} keys: blocks are of one sequence that attends to itself"
        )
    pad = -n % block
    if pad:
        valid = q.new_ones(len(q), n, dtype=torch.bool) if valid is None else valid
        valid = F.pad(valid, (0, pad))
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    drop = Dropout(dropout, seed) if dropout else None
    call = _Call(tuple(panels), block, valid, scale, drop)
    out, lse = _Panels.apply(q, k, v, call)
    return (out[:, :, :n], lse[:, :, :n]) if pad else (out, lse)


@dataclass(frozen=True, eq=False)
class _Call:
    panels: tuple[Panel, ...]
    block: int
    valid: Tensor | None
    scale: float
    dropout: Dropout | None

    def parts(self, q: Tensor, k: Tensor) -> Iterator["_Part"]:
        """Panels in pieces of which the keys are at most as many as there are at all."""
        blocks, heads = q.shape[2] // self.block, q.shape[1]
        head = torch.arange(heads, device=q.device)[:, None] // (heads // k.shape[1])
        for index, (rows, keys, hidden) in enumerate(self.panels):
            size = len(rows) if keys is None else max(1, blocks // keys.shape[2])
            for start in range(0, len(rows), size):
                some = torch.tensor(rows[start : start + size], device=q.device)
                at, width = None, 512
                if keys is not None:
                    lists = np.ascontiguousarray(keys[:, start : start + size].swapaxes(0, 1))
                    at = torch.tensor(lists, device=q.device).long()
                    width = at.shape[2] * self.block
                drop = self.dropout
                if drop is not None:
                    drop = Dropout(drop.rate, drop.seed + (index << 32) + start)
                bias = self._bias(at, hidden, q)
                spec = Spec(None, bias, self.scale, max(512, self.block), max(512, width), drop)
                yield _Part(some, at, head, spec, self.block)

    def _bias(self, at: Tensor | None, hidden: Any, q: Tensor) -> Tensor | None:
        """What is added to the scores of a piece, (B*R|1,Hq|1,block|1,c*block).

        Not a mask: kernels look at the values of masks, which a fake tensor has not.
        """
        seen = None
        if hidden is not None:
            seen = ~torch.tensor(hidden, device=q.device)[None, None]
        if self.valid is not None:
            if at is None:
                seen = self.valid[:, None, None]
            else:
                valid = self.valid.unflatten(1, (-1, self.block))[:, at]  # (B,R,Hq|1,c,block)
                valid = valid.flatten(3).flatten(0, 1)[:, :, None]
                seen = valid if seen is None else valid & seen
        if seen is None:
            return None
        return q.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)


@dataclass(frozen=True, eq=False)
class _Part:
    """Some blocks of queries (R,) and the blocks of keys (R,Hq|1,c) that each sees, or all."""

    rows: Tensor
    keys: Tensor | None
    head: Tensor  # (Hq,1), the key head of each query head
    spec: Spec
    block: int

    def queries(self, x: Tensor) -> Tensor:
        """(B,Hq,n,e) -> (B*R,Hq,block,e); (B,Hq,R*block,e) where all keys are seen."""
        if self.keys is None:
            return x.unflatten(2, (-1, self.block))[:, :, self.rows].flatten(2, 3)
        return self._by_row(x)[:, self.rows].flatten(0, 1)

    def put(self, x: Tensor, part: Tensor) -> None:
        """Write what belongs to these queries into (B,Hq,n,e)."""
        part = part.to(x.dtype)
        if self.keys is None:
            part = part.unflatten(2, (-1, self.block))
            x.unflatten(2, (-1, self.block))[:, :, self.rows] = part
        else:
            self._by_row(x)[:, self.rows] = part.unflatten(0, (len(x), -1))

    def _by_row(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.block)).transpose(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """(B,H,n,e) -> (B*R,Hq,c*block,e)."""
        if self.keys is None:
            return x
        taken = x.unflatten(2, (-1, self.block))[:, self.head, self.keys]
        return taken.flatten(3, 4).flatten(0, 1)

    def scatter(self, total: Tensor, part: Tensor) -> None:
        """Add the gradient of what `gather` took to a contiguous (B,H,n,e)."""
        if self.keys is None:
            total += part
            return
        at = self.head * (total.shape[2] // self.block) + self.keys
        flat = total.view(len(total), -1, self.block * total.shape[3])
        flat.index_add_(1, at.flatten(), part.reshape(len(total), at.numel(), -1).to(total.dtype))


class _Panels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call):
        b, heads, n, _ = q.shape
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        # Laid out as models want it: the heads of one token side by side.
        out = q.new_empty(b, n, heads, v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(b, heads, n, dtype=wide)
        for part in call.parts(q, k):
            found = kernels.forward(part.queries(q), part.gather(k), part.gather(v), part.spec)
            part.put(out, found[0])
            part.put(lse, found[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None):
        q, k, v, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v))
        for part in ctx.call.parts(q, k):
            of_q, of_k, of_v = kernels.backward(
                part.queries(dout), part.queries(q), part.gather(k), part.gather(v),
                part.queries(out), part.queries(lse[..., None])[..., 0], part.spec,
                dlse=None if dlse is None else part.queries(dlse[..., None])[..., 0],
            )  # fmt: skip
            part.put(dq, of_q)
            part.scatter(dk, of_k)
            part.scatter(dv, of_v)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None
