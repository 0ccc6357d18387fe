"""ProbSparse attention (of 092): decided queries attend to all keys, the others read the mean.

Keeps    attention of u = factor*ceil(ln n) queries instead of n.
Form     in the dtype of the inputs; sums of scores and running means fp32.
Bytes    saved for backward, beside q, k and v: b*B*Hq*u*(d+dv) + 4*B*Hq*u of log-sum-exp +
         8*B*Hq*u of indices. While queries are chosen: 4*n*U of draws, 4*B*Hq*n of sparsity and,
         for 128 queries at a time, 128*U*(B*H*(b*d + 8) + b*B*Hq), with U = factor*ceil(ln m); k
         once more where its heads do not lie one after the other. Running means: 8*B*H*m*dv.
Source   Zhou, Zhang, Peng, Zhang, Li, Xiong, Zhang, "Informer: Beyond Efficient Transformer for
         Long Sequence Time-Series Forecasting", AAAI 2021. No code was read.
Departs  a causal query samples among the keys that it sees, and one that does not attend reads the
         mean of the values so far (`lazy="sum"`: their sum, as in the authors' code). Keys of the
         sample are gathered for a few queries at a time, and scores of chosen queries are not held.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.masking_utils import bidirectional_mask_function

from holdfast.context.interface import Visible, register
from holdfast.context.kernels import attention_with_lse
from holdfast.context.masks import Causal, MaskMod
from holdfast.errors import UsageError

Norm = Literal["sample", "L_K"]
Lazy = Literal["mean", "sum"]
_ROWS = 128


def logarithmic(factor: int, n: int) -> int:
    """factor * ceil(ln n), at least 1 and at most n."""
    return min(n, max(1, factor * math.ceil(math.log(n))))


def probsparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    factor: int = 5,
    norm: Norm = "sample",
    causal: bool = False,
    lazy: Lazy = "mean",
    valid: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Attention of the `factor * ceil(ln n)` queries that a sample of keys finds most decided.

    Args:
        q: (B,Hq,n,d).
        k: (B,H,m,d) with Hq a multiple of H.
        v: (B,H,m,dv).
        factor: of the logarithms, for chosen queries and for sampled keys.
        norm: what a query's largest sampled score is compared with: the mean of the sample, or its
            sum divided by m, which the authors' code computes.
        causal: query i sees keys up to i; which queries attend still depends on all of them.
        lazy: what the other causal queries read, the mean or the sum of the values so far.
        valid: (B,m) bool, False for padding; queries at these places come last.
        scale: of the scores; d ** -0.5 by default.
        dropout: share of probabilities that are dropped.
        seed: of the sample and of the dropout.

    Returns:
        (B,Hq,n,dv) in q's dtype.

    Raises:
        UsageError: shapes or options that do not go together.
    """
    _check(q, k, v, factor, norm, causal, lazy, valid)
    options: dict[str, Any] = {"scale": scale, "dropout": dropout, "seed": seed}
    n = q.shape[2]
    u = logarithmic(factor, n)
    mask: MaskMod | None = None if valid is None else lambda b, h, i, j: valid[b, j]
    if u == n:
        mask = Causal() if causal else mask
        return attention_with_lse(q, k, v, mask=mask, **options)[0]
    chosen = _sparsity(q, k, factor, norm, causal, valid, seed).topk(u, sorted=False).indices
    if causal:
        mask = lambda b, h, i, j: j <= chosen[b, h, i]  # noqa: E731
    attended = attention_with_lse(_rows(q, chosen), k, v, mask=mask, **options)[0]
    idle = _idle(v, causal, lazy, valid).repeat_interleave(q.shape[1] // k.shape[1], 1)
    idle = idle.expand(-1, -1, n, -1)
    return idle.scatter(2, chosen[..., None].expand_as(attended), attended)


def probsparse_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    factor: int = 5,
    norm: Norm = "sample",
    causal: bool = False,
    lazy: Lazy = "mean",
    scale: float | None = None,
    seed: int = 0,
) -> Tensor:
    """`probsparse_attention` from all n*m scores, query by query."""
    n, m, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    draws = _draw(n, logarithmic(factor, m), seed, q.device)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores, values = q[b, h] @ k[b, h // groups].T, v[b, h // groups]
            measure = []
            for i in range(n):
                seen = i + 1 if causal else m
                sampled = scores[i, (draws[i] * seen).long()]
                mean = sampled.mean() if norm == "sample" else sampled.sum() / m
                measure.append(sampled.max() - mean)
            chosen = torch.stack(measure).topk(logarithmic(factor, n)).indices.tolist()
            for i in range(n):
                seen = i + 1 if causal else m
                if i in chosen:
                    p = (scores[i, :seen] * (scale or q.shape[-1] ** -0.5)).softmax(0)
                    out[b, h, i] = p @ values[:seen]
                else:
                    total = values[:seen].sum(0)
                    out[b, h, i] = total if causal and lazy == "sum" else total / seen
    return out


def _draw(n: int, sample: int, seed: int, device: torch.device) -> Tensor:
    """(n,U) fp32 in [0, 1): which of the keys that it sees each query samples."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(n, sample, generator=generator, device=device)


@torch.no_grad()
def _sparsity(
    q: Tensor, k: Tensor, factor: int, norm: Norm, causal: bool, valid: Tensor | None, seed: int
) -> Tensor:
    """(B,Hq,n) fp32: how far the largest sampled score of a query stands out."""
    (b, hq, n, d), (h, m) = q.shape, k.shape[1:3]
    draws = _draw(n, logarithmic(factor, m), seed, q.device)
    first = (torch.arange(b * h, device=q.device) * m).view(b, h, 1, 1)
    keys = k.reshape(-1, d)
    measure = torch.empty(b, h, n, hq // h, dtype=torch.float32, device=q.device)
    # Valid keys first, in order: a query's r-th valid key is order[r].
    order = None if valid is None else (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    count = torch.full((1, 1, 1), m, device=q.device) if valid is None else _count(valid)
    for start in range(0, n, _ROWS):
        rows = slice(start, min(start + _ROWS, n))
        if causal:
            count = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + 1
        places = (draws[rows] * count).long()
        places = torch.minimum(places, count - 1).expand(b, -1, -1)
        if order is not None:
            places = order.gather(1, places.flatten(1)).view_as(places)
        # In a call, so that one chunk's keys are gone before the next are gathered: those of all
        # queries would be (n,U,d), as much as the scores of 4096 queries.
        some = q.view(b, h, -1, n, d)[:, :, :, rows]
        measure[:, :, rows] = _stands_out(some, keys, first + places[:, None], norm, m)
    if valid is not None:
        measure.masked_fill_(~valid[:, None, :, None], -math.inf)
    return measure.transpose(2, 3).reshape(b, hq, n)


def _stands_out(q: Tensor, keys: Tensor, places: Tensor, norm: Norm, m: int) -> Tensor:
    """q (B,H,G,c,d), keys (B*H*m,d), places (B,H,c,U) -> (B,H,c,G)."""
    found = keys.index_select(0, places.flatten()).view(*places.shape, -1)
    scores = q.transpose(2, 3) @ found.mT
    return scores.amax(-1) - (scores.mean(-1) if norm == "sample" else scores.sum(-1) / m)


def _count(valid: Tensor) -> Tensor:
    return valid.sum(1).clamp_(min=1).view(-1, 1, 1)


def _idle(v: Tensor, causal: bool, lazy: Lazy, valid: Tensor | None) -> Tensor:
    """(B,H,1|m,dv): what a query that does not attend reads."""
    if not causal:
        if valid is None:
            return v.mean(2, keepdim=True)
        total = v.masked_fill(~valid[:, None, :, None], 0).sum(2, keepdim=True)
        return total / _count(valid)[..., None].to(v.dtype)
    total = v.cumsum(2, dtype=torch.float64 if v.dtype == torch.float64 else torch.float32)
    if lazy == "mean":
        total = total / torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
    return total.to(v.dtype)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


def _check(
    q: Tensor, k: Tensor, v: Tensor, factor: int, norm: str, causal: bool, lazy: str,
    valid: Tensor | None,
) -> None:  # fmt: skip
    shapes = [tuple(x.shape) for x in (q, k, v)]
    if not (
        q.dim() == k.dim() == v.dim() == 4
        and k.shape[:3] == v.shape[:3]
        and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
        and q.shape[1] % k.shape[1] == 0
    ):
        raise UsageError(
            f"q, k, v are {', '.join(map(str, shapes))}; expected (B,Hq,n,d), (B,H,m,d), (B,H,m,dv)"
            " with Hq a multiple of H"
        )
    n, m = q.shape[2], k.shape[2]
    if not n or not m:
        raise UsageError(f"{n} queries and {m} keys: there must be at least one of each")
    if factor < 1:
        raise UsageError(f"factor={factor} chooses no query; use 1 or more")
    if norm not in ("sample", "L_K") or lazy not in ("mean", "sum"):
        raise UsageError(
            f"norm={norm!r}, lazy={lazy!r}; norm is 'sample' or 'L_K', lazy is 'mean' or 'sum'"
        )
    if causal and (n != m or valid is not None):
        raise UsageError(
            f"causal attention of {n} queries to {m} keys"
            f"{'' if valid is None else ' with padding'}: it is for whole sequences without "
            "padding, with as many keys as queries"
        )
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (len(k), m) or n != m):
        raise UsageError(
            f"valid is {valid.dtype} {tuple(valid.shape)} for {n} queries and {m} keys; "
            f"expected bool {(len(k), m)} and as many queries as keys"
        )


def attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Visible, *,
    scaling: float, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Hugging Face attention "probsparse", for encoders."""
    if visible.given is not None or visible.sees is not bidirectional_mask_function:
        raise UsageError(
            f"{type(module).__name__} hides keys from queries by their position; which queries "
            "attend depends on the whole sequence, so 'probsparse' is for encoders alone"
        )
    out = probsparse_attention(
        q, k, v, valid=visible.valid, scale=scaling, dropout=dropout, seed=step_seed(module)
    )
    return out.transpose(1, 2), None


register("probsparse", attend)


def step_seed(module: nn.Module) -> int:
    """Another sample in each step of training, the same one in every evaluation."""
    return int(torch.randint(2**31, ())) if module.training else 0
