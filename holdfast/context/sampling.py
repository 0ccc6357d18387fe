"""Choosing the next token: greedy, or at a temperature from the likeliest tokens."""

import math

import torch
from torch import Tensor

from holdfast.errors import UsageError


class Sampler:
    """Draws tokens; equal seeds draw equal tokens, whoever else is served at the time.

    Args:
        temperature: 0 takes the likeliest token, 1 the model's own distribution.
        top_p: draws from the fewest tokens that hold this much probability.
        seed: of the draws; None is a new one every time.
    """

    def __init__(self, temperature: float = 1.0, top_p: float = 1.0, seed: int | None = None):
        if not math.isfinite(temperature) or not 0 <= temperature <= 2:
            raise UsageError(f"temperature={temperature} is outside [0, 2]; 0 is greedy")
        if not math.isfinite(top_p) or not 0 < top_p <= 1:
            raise UsageError(f"top_p={top_p} is outside (0, 1]; 1 draws from all tokens")
        self.temperature, self.top_p = temperature, top_p
        # A generator on the CPU draws the same numbers for every device.
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed % 2**63)

    def __call__(self, logits: Tensor) -> Tensor:
        """logits (B,V) -> ids (B,) int64."""
        if self.temperature == 0:
            return logits.argmax(-1)
        p = (logits.float() / self.temperature).softmax(-1)
        dice = torch.rand(len(p), 1, generator=self._generator).to(p.device)
        p, order = p.sort(dim=-1, descending=True, stable=True)
        before = p.cumsum(-1) - p
        p = p.masked_fill(before >= self.top_p, 0)
        total = p.cumsum(-1)
        # Rounding may leave a draw above all sums; the last token with any probability is meant.
        last = (p > 0).sum(-1, keepdim=True) - 1
        chosen = torch.searchsorted(total, dice * total[:, -1:], right=True).clamp(max=last)
        return order.gather(-1, chosen)[:, 0]
