"""Bytes of a GPT layer under tensor, sequence and pipeline parallelism and recomputation.

Symbols as in the paper: s sequence, b micro-batch, h hidden size, a heads, t tensor-parallel size,
p pipeline stages, v interleaved chunks per stage. fp16 activations, masks of one byte per element,
attention that is not fused, dropout, GELU of width 4h; statistics of layer norms are not counted.

Source: Korthikanti, Casper, Lym, McAfee, Andersch, Shoeybi, Catanzaro, "Reducing Activation
Recomputation in Large Transformer Models", MLSys 2023; theoretical memory report of Megatron-LM.
"""

from typing import Literal

from holdfast.errors import UsageError, unknown

Recompute = Literal["none", "selective", "full"]


def layer_activations(
    s: int,
    b: int,
    h: int,
    a: int,
    *,
    t: int = 1,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
) -> float:
    """Bytes that one layer saves for backward on one device.

    Args:
        recompute: "selective" runs softmax, its dropout and attention over values again; "full"
            keeps the layer's input alone, unsplit even under tensor parallelism.

    Raises:
        UsageError: sizes below 1, heads or hidden size that t does not divide, unknown recompute.
    """
    for what, value in (("s", s), ("b", b), ("h", h), ("a", a), ("t", t)):
        if value < 1:
            raise UsageError(f"{what}={value} is not positive; use 1 or more")
    if h % a or a % t or h % t:
        raise UsageError(f"h={h} must divide by a={a}, and both by t={t}")
    if recompute == "full":
        return 2 * s * b * h
    if recompute not in ("none", "selective"):
        raise unknown("recompute", recompute, ("none", "selective", "full"))
    attention = attention_term(s, h, a) if recompute == "none" else 0.0
    # Layer norms, their dropouts and what enters the parallel parts: 10; the parts themselves: 24.
    return s * b * h * (10 / (t if sequence_parallel else 1) + 24 / t + attention / t)


def attention_term(s: int, h: int, a: int) -> float:
    """5as/h: what selective recomputation saves, in units of s*b*h bytes."""
    return 5 * a * s / h


def first_stage_activations(layer: float, layers: int, p: int, v: int = 1) -> float:
    """Bytes on the first stage, which holds p micro-batches of layers/p layers at its peak.

    Args:
        layer: bytes of one layer for one micro-batch.
        v: chunks per stage; interleaving holds 1 + (p-1)/(pv) times as many where v > 1.

    Raises:
        UsageError: layers that p*v does not divide.
    """
    if p < 1 or v < 1 or layers % (p * v):
        raise UsageError(f"{layers} layers do not divide into p={p} stages of v={v} chunks")
    return layer * layers * (interleaving(p, v) if v > 1 else 1.0)


def interleaving(p: int, v: int) -> float:
    """1 + (p-1)/(pv): activations of an interleaved schedule relative to one chunk per stage."""
    return 1 + (p - 1) / (p * v)


def bytes_per_parameter(dp: int = 1, *, distributed_optimizer: bool = False) -> float:
    """18 bytes: fp16 or bf16 weight 2, fp32 gradient 4, fp32 weight 4, two Adam moments 8.

    A distributed optimizer splits its 12 bytes over the dp data-parallel ranks: 6 + 12/dp.
    """
    if dp < 1:
        raise UsageError(f"dp={dp} is not positive; use 1 or more")
    return 6 + 12 / dp if distributed_optimizer else 18.0
