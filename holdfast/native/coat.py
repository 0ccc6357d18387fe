"""AdamW steps on FP8 moments with an expanded range: native on CPUs, torch elsewhere.

`torch.ops.holdfast.coat_` changes the parameter and its states in place; see `adamw4` for what
holds of all such operators.

Layout   one byte per element in the order of memory, the bits of E4M3; per block one fp32 largest
         magnitude and one byte k * 16 - 1.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from holdfast import native
from holdfast.native.adamw4 import CHUNK, library_for, moved
from holdfast.native.adamw8 import run_native
from holdfast.native.triton_path import pick

BLOCKS = (32, 64, 128, 256)
POWERS = 256
# 16 * log2(448^2 / 2): how many sixteenths k has where the magnitudes of a block span one octave.
SIXTEENTHS = 265.8353575
# log2(1 + t) / t on [sqrt(1/2), sqrt(2)] - 1 and 448 * (2^t - 1) / t on [-1/2, 1/2], minimax.
LOG2 = (0.2526601254940033, -0.3945753872394562, 0.48668617010116577, -0.7202417850494385,
        1.4425779581069946)  # fmt: skip
EXP2 = (4.293118000030518, 25.046077728271484, 107.62796020507812, 310.5196533203125)

_lib = torch.library.Library("holdfast", "FRAGMENT")
_lib.define(
    "coat_(Tensor(a!) p, Tensor g, Tensor(b!) m_code, Tensor(c!) m_scale, Tensor(d!) m_power, "
    "Tensor(e!) v_code, Tensor(f!) v_scale, Tensor(g!) v_power, int block, Tensor step, float lr, "
    "float b1, float b2, float eps, float weight_decay) -> ()"
)


@torch.library.impl(_lib, "coat_", "Meta")
def _nothing(*args) -> None:
    """A step gives no new tensor."""


@torch.library.impl(_lib, "coat_", "CompositeExplicitAutograd")
def coat_(
    p: Tensor,
    g: Tensor,
    m_code: Tensor,
    m_scale: Tensor,
    m_power: Tensor,
    v_code: Tensor,
    v_scale: Tensor,
    v_power: Tensor,
    block: int,
    step: Tensor,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step in place.

    Args:
        p, g: contiguous, any shape of n elements; fp32 or bf16 for the native path.
        m_code, v_code: (n,) uint8.
        m_scale, v_scale: (ceil(n / block),) fp32.
        m_power, v_power: (ceil(n / block),) uint8.
        block: one of `BLOCKS`.
        step: one element, already counting this step.
    """
    states = (m_code, m_scale, m_power, v_code, v_scale, v_power)
    library = library_for(p, g)
    if library is None:
        step_ = pick("triton_bytes", "coat_", coat_ref, p, g)
        step_(p, g, *states, block, step, lr, b1, b2, eps, weight_decay)
        return
    hyper = native.Hyper(lr, b1, b2, eps, weight_decay, step.item())
    run_native(library, p, g, block, states, _tables(), hyper)


def coat_ref(
    p: Tensor,
    g: Tensor,
    m_code: Tensor,
    m_scale: Tensor,
    m_power: Tensor,
    v_code: Tensor,
    v_scale: Tensor,
    v_power: Tensor,
    block: int,
    step: Tensor,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`coat_` in torch, on any device, and the definition of what every path computes.

    All arithmetic is fp32, each operation rounded by itself (no fused multiply-add). For a block:

        m = decode(m_code, m_scale * b1, m_power) + (1 - b1) * g
        v = decode(v_code, v_scale * b2, v_power) + (1 - b2) * (g * g)
        p = p * (1 - lr * weight_decay) + (m * -size) / (sqrt(v) * root + eps)

    with `size`, `root` as in `adamw4.moved`, then code, scale and power are `encode`'s of m and v.
    """
    line = p.view(-1)
    for start in range(0, p.numel(), CHUNK):
        stop = min(start + CHUNK, p.numel())
        part, blocks = slice(start, stop), slice(start // block, -(-stop // block))
        x = g.view(-1)[part].float()
        m = decode(m_code[part], m_scale[blocks] * b1, m_power[blocks], block) + x * (1 - b1)
        v = decode(v_code[part], v_scale[blocks] * b2, v_power[blocks], block) + x * x * (1 - b2)
        line[part].copy_(moved(line[part].float(), m, v, step, lr, b1, b2, eps, weight_decay))
        m_code[part], m_scale[blocks], m_power[blocks] = encode(m, block)
        v_code[part], v_scale[blocks], v_power[blocks] = encode(v, block)
        # A second moment has no sign.
        v_code[part] &= 127


def decode(code: Tensor, scale: Tensor, power: Tensor, block: int) -> Tensor:
    """code (n,) uint8, a factor and a power per block -> (n,) fp32.

    The sign of the code times `levels()[128 * power + (code & 127)] * scale`: with q the E4M3
    number, (|q| / 448)^(1/k) * scale, where k = (power + 1) / 16.
    """
    row = power.long().repeat_interleave(block)[: len(code)]
    size = _levels(code.device)[row, (code & 127).long()] * spread(scale, block, len(code))
    return torch.where(code > 127, -size, size)


def encode(x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (n,) fp32 -> code (n,) uint8, scale and power, each per block.

    scale = max |x| of the block. With `log2` as below, of the largest and of the smallest non-zero
    magnitude (0 where there is none), s = SIXTEENTHS / (log2(max) - log2(min)) and
    power + 1 = s cut to an integer, at least 1, where s < 256, else 256; k = (power + 1) / 16.

    z = (log2(|x|) - log2(max)) * k, n = z rounded to an integer (half to even), t = z - n,
    f = ((((EXP2[0] * t + EXP2[1]) * t + ..) * t) + 448) * 2^n, exact for the last factor. Where
    f < 2^-6, h = f + 2^-6, else h = f. The code is (bits(h) + 0x80000 - (120 << 23)) >> 20, less 8
    where f < 2^-6, within [1, 126]; 0 where x is zero; plus 128 where the sign bit of x is set.
    This is E4M3 rounded to nearest of 448 * (|x| / max)^k, a tie away from zero.
    """
    n = len(x)
    size = torch.nn.functional.pad(x, (0, -n % block)).view(-1, block).abs()
    top = size.amax(1)
    least = size.masked_fill(size == 0, torch.inf).amin(1)
    least = torch.where(least.isinf() & (top == 0), 0, least)
    high = log2(top)
    ratio = SIXTEENTHS / (high - log2(least))
    power = torch.where(ratio < POWERS, ratio.clamp(1, POWERS), POWERS).int() - 1
    z = (log2(size) - high[:, None]) * ((power + 1) * 0.0625)[:, None]
    # Only zeros, which get code 0 below, lie beyond; their exponents would overflow.
    z = z.clamp_min(-64)
    whole = z.round()
    t = z - whole
    f = _horner(EXP2, t) * t + 448
    bits = f.view(torch.int32) + (whole.int() << 23)
    small = bits < 0x3C800000
    h = bits.view(torch.float32) + torch.where(small, 2.0**-6, 0)
    code = (h.view(torch.int32) + (0x80000 - (120 << 23))) >> 20
    code = (code - 8 * small.int()).clamp(1, 126).masked_fill(size == 0, 0).view(-1)[:n]
    return (code + 128 * x.signbit().int()).to(torch.uint8), top, power.to(torch.uint8)


def log2(x: Tensor) -> Tensor:
    """Of positive normal fp32 numbers, to 2e-5: bits(x) = b, e = (b - 0x3f3504f3) >> 23 (rounding
    down), t = the number with bits b - (e << 23), less 1; e + t * (LOG2 by Horner's rule in t)."""
    b = x.view(torch.int32)
    e = (b - 0x3F3504F3) >> 23
    t = (b - (e << 23)).view(torch.float32) - 1
    return _horner(LOG2, t) * t + e.float()


def spread(of_block: Tensor, block: int, n: int) -> Tensor:
    """(blocks,) -> (n,)."""
    return of_block.repeat_interleave(block)[:n]


def _horner(coefficients: tuple[float, ...], t: Tensor) -> Tensor:
    first, *rest = coefficients
    value = torch.full_like(t, first)
    for c in rest:
        value = value * t + c
    return value


@cache
def levels() -> list[float]:
    """(q / 448)^(1 / k) of 256 powers k = 1/16, 2/16, .. by 128 codes q without a sign; fp32.

    Small powers reach below fp32; a code that is not zero stands for 2^-126 at least.
    """
    q = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).double() / 448
    q[127] = 1.0  # E4M3's NaN, which no encoder writes
    k = torch.arange(1, POWERS + 1, dtype=torch.float64) / 16
    table = (q ** (1 / k[:, None])).float()
    table[:, 1:].clamp_min_(2.0**-126)
    return table.view(-1).tolist()


@cache
def _levels(device: torch.device) -> Tensor:
    # A fake tensor would stay in the cache.
    with unset_fake_temporarily():
        return torch.tensor(levels(), device=device).view(POWERS, 128)


@cache
def _tables() -> ctypes.Array:
    return (ctypes.c_float * (POWERS * 128))(*levels())
