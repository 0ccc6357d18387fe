"""SybilWall (055): of neighbours that resemble a known peer too much, none is believed.

Keeps    at each peer a record of every neighbour, and of peers farther away that were heard of: a
         history of updates and four numbers; of distant ones at most `max_records`.
Form     histories flat, in the model's dtype; round, distance, peer and sender as int64.
Bytes    (1 + n + m)*b*P + 32*(n + m) for n neighbours and m distant records; the 1 is the peer's
         own model.
Source   Werthenbach, Pouwelse, "Towards Sybil Resilience in Decentralized Learning", 2023; the
         authors' code was read. Beside it: Fung, Yoon, Beschastnikh, "The Limitations of Federated
         Learning in Sybil Settings", RAID 2020 (FoolsGold); Blanchard, El Mhamdi, Guerraoui,
         Stainer, "Machine Learning with Adversaries", NeurIPS 2017 (Krum).
Departs  the authors' code keeps a neighbour's last model beside its history, whose sum telescopes
         to that very model, so it is kept once here; it averages with a weight vector that distant
         records make longer than the list of models, here only neighbours and self have weights;
         trust is scaled so that the most trusted neighbour has 1, not the most trusted record,
         because stale records differ most and left nearly no neighbour believed (accuracy without
         an attack, in the check's world: 0.54 by any record, 0.86 by neighbours); `max_records` is
         new.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import UsageError
from holdfast.parallel.decentral import Aggregator

# Added to a peer's largest similarity before two are divided.
LIFT = 1e-5
# Distances to another history below this are rounding: whoever has no larger one is not believed.
FLOOR = 1e-5


class Mean(Aggregator):
    """The plain average."""

    def combine(self, own: Tensor, neighbours: Tensor, histories: Tensor) -> Tensor:
        return torch.cat([own[None], neighbours]).mean(0)


class Median(Aggregator):
    """The median of each coordinate."""

    def combine(self, own: Tensor, neighbours: Tensor, histories: Tensor) -> Tensor:
        ranked = torch.cat([own[None], neighbours]).sort(0).values
        middle = len(ranked) // 2
        # torch.median takes the lower of two middle values.
        return ranked[[middle, -middle - 1]].mean(0)


class Krum(Aggregator):
    """The one model that is closest to its nearest others.

    Args:
        faulty: models that may be hostile; a model's nearest others are all but these and one more.
    """

    def __init__(self, faulty: int = 1):
        self.faulty = faulty

    def combine(self, own: Tensor, neighbours: Tensor, histories: Tensor) -> Tensor:
        models = torch.cat([own[None], neighbours])
        wide = models.to(torch.promote_types(models.dtype, torch.float32))
        distances = torch.cdist(wide, wide).square().sort(1).values
        nearest = max(1, len(models) - self.faulty - 2)
        # The first is a model's distance to itself.
        return models[distances[:, 1 : nearest + 1].sum(1).argmin()]


class FoolsGold(Aggregator):
    """Neighbours weigh less the more their histories resemble another neighbour's."""

    def combine(self, own: Tensor, neighbours: Tensor, histories: Tensor) -> Tensor:
        weights = self.weights(histories, len(neighbours))
        return torch.cat([neighbours, own[None]]).mT @ weights

    def weights(self, histories: Tensor, count: int) -> Tensor:
        """(count + 1,) weights that sum to 1: of `count` neighbours, then the peer's own."""
        trusted = F.pad(self.trust(histories, count), (0, 1), value=1.0)
        return (trusted / trusted.sum()).to(histories.dtype)

    def trust(self, histories: Tensor, count: int) -> Tensor:
        """(count,) in [0, 1]."""
        return credibility(histories[:count], count)


class SybilWall(FoolsGold):
    """Neighbours weigh less the more they resemble any peer heard of, however far away.

    Args:
        lam: decay with distance of the chance that a record is passed on to a neighbour.
        max_records: distant peers remembered at most; None is no limit.

    Raises:
        UsageError: a negative argument.
    """

    def __init__(self, lam: float = 0.8, max_records: int | None = None):
        if lam < 0 or (max_records is not None and max_records < 0):
            raise UsageError(f"lam={lam} and max_records={max_records} must not be negative")
        self.lam, self.max_records = lam, max_records

    def trust(self, histories: Tensor, count: int) -> Tensor:
        return credibility(histories, count)


def credibility(histories: Tensor, count: int) -> Tensor:
    """Trust in peers by how little they resemble any other, after FoolsGold.

    Args:
        histories: (n, P).
        count: how many, from the first, are judged; all others are only compared with.

    Returns:
        (count,) in [0, 1], in fp32 or wider.
    """
    wide = histories.to(torch.promote_types(histories.dtype, torch.float32))
    unit = F.normalize(wide, dim=1)
    similar = (unit @ unit.mT).fill_diagonal_(0)
    most = similar.amax(1) + LIFT
    # Pardon: whoever resembles another less than that one does others is not the Sybil of the two.
    similar = similar * (most[:, None] / most).clamp(max=1)
    alpha = (1 - similar[:count].amax(1)).clamp(0, 1)
    # The logit of 0 and 1 is infinite, and is clipped.
    return ((alpha / alpha.max().clamp(min=FLOOR)).logit() + 0.5).clamp(0, 1)


def credibility_ref(histories: list[list[float]], count: int) -> list[float]:
    """`credibility`, number by number."""
    n = len(histories)

    def cosine(a: list[float], b: list[float]) -> float:
        norms = math.sqrt(sum(u * u for u in a)) * math.sqrt(sum(u * u for u in b))
        return sum(u * v for u, v in zip(a, b, strict=True)) / norms if norms else 0.0

    similar = [
        [0.0 if i == j else cosine(histories[i], histories[j]) for j in range(n)] for i in range(n)
    ]
    most = [max(row) + LIFT for row in similar]
    for i in range(n):
        for j in range(n):
            if most[i] < most[j]:
                similar[i][j] *= most[i] / most[j]
    alpha = [min(max(1 - max(row), 0.0), 1.0) for row in similar[:count]]
    scale = max(*alpha, FLOOR)
    trusted = []
    for a in alpha:
        a /= scale
        logit = math.log(a / (1 - a)) if 0 < a < 1 else (a - 0.5) * math.inf
        trusted.append(min(max(logit + 0.5, 0.0), 1.0))
    return trusted
