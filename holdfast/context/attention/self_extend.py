"""Self-Extend (161): exact positions nearby, grouped positions far away, no training.

Keeps    every token, or what another policy keeps.
Form     keys un-rotated, original positions beside them.
Bytes    2*L*B*H*m*d*b + 8*L*B*m for m entries (8*L*B*H*m where heads keep different ones).
Source   Jin, Han, Yang, Jiang, Liu, Chang, Chen, Hu, "LLM Maybe LongLM: Self-Extend LLM Context
         Window Without Tuning", ICML 2024.
Departs  two attentions merged by their log-sum-exps instead of a selection among n x n scores;
         chunks of any size; no log-n scaling of queries.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.context.cache.baselines import Full
from holdfast.context.cache.policy import CachePolicy, CacheShape
from holdfast.context.kernels import merge_lse
from holdfast.context.masks import MaskMod
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from holdfast.context.cache.bounded import BoundedCache
    from holdfast.context.cache.layer import BoundedLayer, New


class SelfExtend(CachePolicy):
    """Look at tokens closer than `window` where they are, at others in groups of `group`.

    Args:
        group: positions that become one.
        window: neighbours with exact positions; by default a quarter of the trained length.
        evict: the policy (or its name) that decides what stays; by default everything, and more
            than fits is an error.
    """

    keeps_index = True
    at_slots = False
    drops = False

    def __init__(
        self, *, group: int = 8, window: int | None = None, evict: CachePolicy | str | None = None
    ):
        if group < 1:
            raise UsageError(f"group={group}: a group has 1 position or more; 1 changes nothing")
        if window is not None and window < 1:
            raise UsageError(f"window={window}: use 1 or more, for example 1024")
        if isinstance(evict, str):
            from holdfast.context.cache.policies import find

            evict = find(evict)
        self.group, self.window, self.evict = group, window, evict
        self._inner = evict or Full()
        if type(self._inner).attend is not CachePolicy.attend:
            raise UsageError(f"{self._inner!r} looks at entries in its own way; use another policy")
        self.fields, self.per_head = self._inner.fields, self._inner.per_head
        self.observes, self.drops = self._inner.observes, self._inner.drops

    @classmethod
    def plan(cls, trained: int, target: int) -> "SelfExtend":
        """Group and window for texts of `target` tokens and a model trained at `trained`.

        The window is a quarter of the trained length; the group is the smallest with which the
        authors' rule holds: window + (target - window) / group <= trained / 2.
        """
        if trained < 8 or target < 1:
            raise UsageError(f"trained={trained}, target={target}: use 8 and 1 or more")
        window = trained // 4
        far = max(0, target - window)
        return cls(group=max(1, -(-far // (trained // 2 - window))), window=window)

    def neighbours(self, cache: "BoundedCache") -> int:
        return self.window or max(1, _trained(cache) // 4)

    def longest(self, trained: int, window: int) -> int:
        """Tokens up to which no relative position is new to the model."""
        return (trained - window + window // self.group) * self.group

    def bind(self, cache: "BoundedCache") -> None:
        trained, window = _trained(cache), self.neighbours(cache)
        if window >= trained:
            raise UsageError(
                f"window={window} leaves no positions for groups: the model was trained at "
                f"{trained}; use {trained // 4}"
            )
        self._inner.bind(cache)

    def check(self, capacity: int, chunk: int) -> None:
        self._inner.check(capacity, chunk)

    def least(self, chunk: int) -> int:
        return self._inner.least(chunk)

    def stay(self, capacity: int, incoming: int) -> int:
        return self._inner.stay(capacity, incoming)

    def select(self, layer: "BoundedLayer", keep: int) -> Tensor:
        return self._inner.select(layer, keep)

    def observe(self, layer: "BoundedLayer", nats: Tensor, new: "New") -> None:
        self._inner.observe(layer, nats, new)

    def turn(self, cache: "BoundedCache") -> None:
        self._inner.turn(cache)

    def scratch(self, shape: CacheShape, capacity: int) -> int:
        return self._inner.scratch(shape, capacity)

    def attend(self, layer: "BoundedLayer", q: Tensor, new: "New", scaling: float) -> Tensor:
        cache = layer.cache
        window, group = self.neighbours(cache), self.group
        index = layer.field("index")
        read = torch.tensor(layer.read, device=q.device)
        # Where the new tokens are in their rows; padding lies before the start and sees nothing.
        here = (read[:, None] - new.count + torch.arange(new.count, device=q.device))[:, None]
        self._warn(cache, max(layer.read), new.count)
        hidden = layer.window
        shared = index.shape[1] == 1
        per_head = q.shape[1] // index.shape[1]

        def apart(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return here[b, 0, i] - index[b, 0 if shared else h // per_head, j]

        slots = new.slots

        def between(low: int, high: int | None) -> Callable[["New", slice], MaskMod]:
            """Entries up to the query itself that are `low` or more, less than `high` apart."""

            def of(_: "New", at: slice) -> MaskMod:
                def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                    distance = apart(b, h, i, j + at.start)
                    seen = j + at.start <= slots[b if len(slots) > 1 else 0, i]
                    seen = seen & (distance >= low)
                    return seen if high is None else seen & (distance < high)

                return sees

            return of

        def keys(positions: Any) -> Any:
            return lambda at: layer.rotate(layer.stored_keys(at), positions(index[:, :, at]))

        # Reading order: every entry before this one is farther away than a window.
        first = int((index <= int(here.min()) - window).all(1).all(0).sum())
        close = layer.look(
            layer.rotate(q, here), new, scaling, mask=between(0, min(window, hidden or window)),
            keys=keys(lambda p: p),
            ranges=[at for at in layer.ranges() if at.stop > first],
        )  # fmt: skip
        # Models with a sliding window see nothing beyond it, near or far.
        if max(layer.read) <= window or (hidden is not None and hidden <= window):
            return close[0]
        shift = window - window // group
        distant = layer.look(
            layer.rotate(q, here // group + shift), new, scaling, mask=between(window, hidden),
            keys=keys(lambda p: p // group),
        )  # fmt: skip
        return merge_lse([close, distant])[0]

    def _warn(self, cache: "BoundedCache", read: int, new: int) -> None:
        trained, window = _trained(cache), self.neighbours(cache)
        longest = self.longest(trained, window)
        if read - new <= longest < read:
            warnings.warn(
                f"more than {longest} tokens, which group={self.group} and window={window} reach: "
                f"further positions are new to the model; use a larger group, for example "
                f"{2 * self.group}",
                stacklevel=2,
            )


def _trained(cache: "BoundedCache") -> int:
    found = getattr(cache.config, "max_position_embeddings", None)
    if found is None:
        raise UsageError("the model's config does not say max_position_embeddings; set it")
    return found
