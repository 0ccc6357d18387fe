"""Data pruning limits (039): a subset chosen by score teaches another law; calibration repairs it.

Keeps    r*n of n examples, and a loss weight for each.
Form     indices and fp32 weights; examples as they are.
Bytes    r*n*(example + 4).
Source   Ayed, Hayou, "Data pruning and neural scaling laws: fundamental limitations of score-based
         algorithms", TMLR 2023.
Departs  a default for the share that is drawn at random: 0.9 of what is kept.

The hardest (or easiest) r*n examples follow another law than the data, so that more data does not
help the model that learns from them. `prune` keeps a part by score with weight 1 and fills up from
the rest at random with the weight that makes the loss unbiased: the weights sum to n. Pruning is
worth judging at a tenth kept, where scores fail; at 50 to 90 % every score looks good. The score
must come from another model than the one to be trained, and "easiest" can win where n is tiny.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from holdfast.errors import UsageError
from holdfast.training.data import order


class Subset(Sampler[int]):
    """Chosen examples and the weights of their losses; as a sampler, in a new order each epoch.

    Args:
        indices: (m,) int64, examples of the whole data.
        weights: (m,) fp32, the factor on each one's loss.
    """

    def __init__(self, indices: Tensor, weights: Tensor, seed: int = 0):
        if indices.shape != weights.shape or indices.dim() != 1:
            raise UsageError(
                f"indices {tuple(indices.shape)} and weights {tuple(weights.shape)} of a subset "
                "must be two lists of one length"
            )
        self.indices, self.weights, self.seed, self.epoch = indices, weights, seed, 0

    def __iter__(self) -> Iterator[int]:
        drawn = order(len(self), self.epoch, self.seed)
        self.epoch += 1
        return iter(self.indices[drawn].tolist())

    def __len__(self) -> int:
        return len(self.indices)

    def of(self, data: Any) -> "WeightedExamples":
        """The chosen examples of map-style `data` as pairs (example, weight)."""
        return WeightedExamples(data, self)

    def nbytes(self, example: int) -> int:
        """Bytes of the examples, of `example` bytes each, and their weights."""
        return len(self) * (example + self.weights.element_size())


class WeightedExamples(Dataset):
    """Pairs (example, weight); `DataLoader(subset.of(data), shuffle=True)` batches both."""

    def __init__(self, data: Any, subset: Subset):
        self.data, self.subset = data, subset

    def __len__(self) -> int:
        return len(self.subset)

    def __getitem__(self, i: int) -> tuple[Any, Tensor]:
        return self.data[int(self.subset.indices[i])], self.subset.weights[i]


def prune(
    scores: Tensor | Sequence[float],
    keep: float = 0.1,
    explore: float = 0.9,
    reweight: bool = True,
    *,
    seed: int = 0,
) -> Subset:
    """Keep a fraction of the examples: those of the highest scores, and others at random.

    Args:
        scores: (n,), high for what should stay; negate them to keep the easiest.
        keep: fraction of the examples, in (0, 1].
        explore: fraction of what is kept that is drawn at random from the rest; 1 is random
            pruning, 0 is pruning by score alone, which no weights repair.
        reweight: give the drawn ones the weight (n - top) / drawn; else all have weight 1.

    Raises:
        UsageError: a fraction is out of range, nothing is kept, or scores are NaN or not a list.
    """
    scores = torch.as_tensor(scores)
    if scores.dim() != 1:
        raise UsageError(f"scores of shape {tuple(scores.shape)}: give one per example, (n,)")
    n = len(scores)
    if not 0 < keep <= 1 or round(keep * n) < 1:
        raise UsageError(f"keep={keep} of {n} examples: it must be in (0, 1] and keep at least one")
    if not 0 <= explore <= 1:
        raise UsageError(f"explore={explore} is outside [0, 1]; 0.9 draws nine tenths at random")
    if scores.isnan().any():
        raise UsageError(
            f"{int(scores.isnan().sum())} of {n} scores are NaN; they have no place in an order, "
            "so score these examples again or remove them"
        )
    kept = round(keep * n)
    top = round((1 - explore) * kept)
    if explore > 0:
        top = min(top, kept - 1)  # one at least speaks for the rest
    ranked = scores.argsort(descending=True, stable=True)
    rest = ranked[top:].sort().values.cpu()
    drawn = kept - top if explore > 0 else 0
    generator = torch.Generator().manual_seed(seed)
    chosen = rest[torch.randperm(len(rest), generator=generator)[:drawn]]
    indices = torch.cat([ranked[:top].cpu(), chosen])
    weights = torch.ones(kept)
    if reweight and drawn:
        weights[top:] = (n - top) / drawn
    by_index = indices.argsort()
    return Subset(indices[by_index], weights[by_index], seed)


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """Distance of the predicted probabilities from the label: logits (n,C), labels (n,) -> (n,)."""
    return (logits.softmax(1) - F.one_hot(labels, logits.shape[1])).norm(dim=1)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy: logits (n,C), labels (n,) -> (n,) nats."""
    return F.cross_entropy(logits, labels, reduction="none")


def uncertainty(logits: Tensor) -> Tensor:
    """Probability that is not on the most likely class: logits (n,C) -> (n,)."""
    return 1 - logits.softmax(1).amax(1)


def grand(
    model: nn.Module,
    objective: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    chunk: int = 64,
) -> Tensor:
    """Norm of each example's gradient of all parameters that train: inputs (n,...) -> (n,).

    Args:
        objective: (output of a batch, its targets) -> scalar.
        chunk: examples whose gradients exist at a time.
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return objective(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))
    norms = []
    for x, y in zip(inputs.split(chunk), targets.split(chunk), strict=True):
        grads = each(trained, x, y).values()
        norms.append(sum(g.flatten(1).square().sum(1) for g in grads).sqrt())  # type: ignore[union-attr]
    return torch.cat(norms)


class Forgetting:
    """Counts how often an example turned from right to wrong while a model was trained."""

    def __init__(self, n: int):
        self._right = torch.zeros(n, dtype=torch.bool)
        self._ever = torch.zeros(n, dtype=torch.bool)
        self._lost = torch.zeros(n)

    def update(self, indices: Tensor, right: Tensor) -> None:
        """After each pass over examples: indices (m,), right (m,) bool."""
        self._lost[indices] += self._right[indices] & ~right
        self._right[indices] = right
        self._ever[indices] |= right

    @property
    def scores(self) -> Tensor:
        """(n,) fp32; examples that never were right count as forgotten most, +inf."""
        return self._lost.masked_fill(~self._ever, torch.inf)


# How each way of pruning calls `prune`; "easiest" negates the scores.
WAYS: dict[str, dict[str, Any]] = {
    "random": {"explore": 1.0},
    "hardest": {"explore": 0.0},
    "easiest": {"explore": 0.0},
    "calibrated 0.1": {"explore": 0.9},
    "calibrated 0.5": {"explore": 0.5},
    "unweighted 0.1": {"explore": 0.9, "reweight": False},
}
_FEATURES, _PROXY, _TEST, RIDGE = 20, 1000, 20_000, 1e-3


def limits(n: int, keep: float, ways: Sequence[str], seed: int) -> dict[str, tuple[float, float]]:
    """What each way of pruning does to logistic regression on logistic data.

    Labels follow sigmoid(w x) with |w| = 3; scores are |p - y| under a model that was fitted on
    1,000 other examples.

    Returns:
        Way -> accuracy and mean loss in nats, on fresh examples.
    """
    g = torch.Generator().manual_seed(seed)
    (proxy_x, proxy_y), (x, y), (test_x, test_y) = (_draw(m, g) for m in (_PROXY, n, _TEST))
    proxy = fit_logistic(proxy_x, proxy_y, torch.ones(_PROXY))
    scores = ((x @ proxy).sigmoid() - y).abs()
    found = {}
    for way in ways:
        chosen = prune(-scores if way == "easiest" else scores, keep, **WAYS[way], seed=seed)
        w = fit_logistic(x[chosen.indices], y[chosen.indices], chosen.weights)
        logits = test_x @ w
        nats = F.binary_cross_entropy_with_logits(logits, test_y)
        found[way] = (((logits > 0) == (test_y > 0.5)).double().mean().item(), nats.item())
    return found


def _draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, _FEATURES, generator=generator, dtype=torch.float64)
    p = (x.sum(1) * 3 / _FEATURES**0.5).sigmoid()
    return x, (torch.rand(n, generator=generator, dtype=torch.float64) < p).double()


def fit_logistic(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Weighted logistic regression by Newton's method: x (n,d), y (n,), weights (n,) -> (d,).

    A ridge, the same per example at every n, keeps what separable data give finite.
    """
    w = x.new_zeros(x.shape[1])
    weights = weights.to(x) / weights.mean()
    ridge = RIDGE * len(x) * torch.eye(len(w), dtype=x.dtype)

    def objective(w: Tensor) -> Tensor:
        nats = F.binary_cross_entropy_with_logits(x @ w, y, weights, reduction="sum")
        return nats + 0.5 * (ridge @ w) @ w

    for _ in range(100):
        p = (x @ w).sigmoid()
        slope = x.T @ (weights * (p - y)) + ridge @ w
        curve = (x * (weights * p * (1 - p))[:, None]).T @ x + ridge
        step, now, rate = torch.linalg.solve(curve, slope), objective(w), 1.0
        # Newton alone overshoots where the data is nearly separable.
        while objective(w - rate * step) > now and rate > 1e-6:
            rate /= 2
        w = w - rate * step
        if (rate * step).norm() < 1e-8 * (1 + w.norm()):
            break
    return w
