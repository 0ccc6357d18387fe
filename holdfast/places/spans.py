"""Saved tensors and the copies behind them, each with its state."""

import enum
import itertools
import math
from typing import TYPE_CHECKING

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from holdfast.errors import HoldfastError
from holdfast.places.copies import Begun, Copies, copies_of

if TYPE_CHECKING:
    from holdfast.places.activations import ActivationStore

_keys = itertools.count()


class State(enum.IntEnum):
    """Life of a store and of each copy in it."""

    NEW = 0
    SAVING = 1  # forward runs, everything is still on the device
    SAVED = 2  # in the arena and on the device
    RELEASED = 3  # in the arena only
    PREPARED = 4  # device memory exists, the copy into it is under way
    LOADED = 5  # on the device again, not all of backward's uses have come
    USED = 6  # all have come; the arena's copy serves a retained graph
    FREED = 7  # nowhere


_NEXT = {
    State.NEW: {State.SAVING},
    State.SAVING: {State.SAVED, State.FREED},
    State.SAVED: {State.RELEASED, State.LOADED, State.FREED},
    State.RELEASED: {State.PREPARED, State.FREED},
    State.PREPARED: {State.LOADED, State.FREED},
    State.LOADED: {State.USED, State.FREED},
    State.USED: {State.PREPARED, State.FREED},
    State.FREED: set(),
}


def step(now: State, to: State) -> State:
    if to not in _NEXT[now]:
        allowed = ", ".join(state.name for state in sorted(_NEXT[now])) or "nothing"
        raise HoldfastError(
            f"an activation store cannot go from {now.name} to {to.name}, only to {allowed}; "
            "make a new store for each forward"
        )
    return to


class SavedTensorChanged(HoldfastError, RuntimeError):
    """A tensor that backward needs was changed in place after it was saved."""

    def __init__(self, shape: tuple[int, ...], saved: int, now: int):
        super().__init__(
            f"a tensor of shape {tuple(shape)} saved for backward was changed in place "
            f"(version {saved} was saved, it is at {now}); use the out-of-place operation"
        )


class Kept:
    """A saved tensor that stays where it is."""

    def __init__(self, tensor: Tensor):
        # detach: a saved output would otherwise hold the node that holds it.
        self.tensor, self.version = tensor.detach(), tensor._version

    def unpack(self) -> Tensor:
        if self.tensor._version != self.version:
            raise SavedTensorChanged(self.tensor.shape, self.version, self.tensor._version)
        return self.tensor


class Moved:
    """One saved tensor: itself while the forward runs, then its place in a span."""

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor.detach()
        self.version = tensor._version
        self.shape, self.stride = tuple(tensor.shape), tensor.stride()
        self.start = int(tensor.storage_offset())
        self.span: Span | None = None

    @property
    def stop(self) -> int:
        dims = zip(self.shape, self.stride, strict=True)
        return self.start + 1 + sum((size - 1) * stride for size, stride in dims)

    @property
    def has_gaps(self) -> bool:
        """Whether a dense copy is smaller, and writing back through the strides is sound."""
        dims = sorted((stride, size) for size, stride in zip(self.shape, self.stride, strict=True))
        reach = 1
        for stride, size in dims:
            if size > 1 and stride < reach:
                return False
            reach += (size - 1) * stride
        return math.prod(self.shape) < self.stop - self.start

    def unpack(self) -> Tensor:
        if self.span is not None:
            return self.span.use(self)
        if self.tensor is None:
            raise HoldfastError(
                "backward through a forward that failed while its activations were being moved; "
                "run the forward again"
            )
        return self.tensor


class Span:
    """A run of device elements that the arena holds as one copy; dies with its last `Moved`."""

    def __init__(self, store: "ActivationStore", saved: list[Moved]):
        first, start = saved[0].tensor, min(s.start for s in saved)
        assert first is not None
        nelements = max(s.stop for s in saved) - start
        self.store, self.start, self.sharers, self.uses = store, start, len(saved), 0
        self.key = next(_keys)
        self.state = State.SAVING
        self.ready: Begun | None = None
        self.device, self.nelements = first.device, nelements
        self.like, self.version = first.new_empty(0), first._version
        self.shape: tuple[int, ...] = (nelements,)
        self.stride: tuple[int, ...] = (1,)
        if saved[0].has_gaps and len({(s.start, s.shape, s.stride) for s in saved}) == 1:
            self.shape, self.stride = saved[0].shape, saved[0].stride
        self.base: Tensor | None = first.as_strided((nelements,), (1,), start)
        if store.arena is not None:
            self.ready = store.arena.put(self.key, self._stored(self.base), self._copies())
        self.state = step(self.state, State.SAVED)

    def _stored(self, base: Tensor) -> Tensor:
        return base.as_strided(self.shape, self.stride, base.storage_offset())

    def _copies(self) -> Copies | None:
        fake = isinstance(self.base, FakeTensor)
        return copies_of(self.device) if self.overlaps and not fake else None

    @property
    def overlaps(self) -> bool:
        wanted = self.store.overlap
        return self.device.type == "cuda" if wanted is None else wanted

    def _wait(self) -> None:
        if self.ready is not None:
            self.ready.wait()
        self.ready = None

    def _check_version(self) -> None:
        # Until it is released, a change after the forward reaches the tensor and perhaps the copy.
        assert self.base is not None
        if self.base._version != self.version:
            raise SavedTensorChanged(self.base.shape, self.version, self.base._version)

    def release(self) -> None:
        """Drop the device's bytes once the arena has them."""
        self.state = step(self.state, State.RELEASED)
        self._check_version()
        self._wait()
        self.base = None

    def prepare(self) -> None:
        """Make device memory and begin to fill it."""
        self.state = step(self.state, State.PREPARED)
        self.base = self.like.new_empty(self.nelements)
        assert self.store.arena is not None
        self.ready = self.store.arena.load(self.key, self._stored(self.base), self._copies())

    def use(self, saved: Moved) -> Tensor:
        self.store.backward_began()
        if self.state in (State.RELEASED, State.USED):
            self.prepare()
        if self.state is State.SAVED:
            self._check_version()
        if self.state is not State.LOADED:
            self.state = step(self.state, State.LOADED)
            self._wait()
        base = self.base
        assert base is not None
        view = base.as_strided(
            saved.shape, saved.stride, base.storage_offset() + saved.start - self.start
        )
        self.uses += 1
        if self.uses == self.sharers and not self.store.retain:
            self.state = step(self.state, State.USED)
            self.base, self.uses = None, 0
        return view

    def free(self) -> None:
        """Give back the bytes of both places."""
        if self.state is not State.FREED:
            self.state = step(self.state, State.FREED)
            if self.ready is not None:
                self.ready.outlive(self.base)
            self.base = self.ready = None
            if self.store.arena is not None:
                self.store.arena.evict(self.key)

    def __del__(self):
        if hasattr(self, "state"):
            self.free()
