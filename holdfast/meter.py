"""Meter: the bytes that a step really holds, by category, at its peak.

Bytes are deterministic, also on a CPU, so a claim about memory is a test. Three backends:

* `logical`: a dispatch mode follows every storage from the operation that makes it to the moment at
  which its last reference goes. The same step under `FakeTensorMode` gives the same bytes without
  allocating any, which is how plans are predicted.
* `allocator`: what torch's CPU allocator handed out, with what operations do not show: kernel
  workspaces, copies of the generator's state, Python numbers that are kept for backward.
* `cuda`: the caching allocator's requested bytes.
"""

import contextlib
import functools
import gc
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from holdfast.errors import UsageError
from holdfast.ledger import CATEGORIES, Ledger
from holdfast.native.allocator import AllocatorPeak, ProfilerPeak

BACKENDS = ("logical", "allocator", "cuda")
FORWARD, BACKWARD, STEP = range(3)
PHASE_NAMES = ("forward", "backward", "step")
# Frames between autograd's engine and the body of a dispatch mode.
_GLUE = ("__torch_dispatch__", "_fn", "inner")


def open_storages(value: Any) -> Iterable[torch.UntypedStorage]:
    """Storages behind every tensor in a nested value; wrapper subclasses are opened."""
    for leaf in tree_leaves(value):
        if not isinstance(leaf, Tensor):
            continue
        if is_traceable_wrapper_subclass(leaf):
            names, _ = leaf.__tensor_flatten__()
            yield from open_storages([getattr(leaf, name) for name in names])
        elif leaf.layout is torch.strided:
            yield leaf.untyped_storage()
        elif leaf.layout is torch.sparse_coo:
            yield from open_storages([leaf._indices(), leaf._values()])


class _Resizes:
    """Tells of every `UntypedStorage.resize_` called from Python, until removed."""

    def __init__(self, tell: Callable[[torch.UntypedStorage, int], None]):
        original = torch.UntypedStorage.resize_

        def resize_(storage, size):
            before = storage.nbytes()
            result = original(storage, size)
            tell(storage, before)
            return result

        self._original = original
        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]

    def remove(self) -> None:
        torch.UntypedStorage.resize_ = self._original  # type: ignore[method-assign]


@dataclass
class Storage:
    """One storage that was seen: `born` is an index into the event log, 0 for seeds."""

    nbytes: int
    place: str
    category: str
    born: int


@dataclass
class Log:
    """What happened, in order: `(storage id, change in bytes, phase)` and marks between events.

    A mark `(position, name, argument)` lies before `events[position]`.
    """

    events: list[tuple[int, int, int]] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    marks: list[tuple[int, str, Any]] = field(default_factory=list)


def _called_by_engine() -> bool:
    """Whether the operation being dispatched is autograd's own, not of a Python function."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name in _GLUE:
        frame = frame.f_back
    # On a GPU the engine runs in a thread without Python frames.
    return frame is None or frame.f_code is torch.autograd.graph._engine_run_backward.__code__


class StorageLog(TorchDispatchMode):
    """Follow every storage while active; `log` is the result.

    Args:
        device: the place named "device"; storages elsewhere count as host. On a CPU everything is
            device, because it is the same memory.
    """

    def __init__(self, device: torch.device | str | None = None):
        super().__init__()
        self.device = torch.device(device or "cpu")
        self.log = Log()
        self._ids: dict[int, int] = {}
        self._refs: dict[int, weakref.ref] = {}
        self.stepping = False
        self._was_backward = False
        self._handles: list[Any] = []
        self._depth = 0
        self._region_start = 0
        self._sum: tuple[int, int, frozenset[int]] | None = None

    def phase(self) -> int:
        if torch._C._current_graph_task_id() != -1:
            return BACKWARD
        return STEP if self.stepping else FORWARD

    def id_of(self, storage: torch.UntypedStorage) -> int | None:
        return self._ids.get(storage._cdata)

    def seed(self, category: str, value: Any) -> None:
        """Count storages that exist already, under a category; the first category wins."""
        for storage in open_storages(value):
            if storage._cdata not in self._ids:
                self._enter(storage, category)

    def tag(self, category: str, value: Any) -> None:
        """Give the live storages of `value` their category."""
        for storage in open_storages(value):
            sid = self.id_of(storage)
            if sid is not None:
                self.log.storages[sid].category = category

    def mark(self, name: str, argument: Any = None) -> None:
        self.log.marks.append((len(self.log.events), name, argument))

    def _enter(self, storage: torch.UntypedStorage, category: str) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        sid = len(self.log.storages)
        # Fake tensors keep their storage on "meta"; FakeTensor.device is not the storage's.
        on_device = storage.device.type in (self.device.type, "meta")
        place = "device" if on_device else "host"
        self.log.storages.append(Storage(nbytes, place, category, len(self.log.events)))
        self._ids[key] = sid
        self.log.events.append((sid, nbytes, self.phase()))

        def gone(_ref, key=key, sid=sid, self_ref=weakref.ref(self)):
            owner = self_ref()
            if owner is not None and owner._ids.get(key) == sid:
                owner._leave(key, sid)

        self._refs[sid] = weakref.ref(storage, gone)

    def _leave(self, key: int, sid: int) -> None:
        del self._ids[key]
        self._refs.pop(sid, None)
        self.log.events.append((sid, -self.log.storages[sid].nbytes, self.phase()))
        if self._sum is not None and sid in self._sum[2]:
            # The engine was the last to hold this gradient, so without us it adds in place: the
            # sum takes over the bytes that leave here.
            total, position, _ = self._sum
            self._sum = None
            phase = self.log.events[position][2]
            self.log.events[position] = (total, 0, phase)
            self.log.events.append((total, self.log.storages[total].nbytes, phase))

    def _note_sum(self, args: tuple, result: Tensor) -> None:
        """Remember a sum of gradients: under any dispatch mode the engine never adds in place."""
        total = self.id_of(result.untyped_storage())
        if total is None or self.log.storages[total].born != len(self.log.events) - 1:
            return
        parts = [
            self.id_of(t.untyped_storage())
            for t in args
            if isinstance(t, Tensor) and t.layout is torch.strided and t.shape == result.shape
        ]
        nbytes = self.log.storages[total].nbytes
        same = frozenset(
            p for p in parts if p is not None and self.log.storages[p].nbytes == nbytes
        )
        self._sum = (total, len(self.log.events) - 1, same)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(self._is_wrapper(t) for t in types):
            # Let the subclass run first: its inner operations come back here, one by one.
            return NotImplemented
        if func.namespace == "prim":
            return func(*args, **kwargs)
        self._note_backward()
        self._sum = None
        result = func(*args, **kwargs)
        before = None
        for storage in open_storages(result):
            key = storage._cdata
            sid = self._ids.get(key)
            if sid is not None:
                known = self.log.storages[sid]
                if known.nbytes != storage.nbytes():
                    change = storage.nbytes() - known.nbytes
                    known.nbytes = storage.nbytes()
                    self.log.events.append((sid, change, self.phase()))
                continue
            if before is None:
                before = {s._cdata for s in open_storages((args, kwargs))}
            if key not in before:
                self._enter(storage, "temporary")
        if func is torch.ops.aten.add.Tensor and self._was_backward and _called_by_engine():
            self._note_sum(args, result)
        return result

    @staticmethod
    def _is_wrapper(kind: type) -> bool:
        return (
            hasattr(kind, "__tensor_flatten__")
            and kind is not torch._subclasses.fake_tensor.FakeTensor
        )

    def _note_backward(self) -> None:
        backward = torch._C._current_graph_task_id() != -1
        if backward and not self._was_backward:
            # What the forward pass made and still holds is saved for backward, or a boundary.
            self._tag_survivors(self._region_start, FORWARD)
            self.mark("backward")
        if not backward and self._was_backward:
            self._region_start = len(self.log.events)
        self._was_backward = backward

    def _tag_survivors(self, since: int, phase: int) -> None:
        for sid in self._ids.values():
            storage = self.log.storages[sid]
            recent = storage.born >= since and self.log.events[storage.born][2] == phase
            if recent and storage.category == "temporary":
                storage.category = "activations"

    # A module that runs its forward inside backward is being recomputed.
    def _before_forward(self, module, args):
        if self.phase() == BACKWARD:
            self._note_backward()
            if self._depth == 0:
                self._recompute_start = len(self.log.events)
            self._depth += 1

    def _after_forward(self, module, args, output):
        if self.phase() == BACKWARD and self._depth:
            self._depth -= 1
            if self._depth == 0:
                self._tag_survivors(self._recompute_start, BACKWARD)

    def _resized(self, storage: torch.UntypedStorage, before: int) -> None:
        sid = self.id_of(storage)
        if sid is not None:
            self.log.storages[sid].nbytes = storage.nbytes()
            self.log.events.append((sid, storage.nbytes() - before, self.phase()))

    def __enter__(self):
        # No operation shows a storage being resized, which is how FSDP frees gathered parameters.
        self._handles.append(_Resizes(self._resized))
        hooks = torch.nn.modules.module
        self._handles += [
            hooks.register_module_forward_pre_hook(self._before_forward),
            hooks.register_module_forward_hook(self._after_forward, always_call=True),
        ]
        self._region_start = len(self.log.events)
        return super().__enter__()

    def __exit__(self, *exc):
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return super().__exit__(*exc)

    def watch_parameters(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Tag and mark gradients at the instant at which autograd has accumulated them."""
        for name, parameter in named:
            if not parameter.requires_grad or not parameter.is_leaf:
                continue

            def accumulated(p, name=name):
                self.tag("gradients", p.grad)
                self.mark("gradient", name)

            handle = parameter.register_post_accumulate_grad_hook(accumulated)
            # Before other hooks: one of them may consume the gradient and free it. Autograd reads
            # the dict's order of insertion, which `move_to_end` does not change.
            hooks = parameter._post_accumulate_grad_hooks
            for key in [key for key in hooks if key != handle.id]:
                hooks[key] = hooks.pop(key)
            self._handles.append(handle)

    def watch_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        def before(*_):
            if self.phase() != BACKWARD:
                self.stepping = True
                self._was_backward = False
                self._region_start = len(self.log.events)
                # A fused step allocates nothing; what stands during it is still the phase's peak.
                self.log.events.append((0, 0, STEP))

        def after(*_):
            self.stepping = False
            self.tag("optimizer", list(optimizer.state.values()))

        self._handles.append(optimizer.register_step_pre_hook(before))
        self._handles.append(optimizer.register_step_post_hook(after))

    def live_bytes(self) -> int:
        return sum(self.log.storages[sid].nbytes for sid in self._ids.values())


@functools.cache
def _load_dispatcher() -> None:
    """Import what the first dispatch imports: its frames would keep a step's tensors alive."""
    with StorageLog():
        torch.zeros(())


def ledger_of(log: Log) -> Ledger:
    """Replay a log: for each place and phase, bytes by category at the instant of its peak."""
    held = {place: dict.fromkeys(CATEGORIES, 0) for place in ("device", "host")}
    totals = dict.fromkeys(held, 0)
    best: dict[tuple[str, int], tuple[int, dict[str, int]]] = {}
    events, storages = log.events, log.storages
    for position, (sid, change, phase) in enumerate(events):
        storage = storages[sid]
        held[storage.place][storage.category] += change
        totals[storage.place] += change
        following = events[position + 1] if position + 1 < len(events) else None
        settled = following is None or following[1] < 0 or following[2] != phase or change > 0
        if settled:
            for place, total in totals.items():
                known = best.get((place, phase))
                if known is None or total > known[0]:
                    best[place, phase] = (total, dict(held[place]))
    ledger = Ledger()
    for (place, phase), (total, cells) in best.items():
        if total:
            ledger.put(place, PHASE_NAMES[phase], cells)
    return ledger


class Meter:
    """Measure what happens in the `with` block: `with Meter(model, optimizer) as m: step()`.

    Args:
        model: its parameters, buffers and present gradients are counted in `base`.
        optimizer: one optimizer or several; their state is counted, their steps are a phase.
        inputs: tensors that exist before the block and belong to it.
        backend: `logical`, `allocator` (CPU) or `cuda`.

    After the block: `base`, `peak`, `end` (integer bytes on the device), `ledger`, `at_peak`
    (category -> bytes, summing to `peak`) and, for the logical backend, `log`. Run one step before:
    the first use of a kernel imports modules whose frames keep tensors alive.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        *,
        inputs: Any = (),
        backend: str = "logical",
    ):
        if backend not in BACKENDS:
            raise UsageError(f"meter backend {backend!r} is unknown; use one of {BACKENDS}")
        if backend == "cuda" and not torch.cuda.is_available():
            raise UsageError("meter backend 'cuda' needs a CUDA device; use 'logical'")
        self.model, self.inputs, self.backend = model, inputs, backend
        if optimizer is None:
            optimizer = ()
        self.optimizers = (
            [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        )
        self.base = self.peak = self.end = 0
        self.ledger = Ledger()

    @property
    def at_peak(self) -> dict[str, int]:
        return self.ledger.at_peak("device")

    @property
    def log(self) -> Log:
        return self._storages.log

    def _device(self) -> torch.device:
        tensors = list(self.model.parameters()) if self.model is not None else []
        return tensors[0].device if tensors else torch.device("cpu")

    def __enter__(self) -> "Meter":
        _load_dispatcher()
        gc.collect()
        self._gc_was_on = gc.isenabled()
        gc.disable()
        getattr(self, f"_enter_{self.backend}")()
        return self

    def __exit__(self, *exc) -> None:
        try:
            getattr(self, f"_exit_{self.backend}")(*exc)
        finally:
            if self._gc_was_on:
                gc.enable()

    def _seeded(self) -> StorageLog:
        storages = StorageLog(self._device())
        if self.model is not None:
            storages.seed("parameters", list(self.model.parameters()))
            storages.seed("buffers", list(self.model.buffers()))
            storages.seed("gradients", [p.grad for p in self.model.parameters()])
        for optimizer in self.optimizers:
            # What an optimizer holds beside its parameters and state, by category.
            for category, tensors in getattr(optimizer, "held", {}).items():
                storages.seed(category, tensors)
            for group in optimizer.param_groups:
                storages.seed("parameters", group["params"])
                storages.seed("gradients", [p.grad for p in group["params"]])
            storages.seed("optimizer", list(optimizer.state.values()))
        storages.seed("inputs", self.inputs)
        return storages

    def _enter_logical(self) -> None:
        self._storages = self._seeded()
        self.base = self._storages.live_bytes()
        if self.model is not None:
            self._storages.watch_parameters(self.model.named_parameters())
        for optimizer in self.optimizers:
            self._storages.watch_optimizer(optimizer)
        self._storages.__enter__()

    def _exit_logical(self, *exc) -> None:
        storages = self._storages
        storages.__exit__(*exc)
        if self.model is not None:
            storages.tag("gradients", [p.grad for p in self.model.parameters()])
        for optimizer in self.optimizers:
            storages.tag("optimizer", list(optimizer.state.values()))
        self.end = storages.live_bytes()
        self.ledger = ledger_of(storages.log)
        self.peak = self.ledger.peak("device")

    def _enter_allocator(self) -> None:
        # The seeds are only counted here; what comes after is the allocator's word.
        self.base = self._seeded().live_bytes()
        # The profiler sees the same where the library is not built, or counts a whole run already.
        self._allocations = AllocatorPeak() if AllocatorPeak.supported()[0] else ProfilerPeak()
        self._allocations.__enter__()

    def _exit_allocator(self, *exc) -> None:
        self._allocations.__exit__(*exc)
        self.peak = self.base + self._allocations.peak
        self.end = self.base + self._allocations.current

    def _enter_cuda(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.base = torch.cuda.memory_stats()["requested_bytes.all.current"]

    def _exit_cuda(self, *exc) -> None:
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        self.peak = stats["requested_bytes.all.peak"]
        self.end = stats["requested_bytes.all.current"]


class _Assume(TorchDispatchMode):
    """Answer the questions that a model asks about its data, where the answer must be known.

    A Hugging Face mask asks whether nothing is padded and positions run on: in training on packed
    sequences, yes. Any other value is unknowable here, and the error says so.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return True
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
            return _grouped_mm(*args[:3])  # torch's own shape rule knows bfloat16 alone
        return func(*args, **(kwargs or {}))


def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """An empty result of a grouped product; two matrices give one product for each group."""
    groups = (ends.numel(),) if a.dim() == b.dim() == 2 else ()
    batch = (a.shape[0],) if a.dim() == b.dim() == 3 else ()
    return a.new_empty(*groups, *batch, a.shape[-2], b.shape[-1])


@contextlib.contextmanager
def fake_step() -> Iterator[FakeTensorMode]:
    """Everything inside allocates nothing, and models behave as they do on real tensors."""
    from transformers.utils import import_utils

    # Transformers builds a full attention mask when it sees fake tensors, which a real run skips.
    original = import_utils.is_fake_tensor
    import_utils.is_fake_tensor = lambda x: False
    # A step that cannot be traced raises; torch would print the same error once more.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, _Assume():
            yield mode
    finally:
        logger.setLevel(level)
        import_utils.is_fake_tensor = original


def predict(build, step) -> Meter:
    """Bytes of a step without allocating any: everything runs on fake tensors.

    Args:
        build: () -> (model, optimizer or None, inputs); called inside the fake mode.
        step: (model, optimizer, inputs) -> None; run twice, measured the second time.
    """
    with fake_step():
        model, optimizer, inputs = build()
        step(model, optimizer, inputs)
        with Meter(model, optimizer, inputs=inputs) as meter:
            step(model, optimizer, inputs)
    return meter
