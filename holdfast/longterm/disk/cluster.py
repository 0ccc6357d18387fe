"""Clustering for the disk index: k-means whose clusters are of about one size."""

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 4 << 20  # bytes of vectors handled at a time
BALANCE = 0.05  # of the mean squared distance, for a cluster of twice its share
SHARE = 3  # mean sizes of a group, about the largest


def ranges(n: int, size: int) -> Iterator[tuple[int, int]]:
    step = max(1, PIECE // size)
    return ((start, min(n, start + step)) for start in range(0, n, step))


def nearest(X: Tensor, C: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
    """X (n,d), C (k,d), price (k) -> |x-c|^2 + price of the cheapest c (n), and its number (n)."""
    bias = (C * C).sum(1) + price
    cost, label = torch.empty(len(X)), torch.empty(len(X), dtype=torch.int64)
    for start, end in ranges(len(X), 4 * len(C)):
        rows = X[start:end]
        cost[start:end], label[start:end] = torch.addmm(bias, rows, C.T, alpha=-2).min(1)
        cost[start:end] += (rows * rows).sum(1)
    return cost, label


def kmeans(X: Tensor, k: int, rounds: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Balanced k-means: X (n,d) -> centroids (k',d), k' <= k, and the number of each row's (n).

    A cluster above its share gets dearer and one below it cheaper, a little each round: prices set
    afresh would swing.
    """
    n = len(X)
    k = min(k, n)
    C = X[torch.randperm(n, generator=generator)[:k]].clone()
    price = torch.zeros(k)
    for _ in range(rounds):
        cost, label = nearest(X, C, price)
        count = torch.bincount(label, minlength=k)
        spread = (cost - price[label]).clamp_min(0)
        total = torch.zeros_like(C).index_add_(0, label, X)
        filled = count > 0
        C[filled] = total[filled] / count[filled, None]
        empty = (~filled).nonzero().flatten()
        if len(empty):
            C[empty] = X[spread.argsort(descending=True, stable=True)[: len(empty)]]
        price += BALANCE * spread.mean() * (count * (k / n) - 1).clamp(-1, 2)
        price -= price.mean()
        price[empty] = 0
    _, label = nearest(X, C, price)
    filled = torch.bincount(label, minlength=k) > 0
    return C[filled], (filled.cumsum(0) - 1)[label]


def balance(X: Tensor, C: Tensor) -> Tensor:
    """Prices at which no centroid draws much more than `SHARE` of the rows, which it was not
    fitted to.

    A centroid is nearer to its own sample than to any other vector: of all others a few groups,
    whose means are the least noisy, would draw a fifth each. To even out more costs recall.
    """
    distance = torch.addmm((C * C).sum(1), X, C.T, alpha=-2) + (X * X).sum(1, keepdim=True)
    scale, price = distance.min(1).values.mean(), torch.zeros(len(C))
    for step in torch.linspace(BALANCE, BALANCE / 10, 40).tolist():
        count = torch.bincount((distance + price).argmin(1), minlength=len(C))
        price += step * scale * (count * (len(C) / len(X)) - SHARE).clamp(0, 4)
    return price
