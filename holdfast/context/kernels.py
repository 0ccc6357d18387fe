"""Self-attention without O(n^2) memory (113): exact, with its log-sum-exp, forward and backward.

Keeps    q, k, v, the output and one log-sum-exp per query for backward; no score is kept.
Form     inputs and output in their dtype; log-sum-exp and sums over blocks fp32 (fp64 for fp64).
Bytes    saved: b*(2*B*Hq*n*d + 2*B*H*m*d) + 4*B*Hq*n. Above that, while it runs: on fused kernels
         what a chunk's mask takes, at most (b+1)*B*Hq*q_chunk*k_chunk, without a mask nothing of
         that order; on torch operations B*Hq*q_chunk*k_chunk*4 forward, twice that backward.
Source   Rabe, Staats, "Self-attention Does Not Need O(n^2) Memory", 2021; the backward pass with
         D = rowsum(dout * out) is of Dao, Fu, Ermon, Rudra, Re, "FlashAttention: Fast and
         Memory-Efficient Exact Attention with IO-Awareness", NeurIPS 2022. No code was read.
Departs  the paper checkpoints each chunk's summary; here one autograd function recomputes scores
         from the log-sum-exp. Where torch has a fused kernel that returns the log-sum-exp (CPUs;
         16-bit floats on CUDA), a chunk is one call of it, and what needs no mask is one chunk.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.context.masks import Block, Dropout, MaskMod, blocks, piece
from holdfast.errors import UsageError

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_cuda_flash = torch.ops.aten._scaled_dot_product_flash_attention.default
_cuda_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default


class Spec(NamedTuple):
    """How `forward` and `backward` attend; fields as the arguments of `attention_with_lse`."""

    mask: Tensor | MaskMod | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    q_chunk: int = 512
    k_chunk: int = 512
    dropout: Dropout | None = None


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | MaskMod | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    q_chunk: int = 512,
    k_chunk: int = 512,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + bias) v and the logarithm of the softmax's denominator.

    Args:
        q: (B,Hq,n,d).
        k: (B,H,m,d) with Hq a multiple of H: head h of q attends to head h // (Hq / H).
        v: (B,H,m,dv).
        mask: True where a query sees a key: bool, broadcastable to (B,Hq,n,m), or a function of
            batch, query head, query and key indices that broadcast, such as `Causal()`. A tensor
            takes bytes of its own; a function is evaluated chunk by chunk.
        bias: added to scores, floating, broadcastable to (B,Hq,n,m); may need a gradient.
        scale: of the scores; d ** -0.5 by default.
        q_chunk, k_chunk: queries and keys per chunk.
        dropout: share of probabilities that are dropped after the softmax.
        seed: of the dropout; equal seeds drop the same probabilities, whatever the chunks.

    Returns:
        out (B,Hq,n,dv) in q's dtype and lse (B,Hq,n) fp32, fp64 for fp64; both can be
        differentiated once. A query that sees no key has out 0 and lse -inf.

    Raises:
        UsageError: shapes, dtypes or chunk sizes that do not go together.
    """
    _check(q, k, v, mask, bias, (q_chunk, k_chunk), dropout)
    if isinstance(mask, Tensor):
        mask = _four(mask).expand(-1, -1, q.shape[2], k.shape[2])
    bias = None if bias is None else _four(bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    drop = Dropout(dropout, seed) if dropout else None
    return _Attention.apply(q, k, v, bias, Spec(mask, None, scale, q_chunk, k_chunk, drop))


def merge_lse(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from (out, lse) over each of them.

    Args:
        parts: out (B,Hq,n,dv) and lse (B,Hq,n), of the same queries.

    Returns:
        out in the dtype of the parts, and lse; a query that sees no key in any part has 0 and -inf.
    """
    if not parts:
        raise UsageError("merge_lse got no part; give it at least one (out, lse)")
    lses = torch.stack([lse for _, lse in parts])
    top = lses.detach().amax(0)
    top = top.masked_fill(top == -math.inf, 0)
    weights = (lses - top).exp()
    total = weights.sum(0)
    share = weights / total.masked_fill(total == 0, 1)
    out = sum(w[..., None] * part.to(w.dtype) for w, (part, _) in zip(share, parts, strict=True))
    # Where no part sees anything the gradient of log(0) would be NaN.
    seen = torch.where(total == 0, 1, total).log() + top
    return out.to(parts[0][0].dtype), torch.where(total == 0, -math.inf, seen)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, spec: Spec):
        out, lse = forward(q, k, v, spec._replace(bias=bias))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, bias)
        ctx.spec = spec
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None):
        q, k, v, out, lse, bias = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dbias = torch.zeros_like(bias, dtype=lse.dtype) if ctx.needs_input_grad[3] else None
        spec = ctx.spec._replace(bias=bias)
        grads = backward(dout, q, k, v, out, lse, spec, dlse=dlse, dbias=dbias)
        dbias = None if dbias is None else dbias.to(bias.dtype)
        return *(grad.to(q.dtype) for grad in grads), dbias, None


def choose_path(q: Tensor, spec: Spec, *, bias_gradient: bool = False) -> str:
    """What computes blocks: "cpu" and "cuda" are torch's fused kernels, "torch" is operations.

    The kernels take biases in the dtype of q alone, and neither drop probabilities nor
    differentiate a bias; the one for CUDA takes 16-bit floats and heads of up to 256 elements, and
    leaves blocks with a mask to "torch".
    """
    bias = spec.bias
    if spec.dropout or bias_gradient or (bias is not None and bias.dtype != q.dtype):
        return "torch"
    if q.device.type == "cpu" and q.dtype in _CPU_DTYPES:
        return "cpu"
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type == "cuda" and half and bias is None and q.shape[-1] <= 240:
        return "cuda"
    return "torch"


def forward(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` without autograd and without checks."""
    path = choose_path(q, spec)
    sums = None
    for block in _blocks(path, spec, q, k):
        rows, cols = block.rows, block.cols
        out, lse = _attend(path, q[:, :, rows], k[:, :, cols], v[:, :, cols], spec, block)
        if block.covers(q, k):
            return out.to(q.dtype), lse
        if sums is None:
            sums = empty_sums(q, v)
        merge_(sums[0][:, :, rows], sums[1][:, :, rows], out, lse)
    sums = empty_sums(q, v) if sums is None else sums
    return sums[0].to(q.dtype), sums[1]


def empty_sums(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of queries that have seen no key yet, to be updated by `merge_`."""
    b, h, n, _ = q.shape
    # Laid out as models want it: the heads of one token side by side.
    out = q.new_zeros(b, n, h, v.shape[-1], dtype=_wide(q)).transpose(1, 2)
    return out, q.new_full((b, h, n), -math.inf, dtype=_wide(q))


def merge_(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Add attention over further keys to `out` and `lse`, in place."""
    total = torch.logaddexp(lse, more_lse)
    finite = total.masked_fill(total == -math.inf, 0)
    out.mul_((lse - finite).exp_()[..., None])
    out.addcmul_(more.to(out.dtype), (more_lse - finite).exp_()[..., None])
    lse.copy_(total)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: Spec,
    *,
    dlse: Tensor | None = None,
    dbias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in fp32 (fp64) where blocks are summed; that of the bias is added to
    `dbias`.

    `out` and `lse` may be those over more keys than `k` holds: the gradients are then what these
    keys contribute, which a ring of ranks adds up.
    """
    path = choose_path(q, spec, bias_gradient=dbias is not None)
    # Scores of a query that sees nothing are -inf: with any finite number its probabilities are 0.
    blind = lse == -math.inf
    lse = lse.masked_fill(blind, 0)
    widths = q.shape[-1], k.shape[-1], v.shape[-1]
    if dlse is not None:
        # A score's gradient is P * (dout v^T - D), D = rowsum(dout * out), less D by dlse. One more
        # column does that also inside a kernel: 1 in dout, -dlse in out, 0 in v.
        dout = torch.cat([dout, torch.ones_like(dout[..., :1])], -1)
        less = dlse.masked_fill(blind, 0).neg()[..., None]
        out = torch.cat([out, less.to(out.dtype)], -1)
        v = F.pad(v, (0, 1))
    sums: Sequence[Tensor] | None = None
    for block in _blocks(path, spec, q, k):
        rows, cols = block.rows, block.cols
        parts = _gradients(
            path, dout[:, :, rows], q[:, :, rows], k[:, :, cols], v[:, :, cols],
            out[:, :, rows], lse[:, :, rows], spec, block, dbias,
        )  # fmt: skip
        if block.covers(q, k):
            sums = parts
            break
        if sums is None:
            sums = [torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v)]
        for total, part, at in zip(sums, parts, (rows, cols, cols), strict=True):
            total[:, :, at] += part
    if sums is None:
        sums = [torch.zeros_like(x) for x in (q, k, v)]
    dq, dk, dv = (total[..., :width] for total, width in zip(sums, widths, strict=True))
    return dq, dk, dv


def _blocks(path: str, spec: Spec, q: Tensor, k: Tensor) -> Iterator[Block]:
    fused = path != "torch" and (spec.mask is None or spec.bias is None)
    return blocks(spec.mask, q, k, (spec.q_chunk, spec.k_chunk), whole=fused)


def _attend(
    path: str, q: Tensor, k: Tensor, v: Tensor, spec: Spec, block: Block
) -> tuple[Tensor, Tensor]:
    """out and lse of one block."""
    if path == "cpu":
        width = v.shape[-1]
        q, k, v = _same_width(q, k, v)
        added = _added(block, spec.bias, q)
        out, lse = _cpu_flash(q, k, v, 0.0, block.causal, attn_mask=added, scale=spec.scale)
        if added is not None:
            # The kernel says 0 for a query that sees nothing.
            lse = lse.masked_fill(added.amax(-1) == -math.inf, -math.inf)
        return out[..., :width], lse
    if path == "cuda" and block.mask is None:
        width = v.shape[-1]
        q, k, v = _same_width(q, k, v, multiple=8)
        out, lse, *_ = _cuda_flash(q, k, v, 0.0, block.causal, scale=spec.scale)
        return out[..., :width], lse
    scores = scores_of(q, k, spec, block)
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)
    p = scores.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    lse = (total.log() + top)[..., 0]
    if spec.dropout:
        p *= _kept(spec.dropout, p, block)
    out = per_key_head(p, k) @ v.to(p.dtype)
    return out.view(*p.shape[:3], -1).div_(total.masked_fill(total == 0, 1)), lse


def _gradients(
    path: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    spec: Spec, block: Block, dbias: Tensor | None,
) -> Sequence[Tensor]:  # fmt: skip
    """What one block contributes to the gradients of q, k and v."""
    widths = q.shape[-1], k.shape[-1], v.shape[-1]
    if path == "cpu":
        q, k, v, out, dout = _same_width(q, k, v, out, dout)
        added, causal = _added(block, spec.bias, q), block.causal
        grads = _cpu_flash_backward(
            dout, q, k, v, out, lse, 0.0, causal, attn_mask=added, scale=spec.scale
        )
        return [grad[..., :width] for grad, width in zip(grads, widths, strict=True)]
    if path == "cuda" and block.mask is None:
        q, k, v, out, dout = _same_width(q, k, v, out, dout, multiple=8)
        # Without dropout the kernel reads no random state, but it wants one.
        random = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_zeros(())
        grads = _cuda_flash_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2],
            0.0, block.causal, *random, scale=spec.scale,
        )  # fmt: skip
        return [grad[..., :width] for grad, width in zip(grads, widths, strict=True)]
    wide = lse.dtype
    delta = (dout * out).sum(-1, keepdim=True, dtype=wide)
    p = scores_of(q, k, spec, block).sub_(lse[..., None]).exp_()
    shape = p.shape
    do = per_key_head(dout.to(wide), k)
    dp = (do @ v.to(wide).mT).view(shape)
    used = p
    if spec.dropout:
        kept = _kept(spec.dropout, p, block)
        dp *= kept
        used = p * kept
    dv = per_key_head(used, k).mT @ do
    ds = p.mul_(dp.sub_(delta))
    if dbias is not None:
        part = piece(dbias, block)
        part += ds.sum_to_size(part.shape)
    ds = per_key_head(ds, k)
    dq = (ds @ k.to(wide)).view(*shape[:3], -1).mul_(spec.scale)
    return dq, (ds.mT @ per_key_head(q.to(wide), k)).mul_(spec.scale), dv


def scores_of(q: Tensor, k: Tensor, spec: Spec, block: Block) -> Tensor:
    """(B,Hq,n,m) of a block, -inf where a query does not see a key."""
    wide = _wide(q)
    scores = per_key_head(q.to(wide) * spec.scale, k) @ k.to(wide).mT
    scores = scores.view(*q.shape[:3], k.shape[2])
    if spec.bias is not None:
        scores += piece(spec.bias, block)
    if block.mask is not None:
        scores.masked_fill_(~block.mask, -math.inf)
    return scores


def per_key_head(x: Tensor, k: Tensor) -> Tensor:
    """(B,Hq,n,e) -> (B,H,Hq/H*n,e): query heads that share a key head, one below the other."""
    return x.reshape(*k.shape[:2], -1, x.shape[-1])


def _kept(dropout: Dropout, p: Tensor, block: Block) -> Tensor:
    return dropout.factor(p.shape, (block.rows.start, block.cols.start), p)


def _added(block: Block, bias: Tensor | None, q: Tensor) -> Tensor | None:
    """What a fused kernel adds to the scores of a block; None is nothing."""
    added = None if bias is None else piece(bias, block)
    if block.mask is not None:
        shown = q.new_zeros(()) if added is None else added
        return torch.where(block.mask, shown, q.new_full((), -math.inf))
    if added is None:
        return None
    return added.expand(-1, -1, *(s.stop - s.start for s in (block.rows, block.cols)))


def _same_width(*tensors: Tensor, multiple: int = 1) -> list[Tensor]:
    """Zeros appended to the last dimension, which change no product, until all are as wide."""
    width = max(t.shape[-1] for t in tensors)
    width += -width % multiple
    # The kernels read wrong elements where the last dimension has a stride, and say nothing.
    dense = (t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
    return [t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])) for t in dense]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _four(x: Tensor) -> Tensor:
    return x.view((1,) * (4 - x.dim()) + x.shape)


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | MaskMod | None, bias: Tensor | None,
    chunks: tuple[int, int], dropout: float,
) -> None:  # fmt: skip
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise UsageError(f"{shapes}: expected (B,Hq,n,d), (B,H,m,d) and (B,H,m,dv)")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise UsageError(f"{shapes} do not go together: expected (B,Hq,n,d), (B,H,m,d), (B,H,m,dv)")
    if q.shape[1] % k.shape[1]:
        raise UsageError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly; "
            "the first number must be a multiple of the second"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise UsageError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one floating dtype"
        )
    if min(chunks) < 1:
        raise UsageError(f"q_chunk={chunks[0]}, k_chunk={chunks[1]}: a chunk holds 1 or more")
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout={dropout} is outside [0, 1); it is the share that is dropped")
    scores = (*q.shape[:3], k.shape[2])
    for name, given, kind in (("mask", mask, "bool"), ("bias", bias, "floating")):
        if not isinstance(given, Tensor):
            continue
        if (given.dtype != torch.bool) if kind == "bool" else not given.is_floating_point():
            raise UsageError(f"{name} is {given.dtype}; expected {kind}")
        sizes = _four(given).shape if given.dim() <= 4 else ()
        if len(sizes) != 4 or any(
            s not in (1, want) for s, want in zip(sizes, scores, strict=True)
        ):
            raise UsageError(
                f"{name} of shape {tuple(given.shape)} does not broadcast to the scores' {scores}"
            )
