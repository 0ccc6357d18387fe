"""LoMA (114): memory tokens that take the place of the text they can repeat.

Keeps    t memory entries for every t*c tokens read, and the tokens of the running zone.
Form     keys and values as the model makes them, rotated where they were read.
Bytes    2*L*B*H*(t*(n // (t*c)) + n % (t*c))*d*b after n tokens; while a zone is folded its
         t*c + t entries, and one layer's twice. With `lossless` also 8*B*(n % (t*c)) for ids, and
         t*c entries instead of t for each zone that could not be repeated.
Source   Wang, Xiao, "LoMA: Lossless Compressed Memory Attention", 2024. No code was found.
Departs  memory tokens see each other causally, so that inference needs no mask of its own. A token
         that repeats sees the memory of its zone and itself, no text and no other repetition: its
         own entry says nothing of the text, but among memory alone, where all values of the first
         layer are equal, that layer could not tell its place. `lossless` measures: a zone of which
         any row is repeated wrongly stays as it was read.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from holdfast import attach
from holdfast.context import interface
from holdfast.context.cache.deferred import NAME, DeferredLayer
from holdfast.context.interface import Visible
from holdfast.context.kernels import attention_with_lse
from holdfast.context.masks import Causal, MaskMod
from holdfast.errors import UsageError

TEXT, MEMORY, REPEAT = range(3)
# Cross-entropy leaves these labels out.
NONE = -100


@dataclass(frozen=True)
class LoMA:
    """A model with two more tokens and the attention "holdfast"; `prepare` makes it.

    Attributes:
        t: memory tokens per zone.
        c: tokens of text for each of them.
        memory, repeat: ids of the two tokens.
    """

    model: PreTrainedModel
    t: int
    c: int
    memory: int
    repeat: int
    _attached: attach.Handle
    _used: interface.Use

    @classmethod
    def prepare(cls, model: PreTrainedModel, *, t: int, c: int = 4) -> "LoMA":
        """Add the two tokens to a model, unless `model.config.loma` says that it has them.

        From then on the model folds what it reads into a `LoMACache`, in `generate()` too. Until it
        was trained by `loma_loss` it does not remember.

        Raises:
            UsageError: t < 1 or c < 2, or a model that was prepared with others.
        """
        if t < 1 or c < 2:
            raise UsageError(
                f"t={t}, c={c}: a zone has t >= 1 memory tokens, each in place of c >= 2 tokens; "
                "use for example t=8, c=4"
            )
        known = getattr(model.config, "loma", None)
        if known is None:
            rows = model.get_input_embeddings().weight.shape[0]
            known = {"t": t, "c": c, "memory": rows, "repeat": rows + 1}
            model.resize_token_embeddings(rows + 2)
            model.config.loma = known
        if (known["t"], known["c"]) != (t, c):
            raise UsageError(
                f"this model was prepared with t={known['t']}, c={known['c']}, not t={t}, c={c}; "
                "use those, or start from the model without memory tokens"
            )
        used = interface.use(model, NAME)
        return cls(model, t, c, known["memory"], known["repeat"], attach.wrap(model, _read), used)

    @property
    def zone(self) -> int:
        """Tokens that are folded together."""
        return self.t * self.c

    def remove(self) -> None:
        """Give the model its own forward and attention back; the two tokens stay."""
        self._attached.remove()
        self._used.remove()

    def repeated(self, cache: "LoMACache", zone: int) -> Tensor:
        """What the memory of a zone says that its text was: ids (B,t*c)."""
        where = cache.zones[zone]
        positions = torch.arange(where.position, where.position + self.zone)
        cache.repeating = where.slots
        try:
            logits = self.model(
                _rows(self.repeat, cache.rows, self.zone, self.model.device),
                position_ids=positions[None].to(self.model.device),
                past_key_values=cache,
            ).logits
        finally:
            cache.repeating = None
        return logits[..., : self.memory].argmax(-1)


@dataclass(frozen=True)
class LomaBatch:
    """Text packed with its memory and its repetition: zones of [text, memory, repetition].

    Attributes:
        ids: (B,N) int64.
        positions: (1,N) int64; memory stands at the last tokens of the slices that it is for,
            repetition where its text is.
        kind: (N,) TEXT, MEMORY or REPEAT.
        zone: (N,) number of the zone.
        labels: (B,N) what each position shall say, not shifted; -100 for nothing.
    """

    ids: Tensor
    positions: Tensor
    kind: Tensor
    zone: Tensor
    labels: Tensor

    @property
    def mask(self) -> MaskMod:
        """Who sees whom, of indices into the packed sequence."""
        kind, zone = self.kind, self.zone

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            same = zone[i] == zone[j]
            repeats = (kind[i] == REPEAT) & ((kind[j] == MEMORY) & same | (i == j))
            reads = (kind[i] != REPEAT) & (j <= i)
            return repeats | reads & ((kind[j] == MEMORY) | (kind[j] == TEXT) & same)

        return sees

    def dense(self) -> Tensor:
        """The mask as models take it: (1,1,N,N) bool."""
        at = torch.arange(len(self.kind), device=self.kind.device)
        return self.mask(at, at, at[:, None], at)[None, None]


def loma_batch(loma: LoMA, ids: Tensor) -> LomaBatch:
    """Pack ids (B,n) for training; a last part of less than t*c tokens has no memory.

    Raises:
        UsageError: ids that are no (B,n), or shorter than a zone.
    """
    t, c, size = loma.t, loma.c, loma.zone
    if ids.dim() != 2 or ids.shape[1] < size:
        raise UsageError(
            f"ids of shape {tuple(ids.shape)}; expected (B,n) with at least one zone of {size}"
        )
    rows, n = ids.shape
    memory, repeat = (
        _rows(x, rows, m, ids.device) for x, m in ((loma.memory, t), (loma.repeat, size))
    )
    following = F.pad(ids[:, 1:], (0, 1), value=NONE)
    at = torch.arange(n, device=ids.device)
    packed, labels, positions, kind, zone = [], [], [], [], []
    for number, start in enumerate(range(0, n, size)):
        text = slice(start, min(start + size, n))
        parts = [(TEXT, ids[:, text], following[:, text], at[text])]
        if start + size <= n:
            nothing = torch.full_like(memory, NONE)
            parts.append((MEMORY, memory, nothing, at[start + c - 1 : start + size : c]))
            parts.append((REPEAT, repeat, ids[:, text], at[text]))
        for what, tokens, wanted, where in parts:
            packed.append(tokens)
            labels.append(wanted)
            positions.append(where)
            kind.append(torch.full_like(where, what))
            zone.append(torch.full_like(where, number))
    return LomaBatch(torch.cat(packed, 1), torch.cat(positions)[None], torch.cat(kind),
                     torch.cat(zone), torch.cat(labels, 1))  # fmt: skip


def loma_loss(loma: LoMA, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean nats of the next token and of a repeated one; training minimises their sum.

    Args:
        ids: (B,n).
    """
    batch = loma_batch(loma, ids)
    logits = loma.model(
        batch.ids, attention_mask=batch.dense(), position_ids=batch.positions, use_cache=False
    ).logits
    repeats = batch.kind == REPEAT
    following, repetition = (
        F.cross_entropy(logits[:, at].flatten(0, 1), batch.labels[:, at].flatten())
        for at in (~repeats, repeats)
    )
    return following, repetition


@torch.no_grad()
def loma_reconstruct(loma: LoMA, ids: Tensor) -> float:
    """Share of the tokens of all complete zones of ids (B,n) that their memory repeats."""
    if ids.shape[1] < loma.zone:
        raise UsageError(f"{ids.shape[1]} tokens are less than a zone of {loma.zone}")
    cache = LoMACache(loma)
    loma.model(ids, past_key_values=cache)
    said = torch.cat([loma.repeated(cache, zone) for zone in range(len(cache.zones))], 1)
    return (said == ids[:, : said.shape[1]]).float().mean().item()


class Zone(NamedTuple):
    """Entries that stand for a zone, and the position of its first token."""

    slots: slice
    position: int
    folded: bool


class LoMALayer(DeferredLayer):
    """Memory, and then the running zone."""

    def __init__(self, cache: "LoMACache"):
        super().__init__()
        self.cache = cache

    @property
    def length(self) -> int:
        return self.keys.shape[2] if self.is_initialized else 0

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Visible, *,
        positions: Tensor, scaling: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        if not visible.causal or visible.valid is not None:
            raise UsageError(
                "zones are counted alike in all rows and seen whole: a LoMACache takes no padding, "
                "no mask of its own and no sliding window; batch rows of one length"
            )
        if self.cache.repeating is not None:
            at = self.cache.repeating
            k, v = torch.cat([self.keys[:, :, at], k], 2), torch.cat([self.values[:, :, at], v], 2)
            memory = at.stop - at.start
            mask: MaskMod = lambda b, h, i, j: (j < memory) | (j - memory == i)  # noqa: E731
        else:
            mask = Causal(self.length)
            if self.is_initialized:
                k, v = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
            self.keys, self.values, self.is_initialized = k, v, True
            self.seen += q.shape[2]
        return attention_with_lse(q, k, v, mask=mask, scale=scaling)[0].transpose(1, 2)

    def fold(self, memory: int, dropped: slice) -> None:
        """Forget entries; the last `memory` tokens that were read are no text."""
        for name in ("keys", "values"):
            x = getattr(self, name)
            kept = [x[:, :, : dropped.start], x[:, :, dropped.stop :]]
            setattr(self, name, torch.cat(kept, 2))
        self.seen -= memory

    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def reset(self) -> None:
        self.keys = self.values = self._waiting = None
        self.is_initialized, self.seen = False, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]


class LoMACache(Cache):
    """What a prepared model remembers; pass it as `past_key_values`.

    Args:
        lossless: fold a zone only if its memory repeats it in every row.

    Attributes:
        zones: complete zones so far.
    """

    def __init__(self, loma: LoMA, *, lossless: bool = False):
        plain = DynamicCache(config=loma.model.config).layers
        if any(type(layer) is not DynamicLayer for layer in plain):
            raise UsageError(
                f"{type(loma.model).__name__} has layers that do not attend to everything; their "
                "text cannot be folded: use DynamicCache"
            )
        self.loma, self.lossless = loma, lossless
        self.zones: list[Zone] = []
        # Slots of the zone that is being repeated.
        self.repeating: slice | None = None
        self._ids: Tensor | None = None
        super().__init__(layers=[LoMALayer(self) for _ in plain])

    @property
    def rows(self) -> int:
        return self.layers[0].keys.shape[0]

    @property
    def running(self) -> int:
        """Tokens of the running zone."""
        return self.get_seq_length() - len(self.zones) * self.loma.zone

    def nbytes(self) -> int:
        """Bytes held between two forward passes."""
        held = sum(layer.nbytes() for layer in self.layers)
        return held + (0 if self._ids is None else self._ids.nbytes)

    def note(self, ids: Tensor) -> None:
        """The running zone's next ids (B,n)."""
        if self.lossless:
            self._ids = ids.clone() if self._ids is None else torch.cat([self._ids, ids], 1)

    @torch.no_grad()
    def fold(self, forward: Any) -> None:
        """Write the complete running zone into memory and drop its text."""
        loma, end, length = self.loma, self.get_seq_length(), self.layers[0].length
        start = end - loma.zone
        device = self.layers[0].keys.device
        positions = torch.arange(start + loma.c - 1, end, loma.c, device=device)[None]
        ids = _rows(loma.memory, self.rows, loma.t, device)
        forward(ids, position_ids=positions, past_key_values=self, use_cache=True)
        text, memory = slice(length - loma.zone, length), slice(length, length + loma.t)
        self.zones.append(Zone(memory, start, True))
        folded = True
        if self.lossless:
            folded = torch.equal(loma.repeated(self, -1), self._ids)
            self._ids = None
        kept = slice(text.start, text.start + loma.t) if folded else text
        self.zones[-1] = Zone(kept, start, folded)
        for layer in self.layers:
            layer.fold(loma.t, text if folded else memory)

    def reset(self) -> None:
        super().reset()
        self.zones, self._ids = [], None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._ids = None if self._ids is None else self._ids[beam_idx]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._ids = None if self._ids is None else self._ids[indices]


def _rows(token: int, rows: int, count: int, device: torch.device) -> Tensor:
    return torch.full((rows, count), token, device=device)


def _read(forward: Any, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a prepared model: with a LoMACache zone by zone."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, LoMACache) or cache.repeating is not None:
        return forward(input_ids, *args, **kwargs)
    mask, positions = kwargs.pop("attention_mask", None), kwargs.pop("position_ids", None)
    if input_ids is None or args or (mask is not None and not bool(mask.all())):
        raise UsageError(
            "a LoMACache reads input_ids in rows of one length: pass them without padding, and "
            "other arguments by name"
        )
    logits = []
    for part in _zones(input_ids.shape[1], cache.running, cache.loma.zone):
        if positions is not None:
            kwargs["position_ids"] = positions[:, part]
        out = forward(input_ids[:, part], **kwargs)
        logits.append(out.logits)
        cache.note(input_ids[:, part])
        if cache.running == cache.loma.zone:
            cache.fold(forward)
    keep = kwargs.get("logits_to_keep") or 0
    out.logits = torch.cat(logits, 1)[:, -keep:]
    # No text holds these two.
    out.logits[..., [cache.loma.memory, cache.loma.repeat]] = -torch.inf
    return out


def _zones(n: int, running: int, size: int) -> list[slice]:
    """n more tokens as parts that end where zones do."""
    cuts = [0, *range(size - running, n, size), n]
    return [slice(a, b) for a, b in pairwise(cuts)]
