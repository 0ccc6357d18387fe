"""AdamW steps on 8-bit moments as a torch operator: native on CPUs, torch elsewhere.

`torch.ops.holdfast.adamw8_` changes the parameter and its states in place; see `adamw4` for what
holds of all such operators.

Layout   one byte per element in the order of memory; one fp32 scale per block of 256 elements; m in
         the codes of the map "dynamic8", v in those of "dynamic8_unsigned" (`forms.maps`).

A level of these maps is a small integer over a power of ten. Both directions are computed from
that, here and in the kernel, so that no path looks up 256 numbers and all round alike.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from holdfast import native
from holdfast.forms import maps
from holdfast.native.adamw4 import CHUNK, NATIVE_DTYPES, library_for, moved, reciprocal
from holdfast.native.triton_path import pick

BLOCK = 256
DECADES = 7

_lib = torch.library.Library("holdfast", "FRAGMENT")
_lib.define(
    "adamw8_(Tensor(a!) p, Tensor g, Tensor(b!) m_code, Tensor(c!) m_scale, Tensor(d!) v_code, "
    "Tensor(e!) v_scale, Tensor step, float lr, float b1, float b2, float eps, "
    "float weight_decay) -> ()"
)


@torch.library.impl(_lib, "adamw8_", "Meta")
def _nothing(*args) -> None:
    """A step gives no new tensor."""


@torch.library.impl(_lib, "adamw8_", "CompositeExplicitAutograd")
def adamw8_(
    p: Tensor,
    g: Tensor,
    m_code: Tensor,
    m_scale: Tensor,
    v_code: Tensor,
    v_scale: Tensor,
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
        m_scale, v_scale: (ceil(n / 256),) fp32.
        step: one element, already counting this step.
    """
    library = library_for(p, g)
    if library is None:
        step_ = pick("triton_bytes", "adamw8_", adamw8_ref, p, g)
        step_(p, g, m_code, m_scale, v_code, v_scale, step, lr, b1, b2, eps, weight_decay)
        return
    states = (m_code, m_scale, None, v_code, v_scale, None)
    hyper = native.Hyper(lr, b1, b2, eps, weight_decay, step.item())
    run_native(library, p, g, BLOCK, states, _tables(), hyper)


def run_native(
    library: tuple[ctypes.CDLL, int],
    p: Tensor,
    g: Tensor,
    block: int,
    states: tuple[Tensor | None, ...],
    tables: ctypes.Array,
    hyper: native.Hyper,
) -> None:
    """Call the kernel; `states` are code, scale and power of m, then of v."""
    kernels, variant = library
    kernels.hf_adamw8(
        variant,
        native.threads(),
        p.numel(),
        block,
        p.data_ptr(),
        NATIVE_DTYPES[p.dtype],
        g.data_ptr(),
        NATIVE_DTYPES[g.dtype],
        *(None if t is None else t.data_ptr() for t in states),
        tables,
        ctypes.addressof(hyper),
    )


def adamw8_ref(
    p: Tensor,
    g: Tensor,
    m_code: Tensor,
    m_scale: Tensor,
    v_code: Tensor,
    v_scale: Tensor,
    step: Tensor,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`adamw8_` in torch, on any device, and the definition of what every path computes.

    All arithmetic is fp32, each operation rounded by itself (no fused multiply-add). For a block:

        m = decode(m_code, m_scale * b1) + (1 - b1) * g
        v = decode(v_code, v_scale * b2) + (1 - b2) * (g * g)
        p = p * (1 - lr * weight_decay) + (m * -size) / (sqrt(v) * root + eps)

    with `size`, `root` as in `adamw4.moved`, then scale = max |x| of the block and its code is
    encode(x, scale). `b1`, `1 - b1`, .. are Python doubles rounded once. `Dynamic8` defines decode
    and encode.
    """
    line = p.view(-1)
    for start in range(0, p.numel(), CHUNK):
        stop = min(start + CHUNK, p.numel())
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        x = g.view(-1)[start:stop].float()
        m = SIGNED.decode(m_code[start:stop], m_scale[blocks] * b1) + x * (1 - b1)
        v = UNSIGNED.decode(v_code[start:stop], v_scale[blocks] * b2) + x * x * (1 - b2)
        after = moved(line[start:stop].float(), m, v, step, lr, b1, b2, eps, weight_decay)
        line[start:stop].copy_(after)
        m_scale[blocks] = largest(m, BLOCK)
        v_scale[blocks] = largest(v, BLOCK)
        m_code[start:stop] = SIGNED.encode(m, m_scale[blocks])
        v_code[start:stop] = UNSIGNED.encode(v, v_scale[blocks])


@dataclass(frozen=True)
class Dynamic8:
    """A dynamic map of 256 rising levels as arithmetic.

    With code c and n = 2 * |c - 127| + 1 where the map is signed, else c + 1, and e the exponent of
    n (2^e <= n < 2^(e+1)), the level is (18 * n + offset[e]) / denominator[e], with the sign of
    c - 127: the list of `maps.levels(name)`, each to one unit in the last place.
    """

    name: str
    signed: bool

    def numerators(self) -> tuple[list[float], list[float]]:
        """Of each code: the integer and the power of ten (times 2^e * 20) it is divided by."""
        top, bottom = [], []
        for code in range(256):
            n = 2 * abs(code - 127) + 1 if self.signed else code + 1
            e = n.bit_length() - 1
            sign = -1 if self.signed and code < 127 else 1
            top.append(sign * (18 * n + self._offset(e)))
            bottom.append(self._denominator(e))
        return top, bottom

    def _offset(self, e: int) -> float:
        if e == 0:
            return -18.0
        if e > DECADES:
            return 1.0 - 18 * (257 if self.signed else 256)
        return -16.0 * 2**e + (0 if self.signed else 9)

    @staticmethod
    def _denominator(e: int) -> float:
        return 20.0 * 2**e * 10 ** (DECADES - e) if 0 < e <= DECADES else 1.0

    def decode(self, code: Tensor, fade: Tensor) -> Tensor:
        """code (n,) uint8 and a factor per block -> (n,) fp32: numerator * (fade / denominator)."""
        top, bottom = (torch.tensor(t, device=code.device) for t in self.numerators())
        index = code.int()
        return top[index] * (_each(fade, len(code)) / bottom[index])

    def encode(self, x: Tensor, scale: Tensor) -> Tensor:
        """x (n,) and its blocks' scales -> (n,) uint8.

        With y = min(|x * reciprocal(scale)|, 1) and r the number of the first seven bounds below y,
        min(y * slope[r] + start[r], last[r]) is n above (signed: |c - 127|), its fraction cut off;
        beyond the eighth bound the code is 255 (signed: only if x > 0). That is the nearest level,
        except that an unsigned code is never 0 unless y is, and that a number within one rounding
        of a midpoint may go either way. NaN becomes y = 1.
        """
        y = (x * _each(reciprocal(scale), len(x))).abs().nan_to_num(1.0).clamp_max(1.0)
        bounds, *rest = (torch.tensor(t, device=x.device) for t in self.regions())
        r = torch.bucketize(y, bounds[:7])
        slope, start, last = (t[r] for t in rest)
        n = (y * slope + start).minimum(last).int()
        beyond = y > bounds[7]
        if not self.signed:
            return torch.where(beyond, 255, n - 1).to(torch.uint8)
        negative = x.signbit()
        n = n + (beyond & ~negative)
        return (127 + torch.where(negative, -n, n)).to(torch.uint8)

    @cache  # noqa: B019  there are two instances, which live as long as the module
    def regions(self) -> tuple[list[float], ...]:
        """bounds, slope, start, last of eight regions: zero and seven decades; fp32 exactly."""
        levels = [level for level in maps.levels(self.name) if level >= 0]
        counts = [2**e if self.signed else 2 ** (e + 1) for e in range(DECADES)]
        first = 1
        # A second moment must not vanish: m over its epsilon would be an update without bound.
        bounds = [levels[1] / 2 if self.signed else 0.0]
        slope, start, last = [0.0], [0.0 if self.signed else 1.0], [0.0 if self.signed else 1.0]
        for e, count in enumerate(counts):
            # A decade is `count` equal cells in [0.1, 1] * top; n counts on from `count`.
            top = 10.0 ** (e - DECADES + 1)
            if e == 0 and not self.signed:
                # All below the decade belongs to its first cell.
                slope.append(1 / (0.55 * top))
                start.append(float(count))
            else:
                slope.append(count / (0.9 * top))
                start.append(count - count / 9)
            last.append(2.0 * count - 1)
            first += count
            bounds.append((levels[first - 1] + levels[first]) / 2)
        return tuple(_fp32(t) for t in (bounds, slope, start, last))

    def table(self) -> list[float]:
        """All of this as the kernel wants it."""
        # The low four bits of a float's exponent are those of e + 127.
        order = [(i + 1) % 16 for i in range(16)]
        offsets, denominators = (
            [f(e) if e <= DECADES + 1 else 1.0 for e in order]
            for f in (self._offset, self._denominator)
        )
        return [*offsets, *denominators, *(x for row in self.regions() for x in row)]


SIGNED, UNSIGNED = Dynamic8("dynamic8", True), Dynamic8("dynamic8_unsigned", False)


def largest(x: Tensor, block: int) -> Tensor:
    """x (n,) -> (ceil(n / block),) largest magnitudes."""
    return torch.nn.functional.pad(x, (0, -len(x) % block)).view(-1, block).abs().amax(1)


def _each(of_block: Tensor, n: int) -> Tensor:
    return of_block.repeat_interleave(BLOCK)[:n]


def _fp32(numbers: list[float]) -> list[float]:
    return torch.tensor(numbers, dtype=torch.float64).float().tolist()


@cache
def _tables() -> ctypes.Array:
    numbers = [*SIGNED.table(), *UNSIGNED.table()]
    return (ctypes.c_float * len(numbers))(*numbers)
