"""ActivationStore: what autograd saves in one block's forward, kept in an arena until backward.

Everything saved while the store is entered stays on the device until the forward ends (storage
pointers are reused, and tensors may still change), then moves to the arena: tensors that share
bytes move once, as one compact copy. Backward loads each copy when it first asks for it.
"""

import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from holdfast.places.arena import Arena
from holdfast.places.spans import Kept, Moved, SavedTensorChanged, Span, State, step

# Moving less than this costs more than it frees.
SMALL_ELEMENTS = 1024


class ActivationStore:
    """Keep what autograd saves inside `with store:` in `arena` until backward.

    The context holds one block's forward and is entered once. Parameters, `keep` and whatever
    shares their storage, storages of at most 1024 elements, wrapper subclasses, sparse and meta
    tensors stay where they are. Each backward loads a copy once, however many saved tensors share
    it; the arena's copy is freed with the last of them, so a retained graph can be run again.

    Args:
        arena: where the copies go; None leaves everything on the device, counted.
        device: move only this device's tensors; None moves all.
        keep: tensors to leave alone besides parameters.
        after: the store of the block before, which `overlap` releases and prefetches.
        overlap: copy on a side stream, on a CPU in a side thread: a block leaves the device when
            the next one has been saved, and is prefetched while that one's backward runs. None:
            on CUDA only.
        retain: what has been loaded stays until the graph goes, for a backward in several parts.

    Raises:
        ArenaFull: leaving the context, the arena cannot hold the block; nothing of it is kept.
        SavedTensorChanged: a saved tensor was changed in place before it left the device.
        HoldfastError: a store is entered twice.
    """

    def __init__(
        self,
        arena: Arena | None,
        *,
        device: torch.device | str | None = None,
        keep: Iterable[Tensor] = (),
        after: "ActivationStore | None" = None,
        overlap: bool | None = None,
        retain: bool = False,
    ):
        self.arena, self.overlap = arena, overlap
        self.retain = retain or arena is None
        self.device = None if device is None else torch.device(device)
        self._keep = {storage for tensor in keep for storage in _storages(tensor)}
        # Weak, or every step would hold all the steps before it.
        self._after = (lambda: None) if after is None else weakref.ref(after)
        self._began = False
        self._state = State.NEW
        self._saved: list[weakref.ref[Moved]] = []
        self._spans: list[weakref.ref[Span]] = []

    @property
    def state(self) -> State:
        """The least advanced state of its copies; FREED when none is left."""
        if self._state is not State.SAVED:
            return self._state
        return min((span.state for span in self._live_spans()), default=State.FREED)

    @property
    def device_bytes(self) -> int:
        """What has been saved and lies on the device now, apart from what always stays there."""
        spans = [span for span in self._live_spans() if span.base is not None]
        return sum(span.nelements * span.like.itemsize for span in spans)

    def __enter__(self) -> "ActivationStore":
        self._state = step(self._state, State.SAVING)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._hooks.__exit__(kind, error, traceback)
        del self._hooks  # it holds this store
        saved = [s for ref in self._saved if (s := ref()) is not None]
        self._saved.clear()
        self._keep.clear()
        try:
            if kind is None:
                self._check_versions(saved)
                self._move(saved)
                self._state = step(self._state, State.SAVED)
        finally:
            if self._state is not State.SAVED:
                self._abandon(saved)

    def prefetch(self) -> None:
        """Begin to load what is only in the arena; without overlap, only tell the arena."""
        waiting = [span for span in self._live_spans() if span.state is State.RELEASED]
        if self.arena is None:
            return
        self.arena.prefetch([span.key for span in waiting if not span.overlaps])
        for span in waiting:
            if span.overlaps:
                span.prepare()

    def release(self) -> None:
        """Drop the device's bytes of everything that has been saved."""
        for span in self._live_spans():
            if self.arena is not None and span.state is State.SAVED:
                span.release()

    def _live_spans(self) -> Iterator[Span]:
        return (span for ref in self._spans if (span := ref()) is not None)

    def _pack(self, tensor: Tensor) -> "Kept | Moved":
        if self._stays(tensor):
            return Kept(tensor)
        saved = Moved(tensor)
        self._saved.append(weakref.ref(saved))
        return saved

    def _stays(self, tensor: Tensor) -> bool:
        if (
            isinstance(tensor, nn.Parameter)
            or isinstance(tensor._base, nn.Parameter)
            or tensor.layout is not torch.strided
            or tensor.is_meta
            or is_traceable_wrapper_subclass(tensor)
            or self.device not in (None, tensor.device, torch.device(tensor.device.type))
        ):
            return True
        storage = tensor.untyped_storage()
        # By storage, not by tensor: a small view would keep a large storage alive.
        small = storage.nbytes() <= SMALL_ELEMENTS * tensor.itemsize
        return small or tensor.numel() == 0 or storage._cdata in self._keep

    @staticmethod
    def _check_versions(saved: list[Moved]) -> None:
        for s in saved:
            assert s.tensor is not None
            if s.tensor._version != s.version:
                raise SavedTensorChanged(s.shape, s.version, s.tensor._version)

    def _move(self, saved: list[Moved]) -> None:
        for group in _overlapping(saved):
            span = Span(self, group)
            for s in group:
                s.span, s.tensor = span, None
            self._spans.append(weakref.ref(span))
            if self.arena is not None and not span.overlaps:
                span.release()
        before = self._after()
        if before is not None:
            before.release()

    def _abandon(self, saved: list[Moved]) -> None:
        for span in self._live_spans():
            span.free()
        for s in saved:
            s.tensor = s.span = None
        self._state = step(self._state, State.FREED)

    def backward_began(self) -> None:
        """Called at each use; the first one prefetches the block that is next in backward."""
        before = None if self._began else self._after()
        self._began = True
        if before is not None:
            before.prefetch()


def _unpack(packed: Kept | Moved) -> Tensor:
    return packed.unpack()


def _storages(tensor: Tensor) -> Iterator[int]:
    """Identities of the storages that hold a tensor, wrapper subclasses opened."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage()._cdata


def _overlapping(saved: list[Moved]) -> list[list[Moved]]:
    """Groups whose element ranges in one storage overlap, in the order in which they began."""
    by_storage: dict[tuple, list[Moved]] = {}
    for s in saved:
        t = s.tensor
        assert t is not None
        # A lazy conjugate is materialised by its copy, so it cannot share with its original.
        key = (t.untyped_storage()._cdata, t.dtype, t.is_conj(), t.is_neg())
        by_storage.setdefault(key, []).append(s)
    groups = []
    for sharing in by_storage.values():
        stop = -1
        for s in sorted(sharing, key=lambda s: s.start):
            if s.start >= stop:
                groups.append([s])
            else:
                groups[-1].append(s)
            stop = max(stop, s.stop)
    return groups
