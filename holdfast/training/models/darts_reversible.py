"""Memory-efficient Transformer DARTS (199): search operations inside a reversible Transformer.

Keeps    the last layer's output of the encoder and of the decoder, and the candidates' activations
         of one function at a time, instead of those of every candidate of every layer.
Form     the dtype of the parameters.
Bytes    saved by a stack of any depth: B*T*d*b, + 32*b per part.
Source   Zhao, Dong, Shen, Zhang, Wei, Chen, "Memory-Efficient Differentiable Transformer
         Architecture Search", Findings of ACL 2021.
Departs  convolutions are full, not separable, and learning rates fall with the inverse square root
         after warm-up, which the paper leaves open; outputs share the factorised embedding; a final
         LayerNorm, because nothing in a reversible stack normalises the sum.

A model of its own, so it has no `METHOD`: searching is not a step of training a given model.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import UsageError, unknown
from holdfast.training.loss import IGNORE
from holdfast.training.models.operations import OPERATIONS, candidate
from holdfast.training.reversible import MultiSplit, ReversibleSequence

PAD = 0
PARTS = {"encoder": 2, "decoder": 3}
POOLS = ("max", "mean")


class Pooled(nn.Module):
    """One operation on the elementwise maximum or mean of the other parts.

    Rounding can flip a tie of the maximum between the forward pass and its recomputation, which
    moves that element's gradient to the other part; the mean has no ties.
    """

    def __init__(self, inputs: int, operation: nn.Module, pool: str = "max"):
        super().__init__()
        if pool not in POOLS:
            raise unknown("pool", pool, POOLS)
        self.inputs, self.pool, self.operation = inputs, pool, operation

    def forward(self, *args: Tensor | None) -> Tensor:
        """`inputs` parts (B,T,c), then the context -> (B,T,c)."""
        parts, context = args[: self.inputs], args[self.inputs :]
        if self.inputs == 1:
            return self.operation(*parts, *context)
        stacked = torch.stack([part for part in parts if part is not None])
        x = stacked.amax(0) if self.pool == "max" else stacked.mean(0)
        return self.operation(x, *context)


class MixedOp(nn.Module):
    """sum_o softmax(alpha)_o * o(x): what a search trains in place of one operation.

    Args:
        candidates: name -> module called with (x, *context).
        alpha: one number per candidate; several layers may share the parameter.
    """

    def __init__(self, candidates: Mapping[str, nn.Module], alpha: nn.Parameter):
        super().__init__()
        if alpha.shape != (len(candidates),):
            raise UsageError(
                f"alpha has shape {tuple(alpha.shape)} for {len(candidates)} candidates; "
                "expected one number each"
            )
        self.candidates, self.alpha = nn.ModuleDict(candidates), alpha

    def forward(self, x: Tensor, *context: Tensor | None) -> Tensor:
        weights = self.alpha.softmax(0)
        mixed = torch.zeros_like(x)
        for weight, operation in zip(weights, self.candidates.values(), strict=True):
            mixed = mixed + weight * operation(x, *context)
        return mixed

    def best(self) -> str:
        """The candidate of the largest weight."""
        return list(self.candidates)[int(self.alpha.argmax())]


@dataclass(frozen=True)
class Architecture:
    """Names of operations: layer -> part -> name; layers repeat, the last decoder part is fixed."""

    encoder: tuple[tuple[str, ...], ...]
    decoder: tuple[tuple[str, ...], ...] = ()


class FactorizedEmbedding(nn.Module):
    """Vocabulary x rank, then rank x width: V*r + r*d parameters instead of V*d, both ways."""

    def __init__(self, vocabulary: int, rank: int, width: int):
        super().__init__()
        self.tokens, self.up = nn.Embedding(vocabulary, rank), nn.Linear(rank, width, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.tokens(ids))

    def logits(self, hidden: Tensor) -> Tensor:
        # Scaled like attention: the sum over the width of unit values has its square root as size.
        return hidden @ self.up.weight @ self.tokens.weight.mT * hidden.shape[-1] ** -0.5


def _positions(like: Tensor) -> Tensor:
    """Sines and cosines for (B,T,d) -> (T,d)."""
    length, width = like.shape[1:]
    rates = torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(1e4) / width))
    angles = torch.arange(length, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width].to(like.dtype)


class DartsTransformer(nn.Module):
    """A reversible Transformer whose functions are mixtures, or those of a found architecture.

    Args:
        width: divisible by 2 parts, with a decoder also by 3, and each part by `heads`.
        rank: of the embedding; the width by default.
        decoder_layers: 0 labels each source token; otherwise a target sequence is generated.
        searched: layers with architecture weights of their own, which further layers repeat; with
            `architecture`, its layers repeat.
        operations: candidates; all by default.
        architecture: builds this one, trained with ordinary backpropagation.

    Raises:
        UsageError: sizes that do not divide, fewer layers than are searched, unknown operations.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int = 480,
        *,
        rank: int | None = None,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        searched: int = 2,
        heads: int = 8,
        dropout: float = 0.1,
        pool: str = "max",
        operations: Sequence[str] = OPERATIONS,
        architecture: Architecture | None = None,
    ):
        super().__init__()
        self.embedding = FactorizedEmbedding(vocabulary, rank or width, width)
        self.searched, self._found = searched, architecture
        self._options = {"heads": heads, "dropout": dropout}
        self._pool, self._operations = pool, operations
        self.encoder = self._stack("encoder", encoder_layers, width)
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = self._stack("decoder", decoder_layers, width) if decoder_layers else None
        self.decoder_norm = nn.LayerNorm(width) if decoder_layers else None

    def _stack(self, side: str, layers: int, width: int) -> ReversibleSequence:
        decoding, parts = side == "decoder", PARTS[side]
        if width % parts:
            raise UsageError(
                f"width {width} does not split into the {parts} parts of the {side}; "
                f"use {width - width % parts + parts}"
            )
        part, free = width // parts, parts - decoding
        options: dict[str, Any] = {**self._options, "causal": decoding}
        options["memory_width"] = width if decoding else None
        names = [name for name in self._operations if decoding or name != "cross_attention"]
        found = getattr(self._found, side) if self._found is not None else None
        if found is not None and (not found or any(len(layer) != free for layer in found)):
            raise UsageError(
                f"the {side} of the architecture is {found}; expected one layer or more with the "
                f"names of {free} operations each"
            )
        if found is None and layers < self.searched:
            raise UsageError(
                f"{layers} layer(s) of the {side} cannot hold {self.searched} searched ones; "
                "use more layers or a smaller `searched`"
            )
        # Layers share architecture weights; the last part of a decoder always reads the encoder.
        alphas = [
            [nn.Parameter(1e-3 * torch.randn(len(names))) for _ in range(free)]
            for _ in range(self.searched)
        ]

        def operation(layer: int, k: int) -> nn.Module:
            if k == free:
                return candidate("cross_attention", part, **options)
            if found is not None:
                return candidate(found[layer % len(found)][k], part, **options)
            made = {name: candidate(name, part, **options) for name in names}
            return MixedOp(made, alphas[layer % self.searched][k])

        blocks = (
            nn.ModuleList(Pooled(parts - 1, operation(i, k), self._pool) for k in range(parts))
            for i in range(layers)
        )
        return ReversibleSequence(blocks, MultiSplit(parts), reversible=found is None)

    def logits(self, source: Tensor, target: Tensor | None = None) -> Tensor:
        """Source (B,S) int64, padded with `PAD`; target (B,T), shifted right -> (B,S or T,V)."""
        mask = source != PAD
        x = self.embedding(source)
        x = self.encoder_norm(self.encoder(x + _positions(x), mask, None))
        if self.decoder is not None and self.decoder_norm is not None:
            y = self.embedding(target)
            x = self.decoder_norm(self.decoder(y + _positions(y), mask, x))
        return self.embedding.logits(x)

    def forward(self, source: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of labels (B,S), or with a decoder (B,T); -100 is not counted."""
        target = None
        if self.decoder is not None:
            target = F.pad(labels[:, :-1].clamp(min=PAD), (1, 0), value=PAD)
        scores = self.logits(source, target)
        return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)

    def architecture(self) -> Architecture:
        """The candidate of the largest weight, everywhere.

        Raises:
            UsageError: the model was built from an architecture.
        """
        if self._found is not None:
            raise UsageError("this model has no mixtures: it was built from an architecture")

        def best(sequence: ReversibleSequence | None) -> tuple[tuple[str, ...], ...]:
            layers: Any = sequence.blocks[: self.searched] if sequence is not None else ()
            return tuple(
                tuple(f.operation.best() for f in layer if isinstance(f.operation, MixedOp))
                for layer in layers
            )

        return Architecture(best(self.encoder), best(self.decoder))


def darts(
    model: DartsTransformer,
    train: Iterable[Sequence[Tensor]],
    val: Iterable[Sequence[Tensor]],
    *,
    lr: float = 5e-4,
    warmup: int = 10_000,
    alpha_lr: float = 3e-4,
    alpha_decay: float = 1e-3,
) -> Architecture:
    """First-order bilevel search: weights follow `train`, architecture weights follow `val`.

    Args:
        train: batches (source, labels) on the model's device; one pass, one step of each kind per
            batch.
        val: batches of other data, repeated as often as needed.
        lr: of the weights, reached after `warmup` steps, then falling with their inverse root.

    Raises:
        UsageError: the model has no mixtures, or `val` has no batches.
    """
    alphas = list(
        {id(m.alpha): m.alpha for m in model.modules() if isinstance(m, MixedOp)}.values()
    )
    if not alphas:
        raise UsageError("the model has no mixtures to search; build it without `architecture`")
    chosen = {id(alpha) for alpha in alphas}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    outer = torch.optim.Adam(alphas, alpha_lr, betas=(0.5, 0.999), weight_decay=alpha_decay)
    inner = torch.optim.Adam(weights, lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        inner, lambda step: min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5)
    )
    model.train()
    model.zero_grad()
    for batch, other in zip(train, _repeated(val), strict=False):
        for optimizer, frozen, data in ((outer, weights, other), (inner, alphas, batch)):
            # A frozen half costs no gradients, neither time nor bytes.
            for parameter in frozen:
                parameter.requires_grad_(False)
            try:
                model(*data).backward()
                optimizer.step()
                optimizer.zero_grad()
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(True)
        schedule.step()
    return model.architecture()


def _repeated(batches: Iterable[Sequence[Tensor]]) -> Iterator[Sequence[Tensor]]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise UsageError("`val` has no more batches; pass a list or a loader, not an iterator")
