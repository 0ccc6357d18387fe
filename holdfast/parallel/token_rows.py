"""What a transformer block saves for backward, by storage and by token.

A block is taken apart into `y = post(x, attend(*pre(x)))`. Everything outside attention treats
tokens one by one, so any rows of what `pre` and `post` save can be computed again from those rows
of x and of attention's output. Hooks on saved tensors keep autograd's own graph: recomputed or
copied rows are put where the graph looks for them.
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from holdfast.errors import HoldfastError, UsageError
from holdfast.places import SavedTensorChanged

WHOLE, ROWS, KEPT = "whole", "rows", "kept"
# How far some rows of a product may be from these rows of the whole product, to its largest.
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
_See = Callable[[int, Tensor], None]


class LlamaParts:
    """Blocks built as Hugging Face's LLaMA: norm, rotary attention, norm, MLP."""

    modules = ("self_attn.q_proj", "self_attn.o_proj", "input_layernorm",
               "post_attention_layernorm", "mlp")  # fmt: skip

    def __init__(self, block: Any):
        self.block, self.scale = block, block.self_attn.scaling

    def inputs(self, x: Tensor, attention_mask=None, *, position_embeddings, **_: Any):
        return x, position_embeddings, attention_mask

    def pre(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at, normed = self.block.self_attn, self.block.input_layernorm(x)
        q, k, v = (
            project(normed).unflatten(-1, (-1, at.head_dim)).transpose(1, 2)
            for project in (at.q_proj, at.k_proj, at.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        groups = q.shape[1] // k.shape[1]
        if x.device.type == "cpu" and groups > 1:
            # There attention repeats them itself, out of reach of what computes rows again.
            k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        return q, k, v

    def post(self, x: Tensor, attention: Tensor) -> Tensor:
        x = x + self.block.self_attn.o_proj(attention)
        return x + self.block.mlp(self.block.post_attention_layernorm(x))


class GPT2Parts:
    """Hugging Face's GPT-2 block."""

    modules = ("attn.c_attn", "attn.c_proj", "ln_1", "ln_2", "mlp")

    def __init__(self, block: Any):
        self.block, self.scale = block, block.attn.scaling

    def inputs(self, x: Tensor, _cache=None, attention_mask=None, encoder=None, **_: Any):
        if encoder is not None:
            raise UsageError("memo runs blocks without cross-attention")
        return x, (), attention_mask

    def pre(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = self.block.attn
        parts = at.c_attn(self.block.ln_1(x)).split(at.split_size, dim=2)
        q, k, v = (t.unflatten(-1, (-1, at.head_dim)).transpose(1, 2) for t in parts)
        return q, k, v

    def post(self, x: Tensor, attention: Tensor) -> Tensor:
        x = self.block.attn.resid_dropout(self.block.attn.c_proj(attention)) + x
        return x + self.block.mlp(self.block.ln_2(x))


class OwnParts:
    """A block that has `pre` and `post` itself, with causal attention between them."""

    scale = None

    def __init__(self, block: Any):
        self.pre, self.post = block.pre, block.post

    def inputs(self, x: Tensor, *rows: Tensor):
        return x, rows, None


Parts = LlamaParts | GPT2Parts | OwnParts


def parts_of(block: nn.Module) -> Parts:
    """The adapter of a block: what it is called with, `pre` and `post`.

    Raises:
        UsageError: none fits.
    """
    if hasattr(block, "pre") and hasattr(block, "post"):
        return OwnParts(block)
    present = {name for name, _ in block.named_modules()}
    for kind in (LlamaParts, GPT2Parts):
        if present.issuperset(kind.modules):
            return kind(block)
    raise UsageError(
        f"{type(block).__name__} is built neither as LLaMA's block nor as GPT-2's; give it methods "
        "pre(x) -> (q, k, v) and post(x, attention) -> y"
    )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """q (B,Hq,n,d), k and v (B,H,n,d) -> (B,n,Hq*d) by torch's kernels; causal without a mask."""
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Base:
    """A saved storage of `count` elements; one of ROWS is (outer, tokens, inner) in memory.

    WHOLE are the input and what attention saves; KEPT has no tokens and stays on the device.
    """

    kind: str
    dtype: torch.dtype
    count: int
    inner: int = 1

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def rows(self, flat: Tensor, tokens: int) -> Tensor:
        return flat.view(-1, tokens, self.inner)


@dataclass(frozen=True)
class Layout:
    """What a block saves: for each saved tensor outside attention its storage; the storages.

    `nbytes` are those of the input, of attention and of the rest.
    """

    saved: list[int | None]
    bases: list[Base]
    nbytes: tuple[int, int, int]
    tokens: int


class _Place(NamedTuple):
    """A tensor within a saved storage."""

    number: int
    shape: Sequence[int]
    stride: Sequence[int]
    offset: int


class _Enough(Exception):
    """All rows that were wanted have been computed."""


class Record:
    """Runs a block's forward and holds what autograd saves in it, by storage, until backward.

    Args:
        parts: of the block, called with `x`, `rows` and `mask`.
        apart: tensors that are nobody's activations, such as weights.
        wanted: called with this record whenever backward asks for something.

    Attributes:
        flat: the storages' elements on the device; None while they are away.
    """

    def __init__(
        self,
        parts: Parts,
        x: Tensor,
        rows: tuple[Tensor, ...],
        mask: Tensor | None,
        *,
        apart: Sequence[Tensor],
        wanted: Callable[["Record"], None],
    ):
        self.parts, self.wanted = parts, wanted
        self.wait: Callable[[], None] = lambda: None
        self.flat: list[Tensor | None] = []
        # None where the bytes were brought back by a copy.
        self.versions: list[int | None] = []
        self.saved: list[int | None] = []
        self.forms: list[tuple[torch.Size, tuple[int, ...]]] = []
        self._index: dict[int, int] = {}
        shared = [*apart, *rows] if mask is None else [*apart, *rows, mask]
        self._apart = {t.untyped_storage()._cdata for t in shared}
        self._rows, self._attending = rows, False
        self._whole: set[int] = set()
        with saved_tensors_hooks(self._pack, self._unpack):
            self.x = self._add(x, whole=True)
            qkv = self._pre(x, rows, self._pack)
            self._attending = True
            attention = attend(*qkv, mask, parts.scale)
            self.attention = self._add(attention, whole=True)
            self._attending = False
            self.made = (*qkv, parts.post(x, attention))
        self._needs_grad = x.requires_grad, attention.requires_grad

    def take(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and y of the forward, once: held here they would hold the graph that holds us."""
        made = self.made
        del self.made
        return made

    def _pre(
        self, x: Tensor, rows: tuple[Tensor, ...], pack: Callable[[Tensor], Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.parts.pre(x, *rows)
        for tensor in (q, k, v):
            # Attention saves it.
            if tensor.requires_grad:
                pack(tensor)
        return q, k, v

    def _add(self, tensor: Tensor, *, whole: bool) -> _Place:
        storage = tensor.untyped_storage()
        index = self._index.setdefault(storage._cdata, len(self.flat))
        if index == len(self.flat):
            # It shares the version counter, so that a change in place is seen.
            self.flat.append(_flat(tensor))
            self.versions.append(tensor._version)
            if whole:
                self._whole.add(index)
        return _Place(index, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _pack(self, tensor: Tensor) -> _Place | Tensor:
        apart = tensor.untyped_storage()._cdata in self._apart
        kept = tensor.detach() if apart else self._add(tensor, whole=self._attending)
        if not self._attending:
            self.saved.append(kept.number if isinstance(kept, _Place) else None)
            self.forms.append((tensor.shape, tensor.stride()))
        return kept

    def _unpack(self, kept: _Place | Tensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self.wanted(self)
        return self._get(kept)

    def _get(self, place: _Place) -> Tensor:
        flat = self._unchanged(place.number)
        if flat is None:
            raise HoldfastError(
                "what this backward needs is gone: run it once, directly after its forward"
            )
        return flat.as_strided(place.shape, place.stride, place.offset)

    def _unchanged(self, number: int) -> Tensor | None:
        flat, version = self.flat[number], self.versions[number]
        if flat is not None and version not in (None, flat._version):
            raise SavedTensorChanged(flat.shape, version, flat._version)
        return flat

    @property
    def away(self) -> bool:
        return self.flat[self.x.number] is None

    def drop(self, bases: Sequence[Base]) -> None:
        """Free the device's bytes, once a copy that is under way has ended."""
        self.wait()
        for i, base in enumerate(bases):
            if base.kind != KEPT and self._unchanged(i) is not None:
                self.flat[i] = None

    def give_up(self) -> None:
        """Its backward will not run any more."""
        self.wait()
        self.flat = [None] * len(self.flat)

    def matches(self, layout: Layout) -> bool:
        counts = [flat.numel() for flat in self.flat if flat is not None]
        return layout.saved == self.saved and counts == [base.count for base in layout.bases]

    def again(self, start: int, stop: int, see: _See) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and y of some tokens; `see` gets what autograd saves, with its number."""
        count = itertools.count()

        def pack(tensor: Tensor) -> None:
            see(next(count), tensor)

        def part(tensor: Tensor, needs_grad: bool = False) -> Tensor:
            # GPT-2's linear takes a view of its input.
            return tensor[:, start:stop].detach().contiguous().requires_grad_(needs_grad)

        x, attention = self._get(self.x), self._get(self.attention)
        rows = tuple(
            r[:, start:stop] if r.dim() > 1 and r.shape[1] == x.shape[1] else r for r in self._rows
        )
        with torch.enable_grad(), saved_tensors_hooks(pack, _never):
            x = part(x, self._needs_grad[0])
            qkv = self._pre(x, rows, pack)
            return *qkv, self.parts.post(x, part(attention, self._needs_grad[1]))

    def recompute(self, layout: Layout, start: int) -> None:
        """Compute the rows from `start` on, of all that has rows, into their places."""
        missing = {i for i, base in enumerate(layout.bases) if base.kind == ROWS}
        if start == layout.tokens or not missing:
            return

        def see(position: int, tensor: Tensor) -> None:
            index = layout.saved[position]
            if index not in missing:
                return
            base, flat = layout.bases[index], self.flat[index]
            assert flat is not None
            part = base.rows(_flat(tensor), layout.tokens - start)
            with torch.no_grad():
                base.rows(flat, layout.tokens)[:, start:].copy_(part)
            missing.remove(index)
            if not missing:
                raise _Enough

        with contextlib.suppress(_Enough):
            self.again(start, layout.tokens, see)

    def examine(self, made: Sequence[Tensor], name: str) -> Layout:
        """Find which storages have rows of tokens, and where.

        Raises:
            UsageError: rows of `made`, which is q, k, v and y, depend on other rows.
        """
        n = made[-1].shape[1]
        half = n // 2
        if half == 0:
            raise UsageError("memo splits sequences and needs 2 tokens or more")
        shapes: list[torch.Size] = []
        first = self.again(0, half, lambda _, t: shapes.append(t.shape))
        second = self.again(half, n, lambda *_: None)
        for what, whole, *halves in zip("qkvy", made, first, second, strict=True):
            if not close(torch.cat(halves, 1 if what == "y" else 2), whole):
                raise UsageError(
                    f"{name} is not token-wise: {what} of {n} tokens differs from {what} of the "
                    f"first {half} and of the other {n - half}, so rows cannot be computed again; "
                    "memo needs blocks that mix tokens in attention alone and have no dropout"
                )
        bases = [self._base(i, shapes, n, half, name) for i in range(len(self.flat))]
        nbytes = [0, 0, 0]
        for i, base in enumerate(bases):
            if base.kind != KEPT:
                nbytes[2 if base.kind == ROWS else int(i != self.x.number)] += base.nbytes
        return Layout(self.saved, bases, (nbytes[0], nbytes[1], nbytes[2]), n)

    def _base(self, index: int, shapes: list[torch.Size], n: int, half: int, name: str) -> Base:
        flat = self.flat[index]
        assert flat is not None
        if index in self._whole:
            return Base(WHOLE, flat.dtype, flat.numel())
        inner: set[int] = set()
        for i, (shape, stride), part in zip(self.saved, self.forms, shapes, strict=True):
            if i == index:
                dims = [d for d, size in enumerate(shape) if size != part[d]]
                rows = len(dims) == 1 and shape[dims[0]] * half == part[dims[0]] * n
                inner.add(stride[dims[0]] if rows else -len(dims))
        step = inner.pop()
        if inner or step < 0 or (step and flat.numel() % (n * step)):
            raise UsageError(
                f"{name} saves {flat.numel()} elements in which memo finds no rows of {n} tokens"
            )
        return Base(ROWS if step else KEPT, flat.dtype, flat.numel(), step or 1)


def close(got: Tensor, want: Tensor) -> bool:
    """Whether two results of the same sums in another order may be what these are."""
    scale = want.abs().max().clamp(min=1)
    return bool((got - want).abs().max() <= _CLOSE.get(want.dtype, 5e-2) * scale)


def _flat(tensor: Tensor) -> Tensor:
    count = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.detach().as_strided((count,), (1,), 0)


def _never(_: Any) -> Tensor:
    raise AssertionError("rows are computed again for what autograd saves, not to run backward")
