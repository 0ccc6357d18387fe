"""Ghost norms: how long each example's gradient is, without forming it.

A linear's gradient for one example is a sum of outer products, whose norm follows from inner
products of its inputs and of its outputs' gradients; an embedding's is a few rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast import attach
from holdfast.errors import UsageError


class GhostNorms:
    """Sees the forward passes of a model and says the norm of each example's gradient.

    Raises:
        UsageError: a parameter that trains belongs to neither an nn.Linear nor an nn.Embedding, or
            to two modules; or a batch norm mixes examples.
    """

    def __init__(self, model: nn.Module):
        owners: dict[int, nn.Module] = {}
        for name, module in model.named_modules():
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            known = type(module) in (nn.Linear, nn.Embedding)
            if isinstance(module, _BatchNorm) or (own and not known):
                raise UsageError(
                    f"{name or 'the model'} is a {type(module).__name__}; norms of per-example "
                    "gradients exist for nn.Linear and nn.Embedding. Freeze its parameters, or use "
                    "another layer (batch norm mixes examples and cannot be private)"
                )
            for p in own:
                if owners.setdefault(id(p), module) is not module:
                    raise UsageError(
                        f"{name} shares a parameter with another module; the norm would need both: "
                        "untie them"
                    )
        self._seen: list[tuple[nn.Module, Tensor, Tensor, int]] = []
        # Hooks, not the modules' own methods: a copy of the model is not watched.
        self.handle = attach.hook({id(m): m for m in owners.values()}.values(), self._see)

    def _see(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if output.requires_grad:
            self._seen.append((module, args[0].detach(), output, output._version))

    def __call__(self, losses: Tensor) -> Tensor:
        """Norms (B,) fp32 for losses (B,), of which the i-th depends on the i-th example alone.

        The graph stays, for the backward pass proper; gradients of parameters are not computed.

        Raises:
            UsageError: no forward pass was seen; rows and losses differ in number; or an output was
                changed in place.
        """
        seen, self._seen = self._seen, []
        if not len(losses):
            return losses.new_zeros(0, dtype=torch.float32)
        if not seen:
            raise UsageError("no forward pass of the watched model led to these losses")
        outputs = [output for _, _, output, _ in seen]
        grads = torch.autograd.grad(losses.sum(), outputs, retain_graph=True, allow_unused=True)
        calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        for (module, x, output, version), g in zip(seen, grads, strict=True):
            if g is None:
                continue
            if len(x) != len(losses):
                raise UsageError(
                    f"a {type(module).__name__} saw {len(x)} rows for {len(losses)} losses; the "
                    "first dimension of every layer's input must be that of the examples"
                )
            if output._version != version:
                raise UsageError(
                    f"the output of a {type(module).__name__} was changed in place, and with it "
                    "its gradient; use inplace=False in what follows"
                )
            calls.setdefault(module, []).append((x, g))
        squares = losses.new_zeros(len(losses), dtype=torch.float32)
        for module, pairs in calls.items():
            # Several calls of one module are further positions of the same example.
            g = torch.cat([_positions(g) for _, g in pairs], 1).float()
            if isinstance(module, nn.Embedding):
                ids = torch.cat([x.reshape(len(x), -1) for x, _ in pairs], 1)
                found = embedding_squares(ids, g, module.num_embeddings)
            else:
                assert isinstance(module, nn.Linear)
                x = torch.cat([_positions(x) for x, _ in pairs], 1).float()
                found = linear_squares(x, g, module.weight, module.bias)
            squares += found.to(squares.device)
        return squares.sqrt()


def _positions(t: Tensor) -> Tensor:
    """(B,...,F) -> (B,T,F)."""
    return t.reshape(len(t), -1, t.shape[-1])


def linear_squares(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Squared norms of sum_t g_t x_t^T and, with a bias, sum_t g_t: x (B,T,n), g (B,T,m) -> (B,).

    Of weight and bias only `requires_grad` is read.
    """
    total = g.new_zeros(len(g))
    if weight.requires_grad:
        if x.shape[1] ** 2 <= x.shape[2] * g.shape[2]:
            total += ((x @ x.mT) * (g @ g.mT)).sum((1, 2))
        else:
            total += (g.mT @ x).square().sum((1, 2))
    if bias is not None and bias.requires_grad:
        total += g.sum(1).square().sum(1)
    return total


def embedding_squares(ids: Tensor, g: Tensor, rows: int) -> Tensor:
    """Squared norms of each example's gradient of a table: ids (B,T), g (B,T,d) -> (B,).

    What one example sends to the same row adds up before the norm is taken.
    """
    example = torch.arange(len(ids), device=ids.device)[:, None]
    reads, inverse = (example * rows + ids).flatten().unique(return_inverse=True)
    sums = g.new_zeros(len(reads), g.shape[-1]).index_add_(0, inverse, g.flatten(0, 1))
    return g.new_zeros(len(ids)).index_add_(0, reads // rows, sums.square().sum(1))


def norms_ref(model: nn.Module, losses: Sequence[Tensor]) -> Tensor:
    """The same by one backward pass per example: losses as a sequence of scalars."""
    mine = [p for p in model.parameters() if p.requires_grad]
    found = []
    for loss in losses:
        grads = torch.autograd.grad(loss, mine, retain_graph=True, allow_unused=True)
        dense = [g.to_dense() if g.is_sparse else g for g in grads if g is not None]
        found.append(torch.cat([g.flatten() for g in dense]).norm())
    return torch.stack(found)
