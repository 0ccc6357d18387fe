"""Informer (092): forecasts of several series in one pass, with attention of few queries.

Keeps    in each encoder layer half the length of the layer before; attention of factor*ceil(ln n)
         queries (`probsparse.py`).
Form     in the dtype of the parameters.
Bytes    what the E layers of an encoder read adds up to less than 2*n + E tokens, and nothing is
         n x n: a step of training takes O(n log n).
Source   Zhou, Zhang, Peng, Zhang, Li, Xiong, Zhang, "Informer: Beyond Efficient Transformer for
         Long Sequence Time-Series Forecasting", AAAI 2021. No code was read.
Departs  as in `probsparse.py`. In training the sample of keys follows torch's random state; in
         evaluation it is the same in every call.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.context.attention.probsparse import probsparse_attention, step_seed
from holdfast.context.kernels import attention_with_lse
from holdfast.context.masks import Causal
from holdfast.errors import UsageError


class InformerForecaster(nn.Module):
    """Forecasts `pred_len` steps of several series in one pass.

    Args:
        columns: series, in and out.
        marks: time features of each step, for example hour of day and day of week.
        seq_len: known steps that the encoder reads.
        label_len: the last of them, which the decoder reads as well.
        pred_len: steps to forecast.
        stacks: encoders, by their layers; the i-th reads the last `seq_len // 2**i` steps, and
            layers halve what they pass on. (3, 2, 1) is the paper's pyramid.
        factor: of `probsparse_attention`.
        attention: "full" puts exact attention in its place, for comparison.

    Raises:
        UsageError: lengths or sizes that do not go together.
    """

    def __init__(
        self,
        columns: int,
        marks: int,
        *,
        seq_len: int = 96,
        label_len: int = 48,
        pred_len: int = 24,
        d_model: int = 512,
        heads: int = 8,
        stacks: Sequence[int] = (2,),
        decoder_layers: int = 1,
        d_ff: int = 2048,
        dropout: float = 0.05,
        factor: int = 5,
        attention: Literal["prob", "full"] = "prob",
    ):
        super().__init__()
        if not 0 <= label_len <= seq_len or min(pred_len, columns, marks) < 1:
            raise UsageError(
                f"label_len={label_len}, seq_len={seq_len}, pred_len={pred_len}, "
                f"columns={columns}, marks={marks}: the decoder reads the last label_len of "
                "seq_len known steps, and the others must be 1 or more"
            )
        if d_model % heads or d_model % 2:
            raise UsageError(f"d_model={d_model} must be even and a multiple of heads={heads}")
        if not stacks or min(stacks) < 1 or seq_len >> (len(stacks) - 1) < 1:
            raise UsageError(
                f"stacks={tuple(stacks)} of {seq_len} steps: each needs a layer and a step to read"
            )
        if attention not in ("prob", "full"):
            raise UsageError(f"attention={attention!r}; use 'prob' or 'full'")
        self.columns, self.marks = columns, marks
        self.seq_len, self.label_len, self.pred_len = seq_len, label_len, pred_len
        self.stacks = tuple(stacks)
        sparse = factor if attention == "prob" else None
        sizes = (d_model, heads, d_ff, dropout, sparse)
        longest = max(seq_len, label_len + pred_len)
        self.past = _Embedding(columns, marks, d_model, longest, dropout)
        self.future = _Embedding(columns, marks, d_model, longest, dropout)
        self.encoders = nn.ModuleList(_Encoder(layers, *sizes) for layers in stacks)
        self.decoder = nn.ModuleList(_Layer(*sizes, decoder=True) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(d_model)
        self.out = nn.Linear(d_model, columns)

    def forward(self, past: Tensor, past_marks: Tensor, future_marks: Tensor) -> Tensor:
        """past (B,seq_len,columns) and the time features of both parts -> (B,pred_len,columns).

        Raises:
            UsageError: other shapes.
        """
        given = past.shape[1:], past_marks.shape[1:], future_marks.shape[1:]
        steps = (
            (self.seq_len, self.columns),
            (self.seq_len, self.marks),
            (self.pred_len, self.marks),
        )
        if given != steps:
            raise UsageError(
                f"past, past_marks, future_marks are {', '.join(str(tuple(s)) for s in given)} per "
                f"row; expected {', '.join(map(str, steps))}"
            )
        x = self.past(past, past_marks)
        memory = torch.cat(
            [stack(x[:, -(self.seq_len >> i) :]) for i, stack in enumerate(self.encoders)], 1
        )
        label = slice(self.seq_len - self.label_len, None)
        known = F.pad(past[:, label], (0, 0, 0, self.pred_len))
        y = self.future(known, torch.cat([past_marks[:, label], future_marks], 1))
        for layer in self.decoder:
            y = layer(y, memory)
        return self.out(self.norm(y[:, -self.pred_len :]))


class _Embedding(nn.Module):
    """Values, places and time features -> (B,n,d_model)."""

    places: Tensor

    def __init__(self, columns: int, marks: int, d_model: int, longest: int, dropout: float):
        super().__init__()
        self.values = nn.Conv1d(columns, d_model, 3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.values.weight, mode="fan_in", nonlinearity="leaky_relu")
        self.time = nn.Linear(marks, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)
        rates = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
        angles = torch.arange(longest)[:, None] * rates
        places = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
        self.register_buffer("places", places, persistent=False)

    def forward(self, x: Tensor, marks: Tensor) -> Tensor:
        values = self.values(x.mT).mT
        return self.dropout(values + self.places[: x.shape[1]] + self.time(marks))


class _Attention(nn.Module):
    def __init__(self, d_model: int, heads: int, factor: int | None, causal: bool = False):
        super().__init__()
        self.heads, self.factor, self.causal = heads, factor, causal
        self.q, self.k, self.v, self.o = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        q, k, v = (
            linear(t).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear, t in ((self.q, x), (self.k, source), (self.v, source))
        )
        if self.factor is None:
            out, _ = attention_with_lse(q, k, v, mask=Causal() if self.causal else None)
        else:
            out = probsparse_attention(
                q, k, v, factor=self.factor, causal=self.causal, seed=step_seed(self)
            )
        return self.o(out.transpose(1, 2).flatten(2))


class _Layer(nn.Module):
    """One layer of the encoder, or of the decoder, which also reads what the encoder made."""

    def __init__(
        self, d_model: int, heads: int, d_ff: int, dropout: float, factor: int | None,
        *, decoder: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.own = _Attention(d_model, heads, factor, causal=decoder)
        self.cross = _Attention(d_model, heads, None) if decoder else None
        self.feed = nn.Sequential(
            nn.Linear(d_model, d_ff), nn.GELU(), nn.Dropout(dropout), nn.Linear(d_ff, d_model)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(3 if decoder else 2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.norms[0](x + self.dropout(self.own(x, x)))
        if self.cross is not None:
            x = self.norms[1](x + self.dropout(self.cross(x, memory)))
        return self.norms[-1](x + self.dropout(self.feed(x)))


class _Encoder(nn.Module):
    """Layers with a distilling step between each two, which halves the length."""

    def __init__(
        self, layers: int, d_model: int, heads: int, d_ff: int, dropout: float, factor: int | None
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            _Layer(d_model, heads, d_ff, dropout, factor) for _ in range(layers)
        )
        self.distil = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(d_model, d_model, 3, padding=1, padding_mode="circular"),
                nn.BatchNorm1d(d_model),
                nn.ELU(),
                nn.MaxPool1d(3, stride=2, padding=1),
            )
            for _ in range(layers - 1)
        )
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.distil):
                x = self.distil[i](x.mT).mT
        return self.norm(x)
