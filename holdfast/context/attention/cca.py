"""CCA (079): the far past as one core token per group, the near past token by token.

Keeps    one pair per group of g tokens that is complete, and the last tokens themselves.
Form     core keys rotated to the last token of their group, in the dtype of keys.
Bytes    2*L*B*H*(n//g + e)*d*b after n tokens, where e = n - g*max(0, (n+1-s)//g) <= s+g-2 tokens
         are kept themselves; while tokens are appended one layer's twice. A sequence has
         B*Hq*n*(s + n/g) logits; none is kept.
Source   Chen, You, Zhang, Qiu, Zhuang, Tan, Liu, "Core Context Aware Attention for Long Context
         Language Modeling", 2024. No code was published.
Departs  a group's last query weighs its tokens in every head, and heads are averaged. The core
         token is the mean of the group's hidden states by these weights; because projections are
         affine and weights sum to one, its key and value are the same means of keys, turned to one
         position, and of values, so no hidden state is kept. The exact past begins right behind the
         last group that is seen as a core token: the paper's range covers one token twice. Both
         are one softmax, merged by log-sum-exp.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from holdfast import attach
from holdfast.context import interface, rope
from holdfast.context.cache import deferred
from holdfast.context.cache.deferred import DeferredLayer
from holdfast.context.interface import Visible
from holdfast.context.kernels import attention_with_lse, merge_lse
from holdfast.context.masks import Causal, MaskMod
from holdfast.context.rope import Rope
from holdfast.errors import UsageError

NAME = "cca"
# Queries that look together: what bounds masks and the keys that are seen as they are.
QUERIES = 512


class Groups(NamedTuple):
    """Tokens behind one core token, g; last tokens that are always seen themselves, s."""

    group: int
    window: int
    rope: Rope | None = None

    def seen(self, token: int) -> int:
        """Core tokens that token i sees, counted from 1: they stand for tokens 1 ... g * this."""
        return max(0, (token - self.window) // self.group)


@dataclass(frozen=True, eq=False)
class CCAttention:
    """A model that attends to core tokens; `remove`, or leaving a `with`, undoes it."""

    model: PreTrainedModel
    groups: Groups
    _attached: attach.Handle
    _used: interface.Use

    @classmethod
    def apply(cls, model: PreTrainedModel, *, group: int = 16, window: int = 1024) -> "CCAttention":
        """Switch a model. Its weights stay; it must learn to read core tokens from long texts.

        Both numbers may be others afterwards: remove, and apply again.

        Args:
            group: tokens behind one core token.
            window: last tokens that are always seen themselves, the own one among them.

        Raises:
            UsageError: a number below 1, or a model whose attention is not of this kind.
        """
        if group < 1 or window < 1:
            raise UsageError(
                f"group={group}, window={window}: a group holds 1 token or more, and a token sees "
                "at least itself; use for example group=16, window=1024"
            )
        layers = [
            module
            for module in model.modules()
            if hasattr(module, "layer_idx") and getattr(module, "is_causal", False)
        ]
        plain = DynamicCache(config=model.config).layers
        if not layers or any(type(layer) is not DynamicLayer for layer in plain):
            raise UsageError(
                f"{type(model).__name__} has layers without causal attention to all tokens, which "
                "core tokens stand for"
            )
        norms = [name for name, _ in layers[0].named_children() if "norm" in name]
        if norms:
            raise UsageError(
                f"{type(model).__name__} normalises keys after their projection ({norms[0]}), so "
                "that a mean of keys is not the key of a mean; use a model without it"
            )
        kind = next(iter(getattr(model.config, "layer_types", None) or [None]))
        found = Rope.from_model(model, kind) if rope.find(model, kind) else None
        groups, attached = Groups(group, window, found), attach.Handle()
        used = interface.use(model, NAME)
        for layer in layers:
            attached += attach.wrap(layer, partial(_told, groups))
        return cls(model, groups, attached, used)

    def cache(self) -> "CCACache":
        """What `generate` needs: pass it as `past_key_values`."""
        layers = len(DynamicCache(config=self.model.config).layers)
        return CCACache(layers=[CCALayer(self.groups) for _ in range(layers)])

    def remove(self) -> None:
        """Give the model its own attention back; a second call does nothing."""
        self._attached.remove()
        self._used.remove()

    def __enter__(self) -> "CCAttention":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _told(groups: Groups, forward: Any, *args: Any, **kwargs: Any) -> Any:
    return forward(*args, groups=groups, **kwargs)


def cca_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Groups,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Attention of a whole sequence, for training.

    Args:
        q: (B,Hq,n,d), rotated.
        k: (B,H,n,d), rotated, with Hq a multiple of H.
        v: (B,H,n,dv).
        scale: of the scores; d ** -0.5 by default.
        dropout: share of the weights that are dropped.
        seed: of the dropout.

    Returns:
        (B,Hq,n,dv) in q's dtype.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    whole = q.shape[2] // groups.group * groups.group
    ends = q[:, :, groups.group - 1 : whole : groups.group]
    cores = core_pairs(ends, k[:, :, :whole], v[:, :, :whole], groups, scale)
    return _look(q, (k, v), cores, groups, scale, dropout=dropout, seed=seed)


def core_pairs(
    ends: Tensor, k: Tensor, v: Tensor, groups: Groups, scale: float
) -> tuple[Tensor, Tensor]:
    """Keys (B,H,f,d) and values (B,H,f,dv) of core tokens.

    Args:
        ends: (B,Hq,f,d) queries of the last tokens of f groups.
        k, v: (B,H,f*g,d) and (B,H,f*g,dv).
    """
    group = groups.group
    keys, values = (x.unflatten(2, (-1, group)) for x in (k, v))
    queries = ends.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bhrfd,bhfgd->bhrfg", queries, keys) * scale
    precise = torch.promote_types(k.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=precise).mean((1, 2)).to(k.dtype)
    if groups.rope is not None:
        # Rotating forward by the distance to the group's end needs no position.
        ages = torch.arange(group - 1, -1, -1, device=k.device)
        table = groups.rope.table(ages)
        # Some types scale what they rotate; keys are scaled already.
        keys = _Turn.apply(keys, table / table[0, -1], groups.rope)
    key, value = (torch.einsum("bfg,bhfgd->bhfd", weights, x) for x in (keys, values))
    return key, value


class _Turn(torch.autograd.Function):
    """`Rope.turn`, which writes in place, with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, rope: Rope) -> Tensor:
        ctx.table, ctx.rope = table, rope
        return rope.turn(x, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        cos, sin = ctx.table
        return ctx.rope.turn(grad, torch.stack([cos, -sin])), None, None


def _look(
    q: Tensor, exact: tuple[Tensor, Tensor], cores: tuple[Tensor, Tensor], groups: Groups,
    scale: float, *, first: int = 0, read: int = 0, dropout: float = 0.0, seed: int = 0,
) -> Tensor:  # fmt: skip
    """One softmax over core tokens and exact ones.

    Args:
        q: (B,Hq,n,d) of the tokens behind `read` others.
        exact: keys and values of tokens `first` ... read + n - 1.
        cores: those of all groups.
    """
    g = groups.group
    outs = []
    for start in range(0, q.shape[2], QUERIES):
        rows = slice(start, min(start + QUERIES, q.shape[2]))
        # Tokens counted from 1, as the paper does; as an index the first of them is `own - 1`.
        own, last = read + rows.start + 1, read + rows.stop
        fewest, most = groups.seen(own), groups.seen(last)
        near = [x[:, :, fewest * g - first : last - first] for x in exact]
        masks = _masks(own, fewest, most, groups)
        far = [x[:, :, :most] for x in cores]
        parts = [
            attention_with_lse(q[:, :, rows], *pair, mask=mask, scale=scale, dropout=dropout,
                               seed=seed + 2 * start + at)
            for at, (pair, mask) in enumerate(zip((near, far), masks, strict=True))
            if pair[0].shape[2]
        ]  # fmt: skip
        outs.append(merge_lse(parts)[0] if len(parts) > 1 else parts[0][0])
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _masks(own: int, fewest: int, most: int, groups: Groups) -> tuple[MaskMod, MaskMod | None]:
    """Of exact tokens behind `fewest` groups and of core tokens, for tokens from `own` on.

    The first of them sees `fewest` core tokens, the last `most`.
    """
    g, s = groups.group, groups.window
    ordered = Causal(own - 1 - fewest * g)
    if fewest == most:
        return ordered, None

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ordered(b, h, i, j) & (j >= ((own + i - s) // g - fewest) * g)

    return near, lambda b, h, i, j: j < (own + i - s) // g


def cca_ref(
    q: Tensor, k: Tensor, v: Tensor, groups: Groups, *, scale: float | None = None
) -> Tensor:
    """`cca_attention`, token by token."""
    n, ratio, g = q.shape[2], q.shape[1] // k.shape[1], groups.group
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = (x.repeat_interleave(ratio, 1) for x in (k, v))
    core_keys, core_values = [], []
    for end in range(g, n + 1, g):
        inside = slice(end - g, end)
        query = q[:, :, end - 1 : end]
        weights = (query @ keys[:, :, inside].mT * scale).softmax(-1).mean(1, keepdim=True)
        turned = keys[:, :, inside]
        if groups.rope is not None:
            at = torch.arange(end - g, end)[None, None]
            turned = groups.rope.unrotate(turned, at)
        pooled = weights @ turned
        if groups.rope is not None:
            pooled = groups.rope.rotate(pooled, torch.full((1, 1, 1), end - 1))
        core_keys.append(pooled)
        core_values.append(weights @ values[:, :, inside])
    outs = []
    for i in range(1, n + 1):
        j = groups.seen(i)
        own_keys = torch.cat([*core_keys[:j], keys[:, :, g * j : i]], 2)
        own_values = torch.cat([*core_values[:j], values[:, :, g * j : i]], 2)
        outs.append((q[:, :, i - 1 : i] @ own_keys.mT * scale).softmax(-1) @ own_values)
    return torch.cat(outs, 2)


class CCALayer(DeferredLayer):
    """Core tokens of one layer, and the tokens that the next one may still see themselves."""

    attention = NAME
    _FIELDS = ("core_keys", "core_values", "keys", "values")

    def __init__(self, groups: Groups):
        super().__init__()
        self.groups = groups

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Visible, *,
        positions: Tensor | None = None, scaling: float, window: int | None = None,
    ) -> Tensor:  # fmt: skip
        if not self.is_initialized:
            for name, x in zip(self._FIELDS, (k, v, k, v), strict=True):
                setattr(self, name, x.new_empty(*x.shape[:2], 0, x.shape[3]))
            self.is_initialized = True
        g, read, end = self.groups.group, self.seen, self.seen + q.shape[2]
        # What lies before this is seen as core tokens alone.
        first = g * self.groups.seen(read + 1)
        keys, values = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        old, new = read // g, end // g
        if new > old:
            ends = q[:, :, (old + 1) * g - 1 - read :: g][:, :, : new - old]
            inside = slice(old * g - first, new * g - first)
            core_key, core_value = core_pairs(
                ends, keys[:, :, inside], values[:, :, inside], self.groups, scaling
            )
            self.core_keys = torch.cat([self.core_keys, core_key], 2)
            self.core_values = torch.cat([self.core_values, core_value], 2)
        cores = self.core_keys, self.core_values
        out = _look(q, (keys, values), cores, self.groups, scaling, first=first, read=read)
        self.seen = end
        gone = g * self.groups.seen(end + 1) - first
        # A view would hold what is gone.
        self.keys, self.values = (x[:, :, gone:].clone() if gone else x for x in (keys, values))
        return out.transpose(1, 2)

    def nbytes(self) -> int:
        return (
            sum(getattr(self, name).nbytes for name in self._FIELDS) if self.is_initialized else 0
        )

    def reset(self) -> None:
        for name in self._FIELDS:
            setattr(self, name, None)
        self.is_initialized, self.seen, self._waiting = False, 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for name in self._FIELDS if self.is_initialized else ():
            setattr(self, name, getattr(self, name)[indices])


class CCACache(Cache):
    """What a model with core tokens keeps; `CCAttention.cache` makes it."""

    def nbytes(self) -> int:
        """Bytes held between two forward passes."""
        return sum(layer.nbytes() for layer in self.layers if isinstance(layer, CCALayer))


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Visible, *,
    scaling: float, dropout: float = 0.0, groups: Groups | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Hugging Face attention "cca"; `CCAttention.apply` sets it, and tells layers their groups."""
    layer = deferred.waiting(k)
    if groups is None:
        raise UsageError(f"attention {NAME!r} needs groups; set it by CCAttention.apply(model)")
    if not visible.causal:
        raise UsageError(
            f"{type(module).__name__} hides keys by a window or a mask of its own; core tokens "
            "stand for the whole past: pass no 4-D mask"
        )
    valid = visible.valid
    # Nobody before it sees padding on the right.
    if valid is not None and (layer is not None or bool((valid[:, 1:] & ~valid[:, :-1]).any())):
        raise UsageError(
            "groups are counted alike in all rows, and this batch has padding; batch rows of one "
            "length, or pad on the right where nothing is cached"
        )
    if layer is not None:
        assert isinstance(layer, CCALayer)
        return layer.attend(module, q, k, v, visible, scaling=scaling), None
    if k.shape[2] != q.shape[2]:
        raise UsageError(
            f"{q.shape[2]} queries and {k.shape[2]} keys: core tokens need the queries of all "
            "tokens; pass past_key_values=cca.cache(), or use_cache=False"
        )
    seed = int(torch.randint(2**31, ())) if dropout else 0
    out = cca_attention(q, k, v, groups, scale=scaling, dropout=dropout, seed=seed)
    return out.transpose(1, 2), None


interface.register(NAME, _attend)
