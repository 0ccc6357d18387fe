"""Long convolutions: a sequence mixer whose filters are as long as the document, in O(L log L).

Form     a filter per channel is a function of lag / length that a small network writes, faded with
         the lag; with its weights in any dtype, it is written and transformed in fp32.
Bytes    the backward pass keeps the inputs of each convolution, no spectrum.
Source   Poli et al., "Hyena Hierarchy", ICML 2023; Fu et al., "Monarch Mixer", NeurIPS 2023; their
         code read.
Departs  filters are divided by the square root of the length, so that the output's size does not
         grow with it; padding is zeroed before both convolutions, so that a row does not depend on
         what it is batched with.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from holdfast.errors import UsageError

FEATURES = 5  # of a lag: its time, and cosine and sine of two frequencies


class _Convolve(torch.autograd.Function):
    """Circular convolution by FFT that saves its inputs alone; spectra are computed again."""

    @staticmethod
    def forward(ctx, u: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(u, kernel)
        size, length = kernel.shape[-1], u.shape[-1]
        spectrum = torch.fft.rfft(u.float(), size) * torch.fft.rfft(kernel)
        return torch.fft.irfft(spectrum, size)[..., :length].to(u.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        u, kernel = ctx.saved_tensors
        size, length = kernel.shape[-1], u.shape[-1]
        given = torch.fft.rfft(grad.float(), size)
        to_u = to_kernel = None
        if ctx.needs_input_grad[0]:
            spectrum = given * torch.fft.rfft(kernel).conj()
            to_u = torch.fft.irfft(spectrum, size)[..., :length].to(u.dtype)
        if ctx.needs_input_grad[1]:
            spectrum = (given * torch.fft.rfft(u.float(), size).conj()).sum(0)
            to_kernel = torch.fft.irfft(spectrum, size)
        return to_u, to_kernel


def fft_size(length: int) -> int:
    """The least size >= 2*length that is 8 to 16 times a power of two: quick, at most 1/8 more."""
    step = 1 << max(0, (2 * length - 1).bit_length() - 4)
    return -(-2 * length // step) * step


def long_convolve(u: Tensor, ahead: Tensor, behind: Tensor | None = None) -> Tensor:
    """Each channel of u convolved with filters as long as itself.

    y[t] = sum over i of ahead[i]*u[t-i] + behind[i]*u[t+1+i]: lag 0 belongs to `ahead` alone, and
    without `behind` nothing is seen of the future.

    Args:
        u: (B,d,L) of any float dtype; transformed in fp32.
        ahead, behind: (d,L).

    Returns:
        (B,d,L) in u's dtype.
    """
    length = u.shape[-1]
    size = fft_size(length)
    # Twice the length at least, so that neither end wraps into the other.
    gap = size - length if behind is None else size - 2 * length
    parts = [ahead, ahead.new_zeros(len(ahead), gap)]
    if behind is not None:
        parts.append(behind.flip(-1))
    return _Convolve.apply(u, torch.cat(parts, -1).float())


def long_convolve_ref(u: Tensor, ahead: Tensor, behind: Tensor | None = None) -> Tensor:
    """`long_convolve` as a matrix of O(L^2) elements per channel."""
    length = u.shape[-1]
    lag = torch.arange(length, device=u.device)[:, None] - torch.arange(length, device=u.device)
    matrix = torch.where(lag >= 0, ahead[:, lag.clamp_min(0)], 0)
    if behind is not None:
        matrix = torch.where(lag < 0, behind[:, (-1 - lag).clamp_min(0)], matrix)
    return torch.einsum("dts,bds->bdt", matrix, u)


class Filter(nn.Module):
    """A filter for each channel, written by a small network of the lag and faded with it."""

    def __init__(self, width: int, length: int, hidden: int = 128):
        super().__init__()
        self.length = length
        self.first = nn.Linear(FEATURES, hidden)
        self.inner = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(2))
        self.last = nn.Linear(hidden, width, bias=False)
        self.frequency = nn.Parameter(torch.full((hidden,), 10.0))
        fade = torch.linspace(-math.log(0.01) / 1.5, -math.log(0.01) / 0.3, width)
        self.register_buffer("fade", fade, persistent=False)

    def forward(self, length: int) -> Tensor:
        """The first `length` lags: (d,length) fp32, whatever the weights' dtype."""
        # In half precision neighbouring lags of a long document would be one time.
        with torch.autocast(self.fade.device.type, enabled=False):
            time = torch.arange(length, device=self.fade.device, dtype=torch.float32) / self.length
            turn = 2 * math.pi * time[:, None] * torch.tensor([1e-4, 1.0], device=time.device)
            x = torch.cat([time[:, None], turn.cos(), -turn.sin()], 1)
            for layer in (self.first, *self.inner):
                x = F.linear(x, layer.weight.float(), layer.bias.float())
                x = torch.sin(self.frequency.float() * x)
            x = F.linear(x, self.last.weight.float())
            faded = x * torch.exp(-time[:, None] * self.fade.float())
            return faded.T * self.length**-0.5


class LongConv(nn.Module):
    """A long convolution with implicit filters and a weight per channel for the input itself.

    Args:
        length: the most tokens; filters are functions of lag / length.
        causal: without the filter that looks ahead.
    """

    def __init__(self, width: int, length: int, hidden: int = 128, *, causal: bool = False):
        super().__init__()
        self.ahead = Filter(width, length, hidden)
        self.behind = None if causal else Filter(width, length, hidden)
        self.skip = nn.Parameter(torch.randn(width))

    def forward(self, u: Tensor) -> Tensor:
        """(B,d,L) -> (B,d,L)."""
        n = u.shape[-1]
        behind = None if self.behind is None else self.behind(n)
        return long_convolve(u, self.ahead(n), behind) + self.skip[:, None] * u


class LongMixer(nn.Module):
    """Monarch Mixer's sequence mixer: gated long convolution, and another one beside it.

    Args:
        length: the most tokens.
        hidden: of the filters' networks.
        causal: position t depends on positions up to t alone.
    """

    def __init__(self, width: int, length: int, hidden: int = 128, *, causal: bool = False):
        super().__init__()
        self.length = length
        self.enter = nn.Linear(width, 3 * width)
        self.short = nn.Conv1d(3 * width, 3 * width, 3, padding=2, groups=3 * width)
        self.gated = LongConv(width, length, hidden, causal=causal)
        self.beside = LongConv(width, length, hidden, causal=causal)
        self.leave = nn.Linear(width, width)

    def forward(self, u: Tensor, valid: Tensor | None = None) -> Tensor:
        """Mix along the sequence: u (B,L,d), valid (B,L) bool, False for padding -> (B,L,d).

        Raises:
            UsageError: L is more than the filters' length.
        """
        n = u.shape[1]
        if n > self.length:
            raise UsageError(
                f"{n} tokens are more than the {self.length} that the filters reach; cut the "
                "input, or extend the model"
            )
        first, second, value = self.short(self.enter(u).mT)[..., :n].chunk(3, 1)
        inner, plain = value * first, u.mT
        if valid is not None:
            inner, plain = inner * valid[:, None], plain * valid[:, None]
        return self.leave((self.gated(inner) * second + self.beside(plain)).mT)


def mixer_parameters(width: int, hidden: int = 128, *, causal: bool = False) -> int:
    """How many numbers a `LongMixer` is."""
    written = FEATURES * hidden + 2 * hidden * hidden + 3 * hidden + hidden + hidden * width
    filters = 2 * written * (1 if causal else 2) + 2 * width
    return 3 * width * width + 3 * width + 4 * 3 * width + width * width + width + filters
