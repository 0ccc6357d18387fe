"""One decode step for many requests: linear layers together, attention in each one's own cache."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from holdfast.context.attention.relay import RelayLayer
from holdfast.context.cache.bounded import BoundedCache
from holdfast.context.cache.deferred import DeferredLayer
from holdfast.context.interface import Visible
from holdfast.context.stream import make_room, surprisal


def can_join(cache: BoundedCache) -> bool:
    """Whether all layers are ours; sliding and recurrent ones of hybrid models are not."""
    return all(isinstance(layer, DeferredLayer) for layer in cache.layers)


class JoinedLayer(DeferredLayer):
    """The same layer of several caches of one row each.

    Args:
        rows: their layers.
        positions: (1,1) each, at which the model rotates the next token.
    """

    def __init__(self, rows: Sequence[DeferredLayer], positions: Sequence[Tensor]):
        super().__init__()
        self.rows, self.positions = rows, positions

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Visible, *,
        positions: Tensor, scaling: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        alone = replace(visible, valid=None)
        self._look_at_prefixes(q, scaling)
        outs = []
        for i, row in enumerate(self.rows):
            at = slice(i, i + 1)
            outs.append(row.attend(module, q[at], k[at], v[at], alone, window=window,
                                   positions=self.positions[i], scaling=scaling))  # fmt: skip
        return torch.cat(outs)

    def _look_at_prefixes(self, q: Tensor, scaling: float) -> None:
        """Read each prefix once for all rows that share it.

        Rows whose policy gives positions of its own rotate their queries later, one by one.
        """
        sharing: dict[str, list[int]] = {}
        for i, row in enumerate(self.rows):
            if isinstance(row, RelayLayer) and not row.policy.rotates:
                sharing.setdefault(row.cache.prefix.key, []).append(i)
        for numbers in sharing.values():
            rows = [self.rows[i] for i in numbers]
            out, lse = rows[0].cache.prefix.look(rows[0].number, q[numbers], scaling)
            for place, row in enumerate(rows):
                row.ready = out[place : place + 1], lse[place : place + 1]

    def nbytes(self) -> int:
        return sum(row.nbytes() for row in self.rows)


@torch.no_grad()
def step(
    model: PreTrainedModel, ids: Tensor, caches: Sequence[BoundedCache], before: Tensor
) -> Tensor:
    """Read one token of each request: ids (B,) -> logits (B,V) of what comes next.

    Args:
        caches: of one row each; all of them `can_join`.
        before: (B,V) logits that predicted ids.
    """
    question = caches[0].policy.catalyst
    if question is not None:
        for cache in caches:
            make_room(model, question, cache, torch.Size((1, 1)))
    # As in `stream.read`: where keys are un-rotated any position will do.
    starts = [0 if cache.policy.rotates else cache.get_seq_length() for cache in caches]
    positions = torch.tensor(starts, device=ids.device)[:, None]
    apart = positions.split(1)
    layers = [JoinedLayer(rows, apart) for rows in zip(*(c.layers for c in caches), strict=True)]
    logits = model(
        ids[:, None], past_key_values=Cache(layers=layers), position_ids=positions, use_cache=True
    ).logits
    if caches[0].policy.observes:
        nats = surprisal(logits, ids[:, None], before)
        for cache, own in zip(caches, nats.split(1), strict=True):
            cache.observe(own)
    return logits[:, -1].clone()
