"""Which guesses to verify in one forward pass: trees of candidates and prompt tokens for PPD (030).

A node of a tree is a path of ranks: (2, 0) is the best guess for the second token below the third
best guess for the first. Under each node, the root included, hangs a chain of prompt tokens; that
of the node at which acceptance ends says how deep the next tree may be. So lengths of chains are
the states of a Markov chain, and a plan is one tree for each of them.
"""

import functools
import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Weight of the future when a plan is valued and its states are weighed. Below 1 the equations have
# a solution whatever states can be left; so close to 1 it is the long-run average.
_FUTURE = 1 - 1e-6
_ROUNDS = 20
_THRESHOLD, _SLACK = 0.3, 0.09  # of typical acceptance

Path = tuple[int, ...]
# [d][r]: share of tokens that are rank r of the guess for depth d.
Accuracy = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Tree:
    """Nodes, the root () first and parents before children; under node i hang `chains[i]` prompt
    tokens."""

    nodes: tuple[Path, ...]
    chains: tuple[int, ...]

    def size(self, copies: int) -> int:
        """Inputs of the forward pass; every prompt token is `copies` of them."""
        return len(self.nodes) + sum(self.chains) * copies


class Inputs(NamedTuple):
    """A tree as inputs of a forward pass: its nodes, then every copy of their prompt tokens."""

    tree: Tree
    parents: list[int]  # of each node; the root's own is itself
    depth: Tensor  # (T,) int64, places after the root
    sees: Tensor  # (T,T) bool
    prompt: Tensor  # rows of the embeddings (P*E,D)
    chain: tuple[range, ...]  # of each node: where its prompt tokens are

    @classmethod
    def of(cls, tree: Tree, copies: int, device: torch.device) -> "Inputs":
        nodes = {path: i for i, path in enumerate(tree.nodes)}
        parents = [nodes[path[:-1]] for path in nodes]
        sees = torch.eye(tree.size(copies), dtype=torch.bool)
        for i, parent in enumerate(parents):
            sees[i] |= sees[parent]
        depth = [len(path) for path in nodes]
        prompt: list[int] = []
        chain: list[range] = []
        for i, (path, length) in enumerate(zip(tree.nodes, tree.chains, strict=True)):
            first = len(depth)
            for step, copy in itertools.product(range(length), range(copies)):
                own = first + step * copies + copy
                sees[own] |= sees[i]
                sees[own, first + copy : own : copies] = True
                depth.append(len(path) + 1 + step)
                prompt.append(step * copies + copy)
            chain.append(range(first, len(depth)))
        return cls(
            tree,
            parents,
            torch.tensor(depth, device=device),
            sees.to(device),
            torch.tensor(prompt, dtype=torch.long, device=device),
            tuple(chain),
        )


def accept(
    inputs: Inputs, tokens: list[int], logits: Tensor, generator: torch.Generator | None
) -> tuple[list[int], int]:
    """Nodes of the longest path, of equals the likeliest, of which the model agrees with each; and
    the token after it. It agrees with its favourite alone, or, given a generator, with what is
    typical of it."""
    parents, at = inputs.parents, torch.tensor(tokens, device=logits.device)
    logits = logits[: len(tokens)].float()
    # Not of logarithms: rounding may make two logits equal.
    favourites = logits.argmax(-1)
    logs = logits.log_softmax(-1)
    fits = favourites[parents] == at
    if generator is not None:
        # 0 * -inf is no part of an entropy.
        entropy = -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0)).sum(-1)
        typical = logs.exp() > (_SLACK * (-entropy).exp()).clamp(max=_THRESHOLD)[:, None]
        fits = typical[parents, at]
    agreed, likely = fits.tolist(), logs[parents, at].tolist()
    found: dict[int, tuple[int, float, list[int]]] = {0: (1, 0.0, [0])}
    for node, parent in enumerate(parents):
        if node and parent in found and agreed[node]:
            length, total, path = found[parent]
            found[node] = length + 1, total + likely[node], [*path, node]
    path = max(found.values())[2]
    if generator is None:
        return path, int(favourites[path[-1]])
    last = logs[path[-1]].exp() * typical[path[-1]]
    return path, int(last.multinomial(1, generator=generator))


@dataclass(frozen=True)
class Plan:
    """Trees by the length of the chain that the last step ended with.

    Args:
        trees: one for each length 0...P.
        shares: of the steps that start in each state, in the long run.
        accepted: expected tokens per step.
        copies: inputs per prompt token.
    """

    trees: tuple[Tree, ...]
    shares: tuple[float, ...]
    accepted: float
    copies: int

    @property
    def size(self) -> int:
        return max(tree.size(self.copies) for tree in self.trees)

    def seconds(self, latency: Mapping[int, float]) -> float:
        """Expected duration of a step, from that of forward passes by their number of inputs."""
        sizes = [tree.size(self.copies) for tree in self.trees]
        return sum(
            share * _between(latency, size)
            for share, size in zip(self.shares, sizes, strict=True)
            if share > 1e-9
        )


def begins(found: Plan, ranks: Sequence[Sequence[int]]) -> list[int]:
    """Places at which steps with guesses begin, in a text whose tokens are known.

    Args:
        ranks: (places,P): in the guess that is made at place i for depth d, the rank of the token
            that follows there, places[i + 1 + d].
    """
    paths = [frozenset(tree.nodes) for tree in found.trees]
    chains = [dict(zip(tree.nodes, tree.chains, strict=True)) for tree in found.trees]
    # The last token of the prompt leaves no guess; place 0 is that of its own chain.
    at, state, places = 0, chains[0][()], []
    while at < len(ranks):
        path: Path = ()
        while len(path) < state and (*path, ranks[at][len(path)]) in paths[state]:
            path = (*path, ranks[at][len(path)])
        if state:
            places.append(at)
        at, state = at + 1 + len(path), chains[state][path]
    return places


def fastest(accuracy: Accuracy, latency: Mapping[int, float], copies: int = 1) -> Plan:
    """The plan of most tokens per second, among one for each size of which the latency is known.

    Args:
        latency: inputs of a forward pass -> seconds.
        copies: inputs per prompt token.
    """
    plans = [plan(accuracy, size, copies) for size in sorted(latency)]
    return max(plans, key=lambda found: found.accepted / found.seconds(latency))


@functools.lru_cache(maxsize=64)
def plan(accuracy: Accuracy, size: int, copies: int = 1) -> Plan:
    """The best trees of at most `size` inputs: policy iteration over the states.

    Each state takes the candidates that are most often right, as many as leave the chains worth
    most; how much a chain is worth is what the last plan's states were worth.
    """
    depths = len(accuracy)
    ranked = [_candidates(accuracy[:state], size - 1) for state in range(depths + 1)]
    value = [float(state) for state in range(depths + 1)]
    best: Plan | None = None
    for _ in range(_ROUNDS):
        trees = tuple(_tree(order, size, copies, value) for order in ranked)
        rewards, moves = _chain(trees, accuracy)
        still = torch.eye(depths + 1, dtype=torch.float64) - _FUTURE * moves
        first = torch.zeros(depths + 1, dtype=torch.float64)
        first[0] = 1 - _FUTURE
        shares = torch.linalg.solve(still.mT, first)
        found = Plan(trees, tuple(shares.tolist()), float(shares @ rewards), copies)
        # Trimming is greedy, so that a round may end below an earlier one.
        if best is None or found.accepted > best.accepted + 1e-9:
            best = found
        elif found.trees == best.trees:
            break
        worth = torch.linalg.solve(still, rewards)
        value = (worth - worth[0]).tolist()
    assert best is not None
    return best


def _candidates(accuracy: Accuracy, count: int) -> list[tuple[Path, float]]:
    """The `count` paths that are most often right, with how often; parents before children."""
    found: list[tuple[Path, float]] = []
    heap: list[tuple[float, Path]] = [(-1.0, ())]
    while heap and len(found) <= count:
        p, path = heapq.heappop(heap)
        found.append((path, -p))
        if len(path) < len(accuracy):
            for rank, share in enumerate(accuracy[len(path)]):
                heapq.heappush(heap, (p * share, (*path, rank)))
    return found


def _tree(
    order: Sequence[tuple[Path, float]], size: int, copies: int, value: Sequence[float]
) -> Tree:
    """The best split of `size` inputs between the first of `order` and their chains."""
    best, most = None, -1.0
    ends: dict[Path, float] = {}
    total = 0.0
    for count, (path, share) in enumerate(order, 1):
        total += share
        ends[path] = share
        if path:
            ends[path[:-1]] -= share
        chains = _trimmed(list(ends.values()), (size - count) // copies, value)
        worth = total + sum(e * value[j] for e, j in zip(ends.values(), chains, strict=True))
        if worth > most:
            best, most = Tree(tuple(ends), tuple(chains)), worth
    assert best is not None
    return best


def _trimmed(ends: Sequence[float], budget: int, value: Sequence[float]) -> list[int]:
    """Lengths of chains that sum to at most `budget`: full ones, the least missed cut first."""
    longest = len(value) - 1
    chains = [longest] * len(ends)

    def loss(node: int) -> float:
        return ends[node] * (value[chains[node]] - value[chains[node] - 1])

    heap = [(loss(node), -node) for node in range(len(ends))] if longest else []
    heapq.heapify(heap)
    for _ in range(len(ends) * longest - budget):
        node = -heapq.heappop(heap)[1]
        chains[node] -= 1
        if chains[node]:
            heapq.heappush(heap, (loss(node), -node))
    return chains


def _chain(trees: Sequence[Tree], accuracy: Accuracy) -> tuple[Tensor, Tensor]:
    """Expected tokens of a step in each state, and the probabilities of the next state."""
    rewards = torch.zeros(len(trees), dtype=torch.float64)
    moves = torch.zeros(len(trees), len(trees), dtype=torch.float64)
    for state, tree in enumerate(trees):
        chains = dict(zip(tree.nodes, tree.chains, strict=True))
        for path, chain in chains.items():
            share = 1.0
            for depth, rank in enumerate(path):
                share *= accuracy[depth][rank]
            rewards[state] += share
            moves[state, chain] += share
            if path:
                moves[state, chains[path[:-1]]] -= share
    return rewards, moves


def _between(latency: Mapping[int, float], size: int) -> float:
    """Latency at a size between those measured, on a straight line."""
    sizes = sorted(latency)
    above = next((s for s in sizes if s >= size), sizes[-1])
    below = max((s for s in sizes if s <= size), default=sizes[0])
    if above == below:
        return latency[above]
    part = (size - below) / (above - below)
    return latency[below] * (1 - part) + latency[above] * part
