"""Combiner (069): every token attends to all others, to far ones through summaries of regions.

Keeps    while decoding: keys and values of the running segment, one key and one value per finished
         segment, and what the running segment's queries were pooled to.
Form     in the dtype of the inputs; softmax sums fp32.
Bytes    decode state of a layer: b*B*H*((w+f)*(d+dv) + d), with w tokens in the running segment and
         f finished ones; the last d only while w > 0. A sequence has B*Hq*n*(s + n/s) logits for
         "fixed", n*(2*s + n/s) for "axial" and n*(s + log2(n/s)) for "log"; none is kept, only each
         part's log-sum-exp.
Source   Ren, Dai, Dai, Yang, Leskovec, Schuurmans, Dai, "Combiner: Full Attention Transformer with
         Sparse Computation Cost", NeurIPS 2021; the authors' code was read.
Departs  the parts of the one softmax are merged by their log-sum-exps. Query heads that share a key
         head share its summaries, so that these take no more than keys do. Regions of "log" double
         from a whole segment (segment=1 is the paper's); regions of "axial" share no token. The
         authors' pooling through a trained layer is left out. Keys are pooled as attention gets
         them, with rotary positions after rotation.
"""

import math
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import bidirectional_mask_function

from holdfast.context.interface import Visible, register
from holdfast.context.kernels import attention_with_lse, merge_lse
from holdfast.context.masks import Causal, MaskMod
from holdfast.errors import UsageError, unknown

NAME = "combiner"
Variant = Literal["fixed", "axial", "log"]
Pool = Literal["max", "mean", "sum"]
Part = tuple[Tensor, Tensor]


def combiner_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment: int | None = None,
    variant: Variant = "fixed",
    causal: bool = True,
    pool: Pool = "max",
    valid: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Attention to near tokens and to summaries of regions, which cover every other token once.

    Args:
        q: (B,Hq,n,d).
        k: (B,H,n,d) with Hq a multiple of H.
        v: (B,H,n,dv).
        segment: tokens per segment, s; None is the square root of n, rounded up.
        variant: "fixed": own segment, and a summary of each other one. "axial": own segment and
            the same place in other segments, and a summary of each other place. "log": own
            segment, and summaries of regions whose sizes double with their distance.
        causal: token i sees tokens up to i.
        pool: what makes one query and one key out of a region's. "max" is the paper's; with rotary
            positions, which turn keys before they are pooled, "mean" loses less.
        valid: (B,n) bool, False for padding, which no other token sees.
        scale: of the scores; d ** -0.5 by default.
        dropout: share of the weights, of tokens and of summaries, that are dropped.
        seed: of the dropout.

    Returns:
        (B,Hq,n,dv) in q's dtype.

    Raises:
        UsageError: a segment below 1, unknown names, or shapes that do not go together.
    """
    _check(q, k, v, segment, variant, pool, valid)
    n = q.shape[2]
    s = min(n, segment or math.isqrt(n - 1) + 1)
    order = None
    if valid is not None:
        # Segments are counted from a row's first token, wherever its padding lies.
        order = valid.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        q, k, v = (_take(x, order) for x in (q, k, v))
    # A causal token sees complete regions alone; otherwise the largest region must be whole.
    unit = s << max(_levels(n, s) - 1, 0) if variant == "log" and not causal else s
    seen = None
    if not causal and (valid is not None or n % unit):
        count = torch.full((len(q), 1), n, device=q.device) if valid is None else valid.sum(1, True)
        seen = torch.arange(n + -n % unit, device=q.device) < count
    q, k, v = (F.pad(x, (0, 0, 0, -n % unit)) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    how = How(s, causal, pool, scale, dropout, seed, seen)
    parts = [attend_near(q, k, v, how)]
    if q.shape[2] > s:
        parts += _PARTS[variant](q, k, v, how)
    out = merge_lse(parts)[0][:, :, :n]
    return out if order is None else _take(out, order.argsort(1))


@dataclass(frozen=True)
class How:
    """What the parts of a call share; `seen` (B,n) bool tells tokens from padding, None for all."""

    segment: int
    causal: bool
    pool: str
    scale: float
    dropout: float = 0.0
    seed: int = 0
    seen: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, part: int = 0) -> Part:
        """One part of the softmax; parts drop different weights."""
        return attention_with_lse(
            q, k, v, mask=mask, scale=self.scale, dropout=self.dropout, seed=self.seed + part
        )

    def rows(self) -> Tensor | None:
        """`seen` by segment: (B*f,s)."""
        return None if self.seen is None else self.seen.reshape(-1, self.segment)


def attend_near(q: Tensor, k: Tensor, v: Tensor, how: How) -> Part:
    """Attention within segments: out (B,Hq,n,dv) and log-sum-exp (B,Hq,n)."""
    mask = Causal() if how.causal else _shown(how.rows())
    return _unfold(how.attend(*(_fold(x, how.segment) for x in (q, k, v)), mask), len(q))


def _fixed(q: Tensor, k: Tensor, v: Tensor, how: How) -> list[Part]:
    return [attend_far(q, *summaries(q, k, v, how), how)]


def attend_far(q: Tensor, keys: Tensor, values: Tensor, how: How, past: int = 0) -> Part:
    """Attention to summaries of segments, `past` of which lie before the first query's segment."""
    s, rows = how.segment, how.rows()
    if how.causal:
        return how.attend(q, keys, values, lambda b, h, i, j: j < past + i // s, 1)
    if rows is None:
        return how.attend(q, keys, values, lambda b, h, i, j: j != i // s, 1)
    alive = rows.any(1).view(len(q), -1)
    return how.attend(q, keys, values, lambda b, h, i, j: (j != i // s) & alive[b, j], 1)


def _axial(q: Tensor, k: Tensor, v: Tensor, how: How) -> list[Part]:
    s, b = how.segment, len(q)
    seen = None if how.seen is None else how.seen.view(b, -1, s).mT.flatten(0, 1)
    mask = Causal(-1) if how.causal else _others(seen)
    keys, values = (_columns(x, s) for x in (k, v))
    out, lse = how.attend(_columns(q, s), keys, values, mask, 1)
    column = _uncolumn(out, b), _uncolumn(lse[..., None], b)[..., 0]
    # For each row a summary of each column, without the row's own token.
    query = _pool_others(_columns(group_queries(q, k, how.pool), s), how, seen)
    value, lse = replace(how, dropout=0.0).attend(query, keys, values, mask)
    key = _pool_others(keys, how, seen)
    summary = (_fold(_uncolumn(x, b), s) for x in (key, value))
    alive = _fold(_uncolumn(lse[..., None], b), s)[:, 0, :, 0] > -math.inf
    return [column, _unfold(how.attend(_fold(q, s), *summary, _others(alive), 2), b)]


def _log(q: Tensor, k: Tensor, v: Tensor, how: How) -> list[Part]:
    b, s, n = len(q), how.segment, q.shape[2]
    segments = torch.arange(n // s, device=q.device)
    keys, values, masks = [], [], []
    for level in range(_levels(n, s)):
        # Regions come in pairs; a token sees the one of its pair in which it is not.
        size, own = s << level, segments >> level
        whole = n // size * size
        part = replace(how, segment=size, seen=None if how.seen is None else how.seen[:, :whole])
        key, value = summaries(*(x[:, :, :whole] for x in (q, k, v)), part)
        other = (own ^ 1).clamp(max=whole // size - 1)
        keys.append(key[:, :, other])
        values.append(value[:, :, other])
        shown = own % 2 == 1 if how.causal else torch.ones_like(own, dtype=torch.bool)
        rows = part.rows()
        shown = shown.expand(b, -1)
        masks.append(shown if rows is None else shown & rows.any(1).view(b, -1)[:, other])
    folded = (torch.stack(x, 3).transpose(1, 2).flatten(0, 1) for x in (keys, values))
    mask = torch.stack(masks, 2).flatten(0, 1)[:, None, None]
    return [_unfold(how.attend(_fold(q, s), *folded, mask, 1), b)]


_PARTS = {"fixed": _fixed, "axial": _axial, "log": _log}


def summaries(q: Tensor, k: Tensor, v: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """Key (B,H,f,d) and value (B,H,f,dv) of each segment; values are what its queries expect."""
    s, rows = how.segment, how.rows()
    grouped, keys, values = (_fold(x, s) for x in (group_queries(q, k, how.pool), k, v))
    query, key = (pool_tokens(x, how.pool, rows) for x in (grouped, keys))
    value, _ = attention_with_lse(query, keys, values, mask=_shown(rows), scale=how.scale)
    return tuple(x[:, :, 0].unflatten(0, (len(q), -1)).transpose(1, 2) for x in (key, value))


def _levels(n: int, s: int) -> int:
    return (math.ceil(n / s) - 1).bit_length()


def _fold(x: Tensor, s: int) -> Tensor:
    """(B,H,n,d) -> (B*f,H,s,d); a view where heads of one token lie side by side."""
    return x.unflatten(2, (-1, s)).transpose(1, 2).flatten(0, 1)


def _unfold(part: Part, b: int) -> Part:
    out, lse = (x.unflatten(0, (b, -1)).transpose(1, 2).flatten(2, 3) for x in part)
    return out, lse


def _columns(x: Tensor, s: int) -> Tensor:
    """(B,H,n,d) -> (B*s,H,f,d): one place of all segments."""
    return x.unflatten(2, (-1, s)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def _uncolumn(x: Tensor, b: int) -> Tensor:
    return x.unflatten(0, (b, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def group_queries(q: Tensor, k: Tensor, pool: str) -> Tensor:
    """One query (B,H,n,d) for the heads of q that share a key head."""
    return pool_tokens(q.unflatten(1, (k.shape[1], -1)).transpose(2, 3), pool)[:, :, :, 0]


def pool_tokens(x: Tensor, pool: str, rows: Tensor | None = None) -> Tensor:
    """(...,s,d) -> (...,1,d); x (B*f,H,s,d) where `rows` (B*f,s) tells what counts."""
    if rows is None:
        return {"max": torch.amax, "mean": torch.mean, "sum": torch.sum}[pool](x, -2, keepdim=True)
    hidden = ~rows[:, None, :, None]
    if pool == "max":
        most = x.masked_fill(hidden, -math.inf).amax(-2, keepdim=True)
        return most.masked_fill(most == -math.inf, 0)
    total = x.masked_fill(hidden, 0).sum(-2, keepdim=True)
    return total / (~hidden).sum(-2, keepdim=True).clamp(min=1) if pool == "mean" else total


def _pool_others(x: Tensor, how: How, seen: Tensor | None) -> Tensor:
    """(B*s,H,f,d): for each place along f what the places before it, or all others, pool to."""
    most = how.pool == "max"
    nothing = -math.inf if most else 0.0
    count = torch.ones_like(x[:, :1, :, :1])
    if seen is not None:
        x, count = (y.masked_fill(~seen[:, None, :, None], nothing) for y in (x, count))

    def before(x: Tensor) -> Tensor:
        so_far = x.cummax(2).values if most else x.cumsum(2)
        return F.pad(so_far, (0, 0, 1, -1), value=nothing)

    def others(x: Tensor) -> Tensor:
        if how.causal:
            return before(x)
        after = before(x.flip(2)).flip(2)
        return torch.maximum(before(x), after) if most else before(x) + after

    pooled = others(x)
    if how.pool == "mean":
        return pooled / others(count).clamp(min=1)
    return pooled.masked_fill(pooled == nothing, 0) if most else pooled


def _shown(rows: Tensor | None) -> MaskMod | None:
    return None if rows is None else lambda b, h, i, j: rows[b, j]


def _others(seen: Tensor | None) -> MaskMod:
    if seen is None:
        return lambda b, h, i, j: i != j
    return lambda b, h, i, j: (i != j) & seen[b, j]


def _take(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def regions(
    i: int, n: int, segment: int, variant: Variant, causal: bool
) -> tuple[list[int], list[list[int]]]:
    """The tokens that token i of n sees directly, and the regions that it sees as summaries."""
    s = segment

    def past(own: int, other: int) -> bool:
        return other < own if causal else other != own

    direct = [j for j in range(n) if j // s == i // s and (j <= i or not causal)]
    found = []
    if variant == "fixed":
        found = [[j for j in range(n) if j // s == g] for g in range(n) if past(i // s, g)]
    elif variant == "axial":
        above = [[j for j in range(n) if j % s == c and past(i // s, j // s)] for c in range(s)]
        direct += above.pop(i % s)
        found = above
    else:
        for level in range(_levels(n, s)):
            own = i // s >> level
            found.append([j for j in range(n) if j // s >> level == own ^ 1 and past(own, own ^ 1)])
    return direct, [region for region in found if region]


def combiner_weights_ref(
    q: Tensor,
    k: Tensor,
    *,
    segment: int,
    variant: Variant = "fixed",
    causal: bool = True,
    pool: Pool = "max",
    scale: float | None = None,
) -> Tensor:
    """(B,Hq,n,n): the weight of every token for every query, that of summaries spread out.

    `combiner_attention` is the product of this with v.
    """
    n, groups = q.shape[2], q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped, wide = group_queries(q, k, pool), k.repeat_interleave(groups, 1)
    weights = q.new_zeros(*q.shape[:3], n)
    for i in range(n):
        direct, found = regions(i, n, segment, variant, causal)
        keys = [wide[:, :, direct], *(pool_tokens(wide[:, :, region], pool) for region in found)]
        p = (q[:, :, i : i + 1] @ torch.cat(keys, 2).mT * scale).softmax(-1)[:, :, 0]
        weights[:, :, i, direct] = p[..., : len(direct)]
        for place, region in enumerate(found, len(direct)):
            query = pool_tokens(grouped[:, :, region], pool)
            inside = (query @ k[:, :, region].mT * scale).softmax(-1)[:, :, 0]
            weights[:, :, i, region] = p[..., place, None] * inside.repeat_interleave(groups, 1)
    return weights


# A state whose `update` a layer has just called, and the keys that it got: queries come here.
waiting: ContextVar[tuple[Any, Tensor] | None] = ContextVar("waiting", default=None)


def attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Visible, *,
    scaling: float, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Hugging Face attention "combiner"; `model.config.combiner` may hold segment, variant, pool.

    Returns:
        (B,n,Hq,dv), and None.
    """
    state = waiting.get()
    waiting.set(None)
    if state is not None and state[1] is k:
        if visible.valid is not None or visible.given is not None:
            raise UsageError(
                "a CombinerCache counts segments alike in all rows, and this batch has padding or "
                "a mask of its own; batch rows of one length, or generate with use_cache=False"
            )
        return state[0].attend(q, k, v, scaling).transpose(1, 2), None
    if k.shape[2] != q.shape[2]:
        raise UsageError(
            f"{q.shape[2]} queries and {k.shape[2]} keys: summaries need the queries of all tokens;"
            " pass past_key_values=CombinerCache(model.config), or use_cache=False"
        )
    if not visible.causal and (visible.given is not None or not _bidirectional(visible)):
        raise UsageError(
            f"{type(module).__name__} hides keys by a window or a mask of its own; {NAME!r} is for "
            "causal attention and for attention to all tokens"
        )
    seed = int(torch.randint(2**48, ())) if dropout else 0
    options = getattr(getattr(module, "config", None), NAME, None) or {}
    out = combiner_attention(
        q, k, v, causal=visible.causal, valid=visible.valid, scale=scaling, dropout=dropout,
        seed=seed, **options,
    )  # fmt: skip
    return out.transpose(1, 2), None


def _bidirectional(visible: Visible) -> bool:
    return visible.sees is bidirectional_mask_function


register(NAME, attend)


def _check(
    q: Tensor, k: Tensor, v: Tensor, segment: int | None, variant: str, pool: str,
    valid: Tensor | None,
) -> None:  # fmt: skip
    if segment is not None and segment < 1:
        raise UsageError(f"segment={segment} holds no token; use 1 or more, or None for sqrt(n)")
    for what, given, known in (("variant", variant, Variant), ("pool", pool, Pool)):
        if given not in get_args(known):
            raise unknown(what, given, get_args(known))
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or not q.shape[2] == k.shape[2] == v.shape[2] > 0:
        raise UsageError(f"{shapes}: expected (B,Hq,n,d), (B,H,n,d) and (B,H,n,dv) with n >= 1")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (len(q), q.shape[2])):
        raise UsageError(
            f"valid is {valid.dtype} {tuple(valid.shape)}; expected bool {(len(q), q.shape[2])}"
        )
