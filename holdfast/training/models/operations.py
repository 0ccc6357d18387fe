"""Operations among which a Transformer search chooses, each (B,T,c) -> (B,T,c).

All are called with (x, mask, memory): mask (B,S) bool marks real source positions, memory (B,S,d)
is an encoder's output. Causal ones see no later position. Padding is masked in attention only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import UsageError, unknown


class Attention(nn.Module):
    """Multi-head attention of x to itself or, with `memory_width`, to the encoder's output."""

    def __init__(self, width: int, heads: int, *, causal: bool, memory_width: int | None = None):
        super().__init__()
        if width % heads:
            raise UsageError(
                f"a part of width {width} does not split into {heads} heads; make it a multiple"
            )
        self.heads, self.cross = heads, memory_width is not None
        self.causal = causal and not self.cross
        self.query = nn.Linear(width, width)
        self.pairs = nn.Linear(memory_width or width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, memory: Tensor | None) -> Tensor:
        source = memory if self.cross else x
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.query(x), *self.pairs(source).chunk(2, -1))
        )
        # A causal target has its padding at the end, where no real position looks.
        keys = None if mask is None or self.causal else mask[:, None, None]
        mixed = F.scaled_dot_product_attention(q, k, v, keys, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


def _padded(x: Tensor, window: int, causal: bool) -> Tensor:
    """Zeros around (B,T,c), so that a window at each position sees itself or only its past."""
    before = window - 1 if causal else window // 2
    return F.pad(x, (0, 0, before, window - 1 - before))


class Convolution(nn.Module):
    def __init__(self, width: int, window: int, *, causal: bool):
        super().__init__()
        self.window, self.causal = window, causal
        self.conv = nn.Conv1d(width, width, window)

    def forward(self, x: Tensor, *_) -> Tensor:
        return self.conv(_padded(x, self.window, self.causal).mT).mT


class DynamicConvolution(nn.Module):
    """Each position computes its own kernel, a softmax over the window, one per head."""

    def __init__(self, width: int, window: int, heads: int, *, causal: bool):
        super().__init__()
        self.window, self.heads, self.causal = window, heads, causal
        self.kernel, self.out = nn.Linear(width, heads * window), nn.Linear(width, width)

    def forward(self, x: Tensor, *_) -> Tensor:
        kernel = self.kernel(x).unflatten(-1, (self.heads, self.window)).softmax(-1)  # (B,T,h,w)
        windows = _padded(x, self.window, self.causal).unfold(1, self.window, 1)  # (B,T,c,w)
        mixed = torch.einsum("bthw,bthcw->bthc", kernel, windows.unflatten(2, (self.heads, -1)))
        return self.out(mixed.flatten(2))


class GatedLinear(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, *_) -> Tensor:
        return F.glu(self.linear(x))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, *_) -> Tensor:
        return self.net(x)


class Zero(nn.Module):
    def forward(self, x: Tensor, *_) -> Tensor:
        return torch.zeros_like(x)


class Identity(nn.Module):
    def forward(self, x: Tensor, *_) -> Tensor:
        return x


class Residual(nn.Module):
    """LayerNorm(x + dropout(operation(x)))."""

    def __init__(self, operation: nn.Module, width: int, dropout: float):
        super().__init__()
        self.operation, self.norm = operation, nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *context: Tensor | None) -> Tensor:
        return self.norm(x + self.dropout(self.operation(x, *context)))


CONVOLUTIONS = {f"conv{window}": window for window in (3, 5, 7, 11)}
DYNAMIC = {f"dynamic_conv{window}": window for window in (3, 7, 11, 15)}
OPERATIONS = (
    *CONVOLUTIONS,
    *DYNAMIC,
    "self_attention",
    "cross_attention",
    "glu",
    "ffn",
    "zero",
    "identity",
)


def candidate(
    name: str, width: int, *, heads: int, causal: bool, memory_width: int | None, dropout: float
) -> nn.Module:
    """One of `OPERATIONS` on a part of `width`: called with (x, mask, memory), returns like x.

    Raises:
        UsageError: an unknown name; cross-attention without `memory_width`; heads that do not
            divide the width.
    """
    operation: nn.Module
    if name == "zero":
        return Zero()
    if name == "identity":
        return Identity()
    if name in CONVOLUTIONS:
        operation = Convolution(width, CONVOLUTIONS[name], causal=causal)
    elif name in DYNAMIC:
        operation = DynamicConvolution(width, DYNAMIC[name], heads, causal=causal)
    elif name == "self_attention":
        operation = Attention(width, heads, causal=causal)
    elif name == "cross_attention":
        if memory_width is None:
            raise UsageError("cross_attention reads an encoder's output; use it in a decoder only")
        operation = Attention(width, heads, causal=causal, memory_width=memory_width)
    elif name == "glu":
        operation = GatedLinear(width)
    elif name == "ffn":
        operation = FeedForward(width)
    else:
        raise unknown("operation", name, OPERATIONS)
    return Residual(operation, width, dropout)
