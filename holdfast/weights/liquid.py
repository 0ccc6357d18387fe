"""Zero-shot liquid state machine (017): a random spiking encoder that is a seed; projections train.

Keeps    of the liquid its seeds, and while it runs membranes, spikes and readouts, constant in
         time; of the head two linear maps.
Form     seeds int64; state in the liquid's dtype; conductances lognormal, made anew for each call.
Bytes    16 for a liquid's two seeds, b*B*3*n of state, 4*(n1 + n2)*p for the head. While a call
         runs it holds n*(n_in + n) weights, and with read noise as many deviations.
Source   Lin, Wang, Li, et al., "Resistive memory-based zero-shot liquid state machine for
         multimodal event data learning", arXiv 2307.00771, 2023. No code was read; sizes and
         constants are chosen here.
Departs  conductances are simulated: two lognormal ones per weight, with fresh Gaussian noise at
         every read.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import UsageError
from holdfast.weights.seeded import SeededLinear, hashed, normal


class LiquidState(NamedTuple):
    """Membranes, spikes and readouts, each (B,n)."""

    membrane: Tensor
    spikes: Tensor
    readout: Tensor


class ConductancePairs(SeededLinear):
    """Weights as differences of two lognormal conductances.

    Args:
        spread: sigma of a conductance's logarithm.
        sparsity: share of the weights that are 0.
        scale: standard deviation of the weights, zeros included.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        seed: int,
        *,
        scale: float,
        spread: float = 0.5,
        sparsity: float = 0.0,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, seed, scale=scale, dtype=dtype)
        self.spread, self.sparsity = spread, sparsity
        variance = 2 * math.exp(spread**2) * math.expm1(spread**2)
        self.unit = scale / math.sqrt(variance * (1 - sparsity))

    def pair(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The positive and the negative conductance of rows `start` to `stop`."""
        n, seed = self.in_features, int(self.seed)
        there = None
        if self.sparsity:
            bits = hashed(seed, torch.arange(start * n, stop * n, device=device), 2)
            there = (bits >> 11) & (2**53 - 1) >= int(self.sparsity * 2**53)
        found = []
        for stream in (0, 1):
            numbers = normal(seed, start * n, stop * n, stream, device).double()
            # Rounded from fp64, so that the last bits of a device's exp do not show.
            conductance = (self.unit * (self.spread * numbers).exp()).to(self.dtype)
            found.append((conductance if there is None else conductance * there).view(-1, n))
        return found[0], found[1]

    def rows(self, start: int, stop: int, device: torch.device) -> Tensor:
        positive, negative = self.pair(start, stop, device)
        return positive - negative


class LiquidStateMachine(nn.Module):
    """Leaky integrate-and-fire neurons with random, fixed weights; nothing in it trains.

    Args:
        n_in: event channels.
        n: neurons.
        seed: of all weights.
        device_noise: standard deviation of a conductance's read noise, relative to it. Noise is
            drawn from torch's default generator in every time step.
        beta, gamma: what a step leaves of membranes and of readouts.
        theta: threshold, which a spike also subtracts.
        spectral: spectral radius of the recurrent weights, in expectation.
        gain: standard deviation of the input weights.
        sparsity: share of recurrent and input weights that are 0.

    Raises:
        UsageError: an argument out of its range.
    """

    def __init__(
        self,
        n_in: int,
        n: int = 256,
        seed: int = 0,
        device_noise: float = 0.0,
        *,
        beta: float = 0.9,
        gamma: float = 0.95,
        theta: float = 1.0,
        spectral: float = 0.9,
        gain: float = 0.1,
        sparsity: float = 0.0,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if theta <= 0:
            raise UsageError(f"theta={theta} makes every neuron fire at rest; use more than 0")
        for name, share in (("beta", beta), ("gamma", gamma), ("sparsity", sparsity)):
            if not 0 <= share < 1:
                raise UsageError(f"{name}={share} is outside [0, 1)")
        if device_noise < 0:
            raise UsageError(f"device_noise={device_noise} is negative; use 0 for none")
        self.n_in, self.n, self.device_noise = n_in, n, device_noise
        self.beta, self.gamma, self.theta = beta, gamma, theta
        self.input = ConductancePairs(n_in, n, 2 * seed, scale=gain, sparsity=sparsity, dtype=dtype)
        # The radius of a large random matrix is its entries' deviation times sqrt(n).
        self.recurrent = ConductancePairs(
            n, n, 2 * seed + 1, scale=spectral / math.sqrt(n), sparsity=sparsity, dtype=dtype
        )

    def start(self, batch: int, device: torch.device | str = "cpu") -> LiquidState:
        """The state at rest."""
        zeros = torch.zeros(3, batch, self.n, dtype=self.input.dtype, device=device)
        return LiquidState(*zeros.unbind())

    @torch.no_grad()
    def forward(
        self, events: Tensor, state: LiquidState | None = None
    ) -> tuple[Tensor, LiquidState]:
        """Run on a stretch of a stream.

        Args:
            events: (B,T,n_in), 0 or 1 (or bool).
            state: what the previous stretch returned; None is rest.

        Returns:
            Features (B,n), which are the readouts, and the state after the stretch.

        Raises:
            UsageError: events of another width, or other than 0 and 1.
        """
        if events.dim() != 3 or events.shape[2] != self.n_in:
            raise UsageError(f"events {tuple(events.shape)}, expected (B, T, {self.n_in})")
        if events.dtype != torch.bool and not ((events == 0) | (events == 1)).all():
            raise UsageError("events must be 0 or 1; threshold what is analog into events first")
        state = self.start(len(events), events.device) if state is None else state
        membrane, spikes, readout = state
        reads = [
            Read(part, self.device_noise, events.device) for part in (self.input, self.recurrent)
        ]
        for t in range(events.shape[1]):
            drive = F.linear(events[:, t].to(membrane.dtype), reads[0]())
            drive += F.linear(spikes, reads[1]())
            membrane = self.beta * membrane + drive - self.theta * spikes
            spikes = (membrane > self.theta).to(membrane.dtype)
            readout = self.gamma * readout + spikes
        return readout, LiquidState(membrane, spikes, readout)

    @torch.no_grad()
    def firing_rate(self, events: Tensor) -> float:
        """Share of neurons that fire in a step, from rest; 0.05 to 0.2 is a liquid that works."""
        state, total = self.start(len(events), events.device), 0.0
        for t in range(events.shape[1]):
            _, state = self(events[:, t : t + 1], state)
            total += state.spikes.float().mean().item()
        return total / events.shape[1]


class Read:
    """A weight as it is read: with fresh noise each time, or as it is."""

    def __init__(self, linear: ConductancePairs, noise: float, device: torch.device):
        positive, negative = linear.pair(0, linear.out_features, device)
        self.weight = positive - negative
        # Two independent noises of a pair add to one of this deviation.
        self.deviation = noise * torch.hypot(positive, negative) if noise else None

    def __call__(self) -> Tensor:
        if self.deviation is None:
            return self.weight
        return torch.addcmul(self.weight, self.deviation, torch.randn_like(self.weight))


class ContrastiveHead(nn.Module):
    """Linear projections of two modalities' features to one space: all that trains.

    Args:
        n_first, n_second: widths of the features.
        p: width of the shared space.
        temperature: of the contrast.
    """

    def __init__(self, n_first: int, n_second: int, p: int = 64, temperature: float = 0.07):
        super().__init__()
        self.first = nn.Linear(n_first, p, bias=False)
        self.second = nn.Linear(n_second, p, bias=False)
        self.temperature = temperature

    def embed(self, features: Tensor, modality: str) -> Tensor:
        """Unit vectors (B,p) of features (B,n) of modality `first` or `second`."""
        return F.normalize(self.get_submodule(modality)(features), dim=-1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Symmetric InfoNCE of pairs (B,n_first), (B,n_second): each row's partner among all."""
        logits = self.embed(first, "first") @ self.embed(second, "second").mT / self.temperature
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2

    @torch.no_grad()
    def classify(self, first: Tensor, second: Tensor, labels: Tensor) -> Tensor:
        """Labels (B,) of first-modality features, unseen ones too: of each the class whose
        second-modality examples `second` (m,n_second) with `labels` (m,) are nearest on average."""
        classes = labels.unique()
        examples = self.embed(second, "second")
        centres = torch.stack([examples[labels == c].mean(0) for c in classes])
        return classes[(self.embed(first, "first") @ F.normalize(centres, dim=1).mT).argmax(1)]


def saccade_events(
    images: Tensor, steps: int = 30, travel: int = 3, threshold: float = 0.1
) -> Tensor:
    """What an event camera sees while images move right, then down: ON and OFF events.

    A pixel fires when its brightness has moved by `threshold` since it last fired.

    Args:
        images: (B,H,W) in [0, 1].
        steps: time steps of both saccades together.
        travel: pixels of each saccade.

    Returns:
        (B,steps,2*(H+travel)*(W+travel)) bool, ON before OFF.
    """
    half = steps // 2
    along = torch.linspace(0, travel, half + 1)[1:].tolist()
    path = [(0.0, x) for x in along]
    path += [(y, float(travel)) for y in torch.linspace(0, travel, steps - half + 1)[1:].tolist()]
    canvas = F.pad(images, (0, travel, 0, travel))
    seen, events = canvas, []
    for down, right in path:
        now = _moved(_moved(canvas, right, 2), down, 1)
        on, off = now - seen > threshold, seen - now > threshold
        seen = torch.where(on | off, now, seen)
        events.append(torch.stack([on, off], 1).flatten(1))
    return torch.stack(events, 1)


def _moved(images: Tensor, by: float, dim: int) -> Tensor:
    """Shift by a fraction of pixels; what leaves must be empty."""
    whole, part = int(by), by - int(by)
    here = images.roll(whole, dim)
    return torch.lerp(here, here.roll(1, dim), part)


def scanline_spikes(images: Tensor, steps: int = 64) -> Tensor:
    """Images read by one line of sensors, row by row, then column by column.

    Args:
        images: (B,H,H) in [0, 1].
        steps: in all; a row or column gets steps // (2*H) of them, in which each of its pixels
            fires the more often the brighter it is.

    Returns:
        (B,2*H*(steps//(2*H)),H) bool.

    Raises:
        UsageError: images that are not square, or fewer steps than rows and columns.
    """
    _, height, width = images.shape
    each = steps // (2 * height)
    if height != width or not each:
        raise UsageError(
            f"{steps} steps for images of {height} x {width}; use square images and at least one "
            f"step for each row and column, {height + width} or more"
        )
    levels = (torch.arange(each, device=images.device) + 0.5) / each
    lines = torch.cat([images, images.mT], 1)
    return (lines[:, :, None] > levels[:, None]).flatten(1, 2)
