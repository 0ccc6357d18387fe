"""Operations and tables of them: what each computes and moves, as a trace shows it.

Bytes are those that an operation reads and writes when it runs by itself, as PyTorch runs it; what
a fused kernel or a cache that grows in place would not move is listed beside them as avoidable,
never mixed in. `holdfast.plan.op_trace` makes the tables.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from holdfast.meter import BACKWARD, StorageLog
from holdfast.plan.trace import Key

# Operations that read of their first tensor only what an index names.
_GATHERS = {"embedding", "index", "index_select", "gather", "take", "nll_loss_forward"}
# Operations that write into their first tensor only what an index names.
_SCATTERS = {"index_put_", "_index_put_impl_", "index_copy_", "index_add_", "scatter_"}
# In-place operations that do not read what they overwrite.
_OVERWRITES = {"copy_", "zero_", "fill_"}
_REDUCTIONS = {
    "mean", "sum", "amax", "amin", "var_mean", "_softmax", "_log_softmax", "native_layer_norm",
    "_softmax_backward_data", "_log_softmax_backward_data", "native_layer_norm_backward",
    "_fused_rms_norm", "_fused_rms_norm_backward",
}  # fmt: skip


@dataclass(frozen=True)
class Gemm:
    """A product of (batch, m, k) and (batch, k, n); `categories` of left, right and result."""

    batch: int
    m: int
    k: int
    n: int
    itemsize: int
    categories: tuple[str, str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of the three matrices."""
        return self.batch * self.itemsize * (self.m * self.k + self.k * self.n + self.m * self.n)


@dataclass(frozen=True)
class Op:
    """One operation that occurs `count` times; every other number is for one occurrence.

    `flops` as `torch.utils.flop_counter` counts them: element-wise arithmetic is free. `traffic`
    holds bytes read and written by category; `fusion` and `append` are the parts of them that
    fusing neighbours, and growing a cache in place, would not move.
    """

    phase: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    flops: int
    traffic: tuple[tuple[str, int], ...]
    fusion: int = 0
    append: int = 0
    gemm: Gemm | None = None
    count: int = 1

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.traffic)

    @property
    def least(self) -> int:
        """Bytes that stay when what is avoidable is avoided."""
        return self.nbytes - self.fusion - self.append

    def lean(self) -> "Op":
        """The same operation without its avoidable bytes."""
        cut = {"temporary": self.fusion, "cache": self.append}
        traffic = tuple((c, nbytes - cut.get(c, 0)) for c, nbytes in self.traffic)
        return replace(self, traffic=traffic, fusion=0, append=0)


@dataclass
class _Row:
    """An operation as it was seen, its storages by number; None is one made before the trace."""

    key: Key
    backward: bool
    region: int
    op: Op
    reads: list[tuple[int | None, int]]
    writes: list[tuple[int | None, int]]
    fusable: bool
    gemm: tuple[tuple[int, int, int, int, int], tuple[int | None, ...]] | None


@dataclass
class Watcher:
    """Notes the operations of one `trace.record`, then makes the table of them."""

    rows: list[_Row] = field(default_factory=list)
    log: StorageLog | None = None
    region: int = 0

    def __call__(self, log, key, func, args, kwargs, result, flops) -> None:
        self.log = log
        name = func._schema.name.partition("::")[2]
        if name.startswith(("empty", "new_empty")):
            return
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        held = {t.untyped_storage()._cdata for t in given}
        if not func._schema.is_mutable:
            # What shares memory with an input, such as _unsafe_view, was not written.
            made = [t for t in made if t.untyped_storage()._cdata not in held]
        if not made:
            return

        def sized(tensor: Tensor) -> tuple[int | None, int]:
            return log.id_of(tensor.untyped_storage()), _nbytes(tensor)

        reads, writes = [sized(t) for t in given], [sized(t) for t in made]
        if name in _GATHERS:
            reads[0] = (reads[0][0], min(reads[0][1], writes[0][1]))
        elif name in _SCATTERS:
            moved = reads[-1][1]
            reads, writes = reads[1:], [(writes[0][0], moved)]
        elif name in _OVERWRITES:
            reads = reads[1:]
        if flops:
            self.region += 1
        like = next((t for t in given + made if t.is_floating_point()), None)
        dtype = torch.float32 if like is None else like.dtype
        shapes = tuple(tuple(t.shape) for t in given)
        self.rows.append(
            _Row(
                key,
                log.phase() == BACKWARD,
                self.region,
                Op("", name, shapes, str(dtype).removeprefix("torch."), flops, ()),
                reads,
                writes,
                not flops and (torch.Tag.pointwise in func.tags or name in _REDUCTIONS),
                _gemm(name, given, made, log),
            )
        )

    def ops(self, times: Callable[[Key], int], phases: tuple[str, str]) -> list[Op]:
        """The rows, equal ones merged; `phases` are the names of forward and backward."""
        assert self.log is not None, "a model runs at least one operation"
        storages = self.log.log.storages
        kind = {sid: s.category for sid, s in enumerate(storages)}
        fused = self._fused(kind)
        found = []
        for row in self.rows:
            traffic: dict[str, int] = {}
            for sid, nbytes in row.reads + row.writes:
                category = _category(kind, sid)
                traffic[category] = traffic.get(category, 0) + nbytes
            gemm = None
            if row.gemm is not None:
                sizes, sids = row.gemm
                gemm = Gemm(*sizes, tuple(_category(kind, s) for s in sids))  # type: ignore[arg-type]
            found.append(
                replace(
                    row.op,
                    phase=phases[row.backward],
                    traffic=tuple(sorted(traffic.items())),
                    fusion=sum(n for sid, n in row.reads + row.writes if sid in fused),
                    append=_append(row, kind),
                    gemm=gemm,
                    count=times(row.key),
                )
            )
        return merged(found)

    def _fused(self, kind: dict[int, str]) -> set[int]:
        """Storages that fused kernels would keep to themselves.

        Born and read only by element-wise operations and reductions of one phase, with no matrix
        product between.
        """
        made: dict[int, tuple] = {}
        lost: set[int] = set()
        used: set[int] = set()
        for row in self.rows:
            here = (row.region, row.backward) if row.fusable else None
            for sid, _ in row.reads:
                if sid is not None and sid in made:
                    used.add(sid)
                    if here is None or made[sid] != here:
                        lost.add(sid)
            for sid, _ in row.writes:
                if sid is None:
                    continue
                if here is None or made.setdefault(sid, here) != here:
                    lost.add(sid)
        return {s for s in made if s in used and s not in lost and kind[s] == "temporary"}


def _nbytes(tensor: Tensor) -> int:
    # An expanded tensor is read many times from few bytes.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _category(kind: dict[int, str], sid: int | None) -> str:
    # Only a cache is older than the trace without being a parameter, buffer or input.
    return "cache" if sid is None else kind[sid]


def _append(row: _Row, kind: dict[int, str]) -> int:
    """Bytes of a concatenation that only copy what the cache held already."""
    if row.op.name != "cat" or _category(kind, row.writes[0][0]) != "cache":
        return 0
    old = sum(n for sid, n in row.reads if _category(kind, sid) == "cache")
    return 2 * old


def _gemm(name: str, given: list[Tensor], made: list[Tensor], log: StorageLog):
    if name in ("addmm", "baddbmm"):
        given = given[1:]
    elif name not in ("mm", "bmm"):
        return None
    left, right = given[0], given[1]
    batch = left.shape[0] if left.dim() == 3 else 1
    sizes = (batch, left.shape[-2], left.shape[-1], right.shape[-1], left.element_size())
    return sizes, tuple(log.id_of(t.untyped_storage()) for t in (left, right, made[0]))


@dataclass(frozen=True)
class OpTable:
    """Operations by phase, and the bytes of each category that must be somewhere meanwhile.

    `resident["temporary"]` is what the largest operation reads and writes of them.
    """

    ops: list[Op]
    resident: dict[str, int]

    def phase(self, name: str) -> list[Op]:
        return [op for op in self.ops if op.phase == name]

    @property
    def phases(self) -> list[str]:
        return list(dict.fromkeys(op.phase for op in self.ops))

    def __add__(self, other: "OpTable") -> "OpTable":
        resident = {
            category: max(self.resident.get(category, 0), other.resident.get(category, 0))
            for category in (*self.resident, *other.resident)
        }
        return OpTable(self.ops + other.ops, resident)


def merged(ops: Iterable[Op]) -> list[Op]:
    """Equal operations as one, in order of first occurrence."""
    counts: dict[Op, int] = {}
    for op in ops:
        kind = replace(op, count=1)
        counts[kind] = counts.get(kind, 0) + op.count
    return [replace(kind, count=count) for kind, count in counts.items()]
