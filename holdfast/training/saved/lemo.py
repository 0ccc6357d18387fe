"""LeMo (087, Jenga): in each layer, only the informative blocks of tokens take part in training.

Keeps    of a layer's activations, those of the kept tokens; dropped ones pass through the residual
         and are neither computed nor saved. Per layer, frozen predictors of informativeness.
Form     that of the model; positions of the kept tokens as int64; predictors in the model's dtype.
Bytes    per layer, those of its activations at `kept` instead of n tokens, 8 * B * kept for the
         positions, and where these rotate 2 * B * kept cosines and sines of a head's width;
         kept = block * max(1, round(keep * floor(n / block))) + n mod block. Predictors:
         2 * (d*r + 2*r*r) elements a layer. Logits of one segment instead of all.
Source   "LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning", 2025 (Jenga).
Departs  one set of tokens serves a layer's attention and its MLP, by the attention test, so that
         no layer has to be taken apart (by its activations the MLP of a small model ranked filler
         above text); a block's score is the mean over the queries that see it, because a sum ranks
         blocks by position; predictors read the input of their own layer, not the embeddings, per
         token, and pool behind the second ReLU; a ragged last block always stays.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from holdfast import attach
from holdfast.errors import UsageError
from holdfast.plan.method import Method, Quality
from holdfast.training.loss import chunked_cross_entropy
from holdfast.training.saved.block_scores import Predictor, Trainer, Watch, column_means

BLOCK, RANK = 64, 32


def segmented_cross_entropy(h: Tensor, head: nn.Module, labels: Tensor, segments: int) -> Tensor:
    """Mean cross-entropy of `head(h)` against `labels`; logits exist for one segment at a time.

    Args:
        h: (..., d) hidden states.
        head: a linear with `weight` (V, d) and maybe a `bias`.
        labels: (...,) int64, already shifted to what each position predicts; -100 is not counted.
        segments: pieces of equal length; the last one is shorter where they do not divide.

    Returns:
        A scalar in fp32.

    Raises:
        UsageError: shapes that do not match, or segments outside 1 to the number of tokens.
    """
    if h.shape[:-1] != labels.shape:
        raise UsageError(
            f"h is {tuple(h.shape)}, labels are {tuple(labels.shape)}; expected one label for each "
            "hidden state, shifted by the caller"
        )
    if not 1 <= segments <= labels.numel():
        raise UsageError(f"segments={segments} is outside 1 to {labels.numel()} tokens")
    chunk = -(-labels.numel() // segments)
    weight, bias = head.get_parameter("weight"), getattr(head, "bias", None)
    flat = h.reshape(-1, h.shape[-1])
    return chunked_cross_entropy(flat, weight, labels.reshape(-1), chunk=chunk, bias=bias)


class LeMo:
    """Makes every block of a decoder train on its informative tokens alone, in place.

    Dropping happens in training mode where gradients are wanted; in evaluation and under `no_grad`
    the model is the plain one. A key-value cache that the model makes while training stays empty.

    Args:
        model: a decoder with one stack of blocks that attend by `scaled_dot_product_attention`.
        block: tokens that stay or go together.
        keep: share of the blocks that stays, the best by score; None keeps those whose score
            reaches the layer's threshold, in a batch as many in each row as in the row with most.
        predictors: one per layer, called with a layer's input (B,n,d) and `block`, returns the
            scores (B,m) of the m whole blocks: `new_predictors(model)`, then `fit`. None computes
            exact scores by one more forward pass of each layer without gradients.

    Raises:
        UsageError: no such stack, a bad `block` or `keep`, or another number of predictors.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        block: int = 64,
        keep: float | None = None,
        predictors: Sequence[Callable[[Tensor, int], Tensor]] | None = None,
    ):
        if block < 1:
            raise UsageError(f"block={block} holds no token; use 1 or more, for example 64")
        if keep is not None and not 0 < keep <= 1:
            raise UsageError(f"keep={keep} is outside (0, 1]; it is the share of blocks that stays")
        if "_holdfast_lemo" in model.__dict__:
            raise UsageError(f"{type(model).__name__} has a LeMo already; remove() it first")
        layers = decoder_blocks(model)
        if predictors is not None and len(predictors) != len(layers):
            raise UsageError(
                f"{len(predictors)} predictors for {len(layers)} layers; give one each"
            )
        self.model, self.blocks, self.block, self.keep = model, layers, block, keep
        self.predictors = None if predictors is None else list(predictors)
        # In units of a layer's mean score, where thresholds start.
        self.thresholds = [1.0] * len(layers)
        self._always = False
        self._see: Callable[[int, Tensor, Tensor], None] | None = None
        self._handle = attach.Handle()
        for i, layer in enumerate(layers):
            scorer = None if predictors is None else predictors[i]
            if isinstance(scorer, nn.Module):
                self._handle += attach.add(layer, "lemo_predictor", scorer)
            self._handle += attach.wrap(layer, _Layer(self, layer, i))
        model.__dict__["_holdfast_lemo"] = self

    def remove(self) -> None:
        """Make the model what it was."""
        self._handle.remove()
        del self.model.__dict__["_holdfast_lemo"]

    def fit(self, batches: Sequence[Mapping[str, Any]], *, rounds: int = 8, seed: int = 0) -> None:
        """Train the predictors on the exact scores of the model as it is; its weights stay.

        Args:
            batches: keyword arguments of the model, of `block` tokens a row or more; each is run
                `rounds` times without gradients, in evaluation mode.

        Raises:
            UsageError: predictors are no `Predictor`s, no batch, or one with rows below a block.
        """
        predictors = [p for p in self.predictors or () if isinstance(p, Predictor)]
        if len(predictors) < len(self.blocks) or not batches:
            raise UsageError(
                "fit needs batches and predictors that can be trained; "
                "make LeMo with predictors=new_predictors(model)"
            )
        generator = torch.Generator().manual_seed(seed)
        steps = rounds * len(batches)
        trainers = [Trainer(p, steps, generator) for p in predictors]
        for _ in range(rounds):
            for batch in batches:
                self.exact(batch, lambda i, x, pairs: trainers[i].step(x, pairs, self.block))
        with torch.no_grad():
            for trainer in trainers:
                trainer.finish()

    @torch.no_grad()
    def exact(self, batch: Mapping[str, Any], see: Callable[[int, Tensor, Tensor], None]) -> None:
        """Run the plain model on a batch; `see` gets each layer's number, its input (B,n,d) and the
        exact pair scores (B,m,m), relative to their mean."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        self._see = see
        try:
            self.model(**batch)
        finally:
            self._see = None
            for module in training:
                module.training = True

    def refine(self, quality: Callable[[], float], *, rate: float = 1.0, step: float = 0.1) -> None:
        """Move each layer's threshold along the central difference of `quality`, once.

        Args:
            quality: () -> how good the model is on data of the caller's, higher is better, for
                example accuracy or minus the loss; tokens are dropped in it also without gradients.
            rate: change of a threshold per slope of the quality.
            step: half the distance of the two measurements, in units of the layer's mean score.
        """
        if self.keep is not None:
            raise UsageError("keep fixes the share of blocks; thresholds need keep=None")
        self._always = True
        try:
            for i, here in enumerate(self.thresholds):
                self.thresholds[i] = here + step
                above = quality()
                self.thresholds[i] = here - step
                below = quality()
                self.thresholds[i] = here + rate * (above - below) / (2 * step)
        finally:
            self._always = False

    def choose(self, scores: Tensor, n: int, layer: int) -> Tensor:
        """Positions that stay: scores (B,m) of the whole blocks -> (B,kept) int64, ascending."""
        rows, m = scores.shape
        if self.keep is not None:
            count = max(1, round(self.keep * m))
        else:
            count = int((scores >= self.thresholds[layer]).sum(1).max())
        # topk leaves ties to the device; a stable sort keeps runs equal.
        order = scores.argsort(dim=1, descending=True, stable=True)
        chosen = order[:, :count].sort(1).values
        if count == 0 and n == m * self.block:
            chosen = torch.full_like(order[:, :1], m - 1)
        within = torch.arange(self.block, device=scores.device)
        positions = (chosen[:, :, None] * self.block + within).flatten(1)
        tail = torch.arange(m * self.block, n, device=scores.device).expand(rows, -1)
        return torch.cat([positions, tail], 1)


class _Layer:
    """What runs instead of a block's forward."""

    def __init__(self, lemo: LeMo, layer: nn.Module, index: int):
        self.lemo, self.layer, self.index = lemo, layer, index

    def __call__(self, forward, x: Tensor, *args, **kwargs):
        lemo, n = self.lemo, x.shape[1]
        if lemo._see is not None:
            if n < lemo.block:
                raise UsageError(f"rows of {n} tokens have no block of {lemo.block} to score")
            with Watch(lemo.block) as watch:
                out = forward(x, *args, **kwargs)
            lemo._see(self.index, x, watch.pairs)
            return out
        wanted = lemo._always or (self.layer.training and torch.is_grad_enabled())
        if not wanted or n < lemo.block:
            return forward(x, *args, **kwargs)
        with torch.no_grad():
            if lemo.predictors is not None:
                scores = lemo.predictors[self.index](x, lemo.block)
            else:
                with Watch(lemo.block) as watch:
                    forward(x, *(_uncached(a) for a in args), **_uncached(kwargs))
                scores = column_means(watch.pairs)
            at = lemo.choose(scores, n, self.index)
        # One flat index serves the gather and the scatter, and is saved once.
        flat = (at + torch.arange(len(x), device=x.device)[:, None] * n).flatten()
        kept = x.flatten(0, 1).index_select(0, flat).view(*at.shape, -1)
        given = _gathered((args, kwargs), at, n)
        out = forward(kept, *given[0], **given[1])
        y = out[0] if isinstance(out, tuple) else out
        # Unlike index_copy, this does not keep y for backward.
        full = x.flatten(0, 1).index_put((flat,), y.flatten(0, 1)).view_as(x)
        return (full, *out[1:]) if isinstance(out, tuple) else full


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The one stack of blocks of a decoder.

    Raises:
        UsageError: the model has several stacks, or none.
    """
    stacks = attach.blocks(model)
    if len(stacks) != 1:
        raise UsageError(
            f"{type(model).__name__} has {len(stacks)} stacks of blocks; LeMo wraps a decoder's one"
        )
    return list(stacks[0][1])


def new_predictors(model: nn.Module, rank: int = RANK) -> list[Predictor]:
    """An untrained predictor for each block of a decoder, on the device and in the dtype of it."""
    found = []
    for layer in decoder_blocks(model):
        like = next(p for p in layer.parameters() if p.is_floating_point())
        found.append(Predictor(model.config.hidden_size, rank, like))
    return found


def _uncached(value: Any) -> Any:
    """Without the cache, which a pass that only scores must not fill."""
    if isinstance(value, Mapping):
        return {name: _uncached(part) for name, part in value.items()}
    return None if isinstance(value, Cache) else value


def _gathered(value: Any, at: Tensor, n: int) -> Any:
    """The positions `at` (B,kept) of whatever a block is given for each of n positions."""
    if isinstance(value, Mapping):
        return {name: _gathered(part, at, n) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_gathered(part, at, n) for part in value)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return _uncached(value)
    batch, shape = len(at), value.shape
    if value.dim() == 4 and shape[-2:] == (n, n):
        value = value.expand(batch, -1, -1, -1)
        picked = value.gather(2, at[:, None, :, None].expand(-1, shape[1], -1, n))
        return picked.gather(3, at[:, None, None, :].expand(-1, shape[1], at.shape[1], -1))
    if value.dim() > 1 and shape[1] == n and shape[0] in (1, batch):
        rows = torch.arange(batch, device=at.device)[:, None]
        return value.expand(batch, *shape[1:])[rows, at]
    raise UsageError(
        f"a block of this model is given a tensor of shape {tuple(shape)} beside its hidden states,"
        f" which does not follow its {n} positions; LeMo cannot gather that"
    )


def _applies(model: nn.Module, keep: float = 0.5) -> str | None:
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return "tokens are scored by those that come after them, so only causal language models do"
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return "scores are read from scaled_dot_product_attention, which this model does not call"
    if len(attach.blocks(model)) != 1:
        return "the model has more than one stack of blocks"
    return None


def _apply(model: nn.Module, *, keep: float) -> nn.Module:
    LeMo(model, block=BLOCK, keep=keep, predictors=new_predictors(model))
    return model


def _calibrate(model: nn.Module, batches: Sequence[Mapping[str, Any]], *, keep: float) -> None:
    long = [batch for batch in batches if batch["input_ids"].shape[1] >= BLOCK]
    if long:  # on shorter sequences every token stays
        model.__dict__["_holdfast_lemo"].fit(long)


METHOD = Method(
    key="lemo",
    slot="saved",
    writes={("activations", "extent"): "of each layer, the most informative blocks of 64 tokens"},
    apply=_apply,
    calibrate=_calibrate,
    knobs={"keep": (0.5, 0.75, 0.25)},
    quality=lambda keep=0.5: Quality("lossy", 0.02 if keep >= 0.5 else 0.1, "holdfast check lemo"),
    applies=_applies,
    automatic=False,
)
