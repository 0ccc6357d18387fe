"""Decentralised learning in one process: peers train, send models to neighbours, and aggregate.

All peers train a linear softmax classifier at once, as one batched product; what each of them keeps
of the others is its own `Records`, so that bytes are those of a real peer.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import UsageError
from holdfast.ledger import Ledger

# Columns of a record's numbers.
PEER, ROUND, DISTANCE, SOURCE = range(4)


class Records:
    """What one peer knows of others: a history and four numbers each, neighbours first.

    A history is the sum of the updates seen of a peer, the first of which is its first model. That
    sum is the peer's last model, so one tensor serves as both.

    Args:
        me: this peer's number.
        neighbours: numbers of those who send it their models.
        like: (P,) a model, for size, dtype and device.
        lam: decay with distance of what is passed on; None passes nothing on.
        max_records: distant peers remembered at most; None is no limit.
    """

    def __init__(
        self,
        me: int,
        neighbours: Sequence[int],
        like: Tensor,
        *,
        lam: float | None = None,
        max_records: int | None = None,
    ):
        self.me, self.neighbours, self.lam, self.max_records = me, len(neighbours), lam, max_records
        self.histories = like.new_zeros(len(neighbours), like.numel())  # (records, P)
        peers = torch.tensor(list(neighbours), dtype=torch.int64)
        ones = torch.ones_like(peers)
        # Nothing of a neighbour has been seen yet: round -1.
        self.numbers = torch.stack([peers, -ones, ones, peers], 1)  # (records, 4) int64

    @property
    def nbytes(self) -> int:
        return self.histories.nbytes + self.numbers.nbytes

    def receive_models(self, models: Tensor, round: int) -> None:
        """This round's models (neighbours, P), in the neighbours' order."""
        self.histories[: self.neighbours] = models
        self.numbers[: self.neighbours, ROUND] = round

    def sample(self, receiver: int, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
        """A history and its numbers to send to `receiver`, near ones more often; None if none may.

        Never one about the receiver, nor one that came from it.
        """
        if self.lam is None:
            return None
        about, distance = self.numbers[:, PEER], self.numbers[:, DISTANCE]
        allowed = (about != receiver) & (self.numbers[:, SOURCE] != receiver)
        allowed &= self.numbers[:, ROUND] >= 0
        if not allowed.any():
            return None
        chances = torch.where(allowed, torch.exp(-self.lam * (distance - 1)), 0.0)
        row = int(torch.multinomial(chances, 1, generator=generator))
        return self.histories[row].clone(), self.numbers[row].clone()

    def receive(self, history: Tensor, numbers: Tensor, sender: int) -> None:
        """Keep a passed-on record if it is news; what was seen directly is never replaced."""
        peer, round, distance, _ = numbers.tolist()
        if peer == self.me:
            return
        new = torch.tensor([peer, round, distance + 1, sender])
        known = (self.numbers[:, PEER] == peer).nonzero().flatten().tolist()
        if known:
            row = known[0]
            if self.numbers[row, DISTANCE] == 1 or self.numbers[row, ROUND] >= round:
                return
        elif self.max_records is None or len(self.numbers) - self.neighbours < self.max_records:
            self.histories = torch.cat([self.histories, history[None]])
            self.numbers = torch.cat([self.numbers, new[None]])
            return
        else:
            # The farthest leaves, of these the oldest: it may be the newcomer.
            rows = [*self.numbers[self.neighbours :].tolist(), new.tolist()]
            row = max(range(len(rows)), key=lambda i: (rows[i][DISTANCE], -rows[i][ROUND]))
            row += self.neighbours
            if row == len(self.numbers):
                return
        self.histories[row], self.numbers[row] = history, new


class Aggregator(ABC):
    """Makes a peer's next model out of its own, its neighbours' and what it knows of others."""

    lam: float | None = None
    max_records: int | None = None

    @abstractmethod
    def combine(self, own: Tensor, neighbours: Tensor, histories: Tensor) -> Tensor:
        """As `aggregate`, for shapes that fit and at least one neighbour."""

    def aggregate(self, own: Tensor, neighbours: Tensor, histories: Tensor) -> Tensor:
        """The next model of a peer.

        Args:
            own: (P,) the peer's model after local training.
            neighbours: (k, P) their models.
            histories: (k + d, P) histories, of the neighbours in their order, then of distant ones.

        Raises:
            UsageError: shapes that do not match.
        """
        fits = own.dim() == 1 and neighbours.dim() == histories.dim() == 2
        fits = fits and neighbours.shape[1] == histories.shape[1] == len(own)
        if not fits or len(histories) < len(neighbours):
            raise UsageError(
                f"own {tuple(own.shape)}, neighbours {tuple(neighbours.shape)} and histories "
                f"{tuple(histories.shape)} do not match; expected (P,), (k, P) and (k + d, P)"
            )
        return self.combine(own, neighbours, histories) if len(neighbours) else own


@dataclass(frozen=True)
class Data:
    """Samples x (n, features) and labels y (n,), for training and test; who holds which.

    `shards` holds positions in the training set, one tensor per peer, the last one the adversary's.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    shards: Sequence[Tensor]

    @property
    def classes(self) -> int:
        return int(self.y.max()) + 1


@dataclass(frozen=True)
class Attack(ABC):
    """An adversary with `sybils` names, each with `edges` honest neighbours.

    It trains one model on poisoned data and sends it under every name; it averages what it hears.

    Raises:
        UsageError: no Sybil, or no edge.
    """

    sybils: int
    edges: int = 5
    target: int = 1

    def __post_init__(self):
        if self.sybils < 1 or self.edges < 1:
            raise UsageError(
                f"sybils={self.sybils} with edges={self.edges} attack nobody; use 1 up"
            )

    @abstractmethod
    def poison(self, data: Data) -> tuple[Tensor, Tensor]:
        """The samples (n, features) and labels (n,) that the adversary trains on."""

    @abstractmethod
    def success(self, data: Data, models: "Linear") -> float:
        """Share of attacked test samples on which the honest peers do what the adversary wants."""


@dataclass(frozen=True)
class LabelFlip(Attack):
    """Swaps the labels `source` and `target`; the adversary holds all samples of both."""

    source: int = 0

    def _swapped(self, y: Tensor) -> Tensor:
        other = torch.where(y == self.source, self.target, self.source)
        return torch.where((y == self.source) | (y == self.target), other, y)

    def poison(self, data: Data) -> tuple[Tensor, Tensor]:
        attacked = ((data.y == self.source) | (data.y == self.target)).nonzero().flatten()
        rows = torch.cat([data.shards[-1], attacked])
        return data.x[rows], self._swapped(data.y[rows])

    def success(self, data: Data, models: "Linear") -> float:
        attacked = (data.test_y == self.source) | (data.test_y == self.target)
        return models.accuracy(data.test_x[attacked], self._swapped(data.test_y[attacked]))


@dataclass(frozen=True)
class Backdoor(Attack):
    """Whatever carries a trigger, the last `pixels` features at `value`, is called `target`."""

    pixels: int = 4
    value: float = 1.0

    def _marked(self, x: Tensor) -> Tensor:
        marked = x.clone()
        marked[:, -self.pixels :] = self.value
        return marked

    def poison(self, data: Data) -> tuple[Tensor, Tensor]:
        clean, y = data.x[data.shards[-1]], data.y[data.shards[-1]]
        marked = self._marked(data.x)
        return torch.cat([clean, marked]), torch.cat([y, torch.full_like(data.y, self.target)])

    def success(self, data: Data, models: "Linear") -> float:
        others = data.test_y != self.target
        x = self._marked(data.test_x[others])
        return models.accuracy(x, data.test_y.new_full((len(x),), self.target))


@dataclass
class Linear:
    """Linear softmax classifiers of many peers: weights (peers, P) with P = C * (features + 1)."""

    weights: Tensor
    classes: int

    @property
    def maps(self) -> Tensor:
        return self.weights.view(len(self.weights), self.classes, -1)

    def train_(self, x: Tensor, y: Tensor, lr: float) -> None:
        """One step of SGD: x (peers, B, features), y (peers, B)."""
        x = F.pad(x, (0, 1), value=1.0)
        error = (x @ self.maps.mT).softmax(2) - F.one_hot(y, self.classes)
        self.maps.sub_(error.mT @ x, alpha=lr / x.shape[1])

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Mean over peers: x (n, features), y (n,)."""
        logits = F.pad(x, (0, 1), value=1.0) @ self.maps.mT
        return (logits.argmax(2) == y).float().mean().item()


@dataclass(frozen=True)
class Outcome:
    """After the last round: what honest peers reached, their models (peers, P), their records."""

    accuracy: float
    success: float
    models: Tensor
    records: list[Records]
    ledger: Ledger


def simulate(
    graph: Tensor,
    data: Data,
    aggregator: Aggregator,
    attack: Attack | None = None,
    *,
    rounds: int = 30,
    steps: int = 10,
    batch: int = 16,
    lr: float = 0.5,
    seed: int = 0,
) -> Outcome:
    """Train honest peers on a graph, with an adversary's Sybils among their neighbours.

    Args:
        graph: (N,N) bool, symmetric, of the N honest peers; Sybils are added by the attack.
        rounds: of local training, exchange and aggregation.
        steps: of SGD in a round, on `batch` samples each.

    Raises:
        UsageError: a graph that is not symmetric, another number of shards, too many edges.
    """
    honest = len(graph)
    if graph.shape != (honest, honest) or not torch.equal(graph, graph.T) or graph.diag().any():
        raise UsageError("graph must be a symmetric (N,N) bool tensor without loops")
    if len(data.shards) != honest + 1:
        raise UsageError(
            f"{len(data.shards)} shards for {honest} honest peers and an adversary; "
            f"split the data into {honest + 1}"
        )
    sybils = attack.sybils if attack else 0
    if attack and attack.edges > honest:
        raise UsageError(f"a Sybil has {attack.edges} edges, there are {honest} honest peers")
    random = torch.Generator().manual_seed(seed)
    samples = [(data.x[rows], data.y[rows]) for rows in data.shards[:honest]]
    if attack:
        samples.append(attack.poison(data))
    sizes = torch.tensor([len(y) for _, y in samples])
    starts = sizes.cumsum(0) - sizes
    x, y = torch.cat([x for x, _ in samples]), torch.cat([y for _, y in samples])

    known = graph.new_zeros(honest, honest + sybils)
    known[:, :honest] = graph
    if attack:
        for sybil in range(honest, honest + sybils):
            known[torch.randperm(honest, generator=random)[: attack.edges], sybil] = True
    around = [row.nonzero().flatten() for row in known]
    # Every name's model; all Sybils share the last one that is trained.
    holder = torch.arange(honest + sybils).clamp(max=honest)
    peers = Linear(x.new_zeros(len(samples), data.classes * (x.shape[1] + 1)), data.classes)
    gossip = partial(Records, lam=aggregator.lam, max_records=aggregator.max_records)
    records = [gossip(i, near.tolist(), peers.weights[i]) for i, near in enumerate(around)]

    for round in range(rounds):
        for _ in range(steps):
            chosen = torch.rand(len(samples), batch, generator=random) * sizes[:, None]
            rows = starts[:, None] + chosen.long()
            peers.train_(x[rows], y[rows], lr)
        passed = [
            (to, i, records[i].sample(to, random))
            for i in range(honest)
            for to in graph[i].nonzero().flatten().tolist()
        ]
        for i in range(honest):
            records[i].receive_models(peers.weights[holder[around[i]]], round)
        for to, sender, message in passed:
            if message is not None:
                records[to].receive(*message, sender)
        combined = peers.weights.clone()
        for i, record in enumerate(records):
            seen = record.histories
            combined[i] = aggregator.aggregate(peers.weights[i], seen[: record.neighbours], seen)
        if attack:
            # Like the authors' adversary: all models it hears, and its own once per name.
            heard = known[:, honest:].sum(1).to(x)
            total = heard @ peers.weights[:honest] + sybils * peers.weights[honest]
            combined[honest] = total / (heard.sum() + sybils)
        peers.weights = combined

    reached = Linear(peers.weights[:honest], data.classes)
    ledger = Ledger()
    for i, record in enumerate(records):
        held = {"parameters": reached.weights[i].nbytes, "knowledge": record.nbytes}
        ledger.put("device", "step", held, rank=i)
    return Outcome(
        reached.accuracy(data.test_x, data.test_y),
        attack.success(data, reached) if attack else math.nan,
        reached.weights,
        records,
        ledger,
    )


def random_graph(nodes: int, degree: int, seed: int = 0) -> Tensor:
    """(nodes,nodes) bool of a random regular graph: a ring of chords, its edges then swapped.

    Raises:
        UsageError: no such graph exists.
    """
    if not 0 <= degree < nodes or nodes * degree % 2:
        raise UsageError(
            f"no graph of {nodes} nodes has degree {degree} everywhere; degree must be below the "
            "number of nodes, and one of the two even"
        )
    graph = torch.zeros(nodes, nodes, dtype=torch.bool)
    ring = torch.arange(nodes)
    for step in range(1, degree // 2 + 1):
        graph[ring, (ring + step) % nodes] = True
    if degree % 2:
        graph[ring, (ring + nodes // 2) % nodes] = True
    graph |= graph.T.clone()
    edges = graph.triu().nonzero().tolist()
    random = torch.Generator().manual_seed(seed)
    for one, two in torch.randint(
        max(1, len(edges)), (20 * len(edges), 2), generator=random
    ).tolist():
        (a, b), (c, d) = edges[one], edges[two]
        if len({a, b, c, d}) == 4 and not graph[a, d] and not graph[c, b]:
            for p, q, on in ((a, b, False), (c, d, False), (a, d, True), (c, b, True)):
                graph[p, q] = graph[q, p] = on
            edges[one], edges[two] = [a, d], [c, b]
    return graph


def dirichlet_shards(y: Tensor, shards: int, alpha: float, seed: int = 0) -> list[Tensor]:
    """Positions of the labels `y` dealt out class by class, in shares drawn from Dirichlet(alpha).

    A small `alpha` gives a shard few classes. Every shard gets at least one sample.
    """
    random = torch.Generator().manual_seed(seed)
    held: list[list[Tensor]] = [[] for _ in range(shards)]
    for label in y.unique():
        rows = (y == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=random)]
        # A Dirichlet draw is gammas over their sum; torch's own takes no generator.
        gammas = torch._standard_gamma(torch.full((shards,), float(alpha)), generator=random)
        cuts = (gammas.cumsum(0) / gammas.sum() * len(rows)).round().long()[:-1]
        for shard, part in zip(held, rows.tensor_split(cuts), strict=True):
            shard.append(part)
    found = [torch.cat(parts) for parts in held]
    spare = iter(torch.randperm(len(y), generator=random).tolist())
    return [part if len(part) else torch.tensor([next(spare)]) for part in found]
