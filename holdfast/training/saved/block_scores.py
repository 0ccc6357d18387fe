"""How informative each block of tokens is to a decoder's layer: exact, or predicted from its input.

A block matters as much as the queries after it look at it, before softmax. Exact scores are read
off the attention as it runs; predictors are small frozen networks, trained on exact scores.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from holdfast.errors import UsageError

Weights = dict[str, Tensor]
LR = 3e-3


def pair_scores(query: Tensor, key: Tensor, block: int) -> Tensor:
    """How much query blocks look at key blocks, before softmax.

    query (B,Hq,n,d), key (B,H,n,d) with H dividing Hq -> (B,m,m) fp32, m = floor(n / block): the
    largest cell of each pair of blocks in the mean over heads of max(q k, 0), among cells whose
    query comes at or after their key.
    """
    heads, n = query.shape[1], query.shape[2] // block * block
    key = key[:, :, :n].repeat_interleave(heads // key.shape[1], 1)
    rows = []
    for start in range(0, n, block):
        seen = start + block
        cells = query[:, :, start:seen] @ key[:, :, :seen].mT
        cells = cells.relu_().float().mean(1).tril_(start)
        largest = cells.unflatten(2, (-1, block)).amax((1, 3))
        rows.append(F.pad(largest, (0, (n - seen) // block)))
    return torch.stack(rows, 1)


def column_means(pairs: Tensor) -> Tensor:
    """Informativeness of key blocks: pairs (B,m,m) -> (B,m), the mean over queries that see it."""
    return pairs.sum(1) / torch.arange(pairs.shape[1], 0, -1, device=pairs.device)


def _relative(pairs: Tensor) -> Tensor:
    """Pair scores (B,m,m) in units of the mean over the pairs in which a query sees a key."""
    m = pairs.shape[1]
    mean = pairs.sum((1, 2), keepdim=True) / (m * (m + 1) // 2)
    return pairs / mean.clamp(min=1e-20)


class Watch(TorchFunctionMode):
    """Scores the self-attention of the one block that runs inside, as it goes by."""

    def __init__(self, block: int):
        super().__init__()
        self.block = block
        self.found: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.found is None:
            if not kwargs.get("is_causal") and kwargs.get("attn_mask") is None:
                raise UsageError(
                    "attention without a causal mask; LeMo scores tokens by the queries after them,"
                    " so wrap a decoder"
                )
            self.found = pair_scores(args[0], args[1], self.block)
        return func(*args, **kwargs)

    @property
    def pairs(self) -> Tensor:
        """Pair scores (B,m,m), relative to their mean."""
        if self.found is None:
            raise UsageError(
                "the block never called scaled_dot_product_attention with named options; load the "
                "model with attn_implementation='sdpa'"
            )
        return _relative(self.found)


def predicted_pairs(weights: Weights, x: Tensor, block: int) -> Tensor:
    """Pair scores from a layer's input: x (B,n,d) -> (B,m,m), 0 where a query sees no key.

    Per token (x / |x|) W0, ReLU, W1, ReLU; then the largest of each block, and W2, for queries and
    for keys; a pair is one plus the product of both.
    """
    n = x.shape[1] // block * block
    x = x[:, :n]
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    sides = []
    for side in "qk":
        first = (x @ weights[f"{side}0"]).div_(length.clamp(min=1e-6)).relu()
        second = (first @ weights[f"{side}1"]).relu()
        sides.append(second.unflatten(1, (-1, block)).amax(2) @ weights[f"{side}2"])
    product = sides[0] @ sides[1].mT
    return (1 + product / sides[0].shape[-1] ** 0.5).tril()


class Predictor(nn.Module):
    """Scores the blocks of one layer's input with frozen low-rank matrices; see `predicted_pairs`.

    Args:
        width: d.
        rank: r, after pruning.
        like: a tensor whose dtype and device the matrices take.
    """

    def __init__(self, width: int, rank: int, like: Tensor):
        super().__init__()
        self.width, self.rank = width, rank
        for name, rows in _shapes(width, rank):
            zeros = torch.zeros(rows, rank, dtype=like.dtype, device=like.device)
            # Of no state dict: an exported model is the plain one.
            self.register_buffer(name, zeros, persistent=False)

    def forward(self, x: Tensor, block: int) -> Tensor:
        """x (B,n,d) -> (B,m), about 1 in the mean."""
        return column_means(predicted_pairs(dict(self.named_buffers()), x, block))


def _shapes(width: int, rank: int) -> list[tuple[str, int]]:
    rows = (width, rank, rank)
    return [(f"{side}{i}", rows[i]) for side in "qk" for i in range(3)]


class Trainer:
    """Trains one predictor: twice as wide at first, then without the neurons that rarely fire."""

    def __init__(self, predictor: Predictor, steps: int, generator: torch.Generator):
        self.predictor, self.steps, self.done = predictor, steps, 0
        self.weights: Weights = {}
        for name, rows in _shapes(predictor.width, predictor.rank):
            # The first two matrices of a side are twice as wide, the last two twice as high.
            high = rows * (1 if name[1] == "0" else 2)
            wide = predictor.rank * (1 if name[1] == "2" else 2)
            drawn = torch.randn(high, wide, generator=generator) * (2 / high) ** 0.5
            self.weights[name] = drawn.to(predictor.get_buffer(name).device)
        self._start()

    def _start(self) -> None:
        for weight in self.weights.values():
            weight.requires_grad_()
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=LR)

    def step(self, x: Tensor, pairs: Tensor, block: int) -> None:
        """x (B,n,d) and its exact relative pair scores (B,m,m)."""
        x = x.float()
        for group in self.optimizer.param_groups:
            group["lr"] = LR * (1 - self.done / self.steps)
        with torch.enable_grad():
            guess = predicted_pairs(self.weights, x, block)
            m = pairs.shape[1]
            error = (guess - pairs).square().sum() / (len(pairs) * (m * (m + 1) // 2))
            # The decision is made by columns, whose errors are small beside those of pairs.
            error = error + 30 * (column_means(guess) - column_means(pairs)).square().mean()
            error.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        if self.done == max(1, self.steps // 2):
            self._prune(x)

    @torch.no_grad()
    def _prune(self, x: Tensor) -> None:
        """Keep the half of each side's neurons that fire most often on x."""
        w, rank = self.weights, self.predictor.rank
        for side in "qk":
            for i in (0, 1):
                x_in = x if i == 0 else (x @ w[f"{side}0"]).relu()
                fires = (x_in @ w[f"{side}{i}"] > 0).flatten(0, 1).float().mean(0)
                stay = fires.argsort(descending=True, stable=True)[:rank].sort().values
                w[f"{side}{i}"] = w[f"{side}{i}"][:, stay]
                w[f"{side}{i + 1}"] = w[f"{side}{i + 1}"][stay]
        self.weights = {name: weight.detach().clone() for name, weight in w.items()}
        self._start()

    def finish(self) -> None:
        for name, weight in self.weights.items():
            getattr(self.predictor, name).copy_(weight.detach())
