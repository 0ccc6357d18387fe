"""Births: every storage that a step's operations make, seen in order and put at given addresses.

A dispatch mode below autograd. An operation whose kernel can write into given tensors is given
them; any other is entered with the mode still on, so that what its kernel asks `empty` for comes
here as well: outputs and workspaces of attention, for example. What remains are Python numbers,
which torch turns into tensors of 4 or 8 bytes itself, and what a kernel's further threads allocate,
128 bytes each in attention's backward on a CPU.
"""

import bisect
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from holdfast.errors import HoldfastError

ALIGN = 64
_aten = torch.ops.aten
_EMPTY = (_aten.empty.memory_format, _aten.empty_strided.default)
# Frequent, and known to write into what they are given and no more: nothing to look for inside.
_WRITES = (_aten.copy_.default, _aten.zero_.default, _aten.fill_.Scalar, _aten.add_.Tensor)


class StepChanged(HoldfastError):
    """A planned step asked for other memory than the step that was recorded."""


@dataclass
class Life:
    """One storage of the recorded step, and when it lived; `upper` None outlives the step."""

    nbytes: int
    lower: int
    upper: int | None = None
    like: tuple[torch.Size, tuple[int, ...], torch.dtype] = (torch.Size(), (), torch.uint8)

    @property
    def size(self) -> int:
        return -(-self.nbytes // ALIGN) * ALIGN


@cache
def _out_variant(func: Any, key: str) -> tuple[Any, tuple[str, ...]] | None:
    """The overload of a functional operation that writes into given tensors, if a kernel does."""
    if {str(r.type) for r in func._schema.returns} != {"Tensor"}:
        return None
    arguments = [(a.name, str(a.type)) for a in func._schema.arguments]
    packet = func._overloadpacket
    for name in packet.overloads():
        other = getattr(packet, name)
        outs = [a for a in other._schema.arguments if a.is_out]
        rest = [(a.name, str(a.type)) for a in other._schema.arguments if not a.is_out]
        # Without a kernel of its own, an out variant allocates the result and copies it.
        if (
            len(outs) == len(func._schema.returns)
            and rest == arguments
            and torch._C._dispatch_has_kernel_for_dispatch_key(other.name(), key)
        ):
            return other, tuple(a.name for a in outs)
    return None


@cache
def _enters(func: Any, key: str) -> bool:
    """Whether an operation can be entered below this mode, with the mode on."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = (key, "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    return any(has(func.name(), k) for k in keys)


@cache
def _only_views(func: Any) -> bool:
    # What is made of other operations, as `contiguous` and `reshape` are, sometimes copies.
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return func.is_view and not has(func.name(), "CompositeImplicitAutograd")


def _leaves(values: Iterable[Any]) -> list[Any]:
    """Arguments with lists opened; torch's own way to do this takes as long as a small kernel."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            found += value
        else:
            found.append(value)
    return found


class _Births(TorchDispatchMode):
    """Sees each storage that operations on one type of device make, in order."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self._type = device, device.type
        self._key = device.type.upper()
        self._keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, self._key))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The guard that torch puts around each call takes as long as what is done here.
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(hasattr(t, "__tensor_flatten__") for t in types):
            # Wrapper subclasses first: their inner operations come back here.
            return NotImplemented
        if func.namespace != "aten" or func in _WRITES or _only_views(func):
            return func(*args, **kwargs)
        leaves = _leaves((*args, *kwargs.values()))
        if not self._here(leaves, kwargs):
            return func(*args, **kwargs)
        if func in _EMPTY:
            return self.births(func, leaves, 1, lambda _: func(*args, **kwargs))[0]
        if func is _aten.resize_.default and not args[0].untyped_storage().nbytes():
            return self._grown(func, leaves, args, kwargs)
        variant = None if func._schema.is_mutable else _out_variant(func, self._key)
        if variant is not None:
            return self._functional(func, variant, leaves, args, kwargs)
        if _enters(func, self._key) and not _has_number(func, args):
            # What the kernel asks `empty` for comes here, too.
            with self:
                result = func.redispatch(self._keys, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        self.other(result, leaves)
        return result

    def _functional(self, func, variant, leaves, args, kwargs):
        overload, names = variant

        def run(out: list[Tensor] | None):
            if out is None:
                return func(*args, **kwargs)
            return overload(*args, **kwargs, **dict(zip(names, out, strict=True)))

        made = self.births(func, leaves, len(names), run)
        return made[0] if len(made) == 1 else tuple(made)

    def _grown(self, func, leaves, args, kwargs):
        # Kernels also ask for memory by `empty({0}).resize_(shape)`.
        def run(out: list[Tensor] | None):
            if out is None:
                return func(*args, **kwargs)
            with no_dispatch():
                return args[0].set_(out[0])

        self.births(func, leaves, 1, run)
        return args[0]

    def _here(self, leaves: list[Any], kwargs: dict) -> bool:
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        if not tensors:
            return (
                torch.device(kwargs.get("device") or torch.get_default_device()).type == self._type
            )
        return all(t.device.type == self._type for t in tensors)

    def births(
        self, func: Any, leaves: list[Any], count: int, run: Callable[[list[Tensor] | None], Any]
    ) -> Sequence[Tensor]:
        """The `count` results of an operation; `run` makes them, or fills those it is given."""
        raise NotImplementedError

    def other(self, result: Any, leaves: list[Any]) -> None:
        """The result of an operation whose births, if any, were seen inside it, or not at all."""


class Recording(_Births):
    """Runs plainly and writes down what was born when, and when it died."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.now = 0
        self.lives: list[Life] = []
        self.calls: list[tuple] = []
        self.cuts: list[int] = []
        self._refs: list[weakref.ref] = []

    def cut(self) -> None:
        self.cuts.append(self.now)

    def births(self, func, leaves, count, run):
        # Before the operation runs, which is when a replay has to give the address.
        lives = [Life(0, self._tick()) for _ in range(count)]
        self.lives += lives
        self.calls += [_call(func, leaves)] * count
        result = run(None)
        made = [result] if isinstance(result, Tensor) else list(result)
        for life, tensor in zip(lives, made, strict=True):
            storage = tensor.untyped_storage()
            life.nbytes = storage.nbytes()
            life.like = (tensor.shape, tensor.stride(), tensor.dtype)

            def died(_ref, life=life):
                life.upper = self._tick()

            self._refs.append(weakref.ref(storage, died))
        return made

    def _tick(self) -> int:
        self.now += 1
        return self.now - 1

    def finish(self) -> None:
        # What is freed from now on has outlived the step.
        self._refs.clear()


class Replay(_Births):
    """Gives each birth of a recorded step its address; None is outside the arena.

    So is an address that is still in use, because somebody holds what the recorded step had
    dropped: a wrong guess costs memory and never overwrites anything.
    """

    def __init__(self, recording: Recording, offsets: Sequence[int | None], height: int):
        super().__init__(recording.device)
        self.lives, self.calls, self.offsets = recording.lives, recording.calls, offsets
        self.memory = torch.empty(height, dtype=torch.uint8, device=recording.device)
        self._start = self.memory.data_ptr()
        self._held: list[tuple[int, int]] = []
        self._refs: dict[int, weakref.ref] = {}
        self.begin()

    def begin(self) -> None:
        self._next = self.outside = self.outside_bytes = 0
        self._counted: set[int] = set()

    def births(self, func, leaves, count, run):
        first, self._next = self._next, self._next + count
        call = _call(func, leaves)
        known = self.calls[first] if first < len(self.calls) else None
        if call != known:
            raise StepChanged(
                f"operation {first} of this step is {_readable(call)}, in the recorded one it was "
                f"{_readable(known)}; a planned step must repeat, make another Planned for this one"
            )
        out = [self._place(i) for i in range(first, first + count)]
        if func not in _EMPTY:
            run(out)
        return out

    def _place(self, i: int) -> Tensor:
        life, at = self.lives[i], self.offsets[i]
        shape, stride, dtype = life.like
        if not life.nbytes or at is None or not self._free(at, at + life.nbytes):
            plain = torch.empty_strided(shape, stride, dtype=dtype, device=self.device)
            self._count(plain)
            return plain
        storage = torch._C._construct_storage_from_data_pointer(
            self._start + at, self.memory.device, life.nbytes
        )
        bisect.insort(self._held, (at, at + life.nbytes))
        self._refs[at] = weakref.ref(storage, partial(_released, self._held, self._refs, at))
        # The arena is what a meter counts; its pieces are no storages of their own.
        with no_dispatch():
            return torch.empty(0, dtype=dtype, device=self.device).set_(storage, 0, shape, stride)

    def _count(self, plain: Tensor) -> None:
        nbytes, at = plain.untyped_storage().nbytes(), plain.untyped_storage().data_ptr()
        if nbytes and at not in self._counted:
            self._counted.add(at)
            self.outside += 1
            self.outside_bytes += nbytes

    def other(self, result, leaves):
        given = {t.untyped_storage()._cdata for t in leaves if isinstance(t, Tensor)}
        for tensor in _leaves([result]):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                inside = 0 <= storage.data_ptr() - self._start < self.memory.nbytes
                if storage._cdata not in given and not inside:
                    self._count(tensor)

    def _free(self, start: int, end: int) -> bool:
        """Whether nobody still holds what the recorded step had dropped by now."""
        index = bisect.bisect_left(self._held, (start, end))
        clear_above = index == len(self._held) or self._held[index][0] >= end
        return clear_above and (index == 0 or self._held[index - 1][1] <= start)

    def __del__(self):
        for ref in list(self._refs.values()):
            if (storage := ref()) is not None:
                # It does not own its bytes.
                weakref.finalize(storage, _keep, self.memory)


def _released(held: list[tuple[int, int]], refs: dict[int, weakref.ref], at: int, _: Any) -> None:
    del held[bisect.bisect_left(held, (at, 0))]
    del refs[at]


def _keep(memory: Tensor) -> None:
    """Called when the last tensor in `memory` has died."""


def _has_number(func: Any, args: tuple) -> bool:
    """Whether a Python number stands for a tensor, which only the ordinary way in accepts."""
    given = zip(args, func._schema.arguments, strict=False)
    return any(isinstance(a, int | float) and "Tensor" in str(s.type) for a, s in given)


def _call(func: Any, leaves: list[Any]) -> tuple:
    """What of an operation decides how many bytes its results have."""
    kinds = (Tensor, int, torch.dtype)
    return func, *[a.shape if isinstance(a, Tensor) else a for a in leaves if isinstance(a, kinds)]


def _readable(call: tuple | None) -> str:
    if call is None:
        return "past its end"
    shown = (tuple(a) if isinstance(a, torch.Size) else a for a in call[1:])
    return f"{call[0]}({', '.join(map(str, shown))})"
