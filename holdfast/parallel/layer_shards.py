"""ShardedLayers: ZeRO's third stage for layers that are used, and stepped, one at a time."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.errors import UsageError
from holdfast.parallel.shard_optimizer import Make, ShardOptimizer, Unit, check_elementwise
from holdfast.parallel.sharded import Sharded


class _Layer(Unit):
    """One layer's trainable parameters, which are empty unless the layer is gathered."""

    def __init__(self, block: nn.Module, group: dist.ProcessGroup | None):
        parameters = [p for p in block.parameters() if p.requires_grad]
        kinds = {p.dtype for p in parameters}
        if len(kinds) != 1:
            names = ", ".join(sorted(map(str, kinds))) or "none that trains"
            raise UsageError(f"parameters of a layer are {names}; each layer needs one dtype")
        layout = Sharded([p.shape for p in parameters], group)
        (self.dtype,) = kinds
        with torch.no_grad():
            flat = parameters[0].new_zeros(layout.padded)
            for p, view in zip(parameters, layout.views(flat), strict=True):
                view.copy_(p)
            dist.broadcast(flat, group=group, group_src=0)
            own = layout.own(flat)
            shard = own.clone() if self.dtype.itemsize >= 4 else own.float()
        super().__init__(layout, parameters, shard, apart=True)
        self.flat: Tensor | None = None
        self.sums: Tensor | None = None
        self.gradient: Tensor | None = None
        self.work: dist.Work | None = None
        self.release()

    def reduced(self) -> Tensor | None:
        return self.gradient

    @torch.no_grad()
    def fetch(self) -> None:
        """Begin to gather."""
        if self.flat is None:
            self.flat = self.master.new_empty(self.layout.padded, dtype=self.dtype)
            self.layout.own(self.flat).copy_(self.master)
            self.work = self.layout.begin_gather(self.flat)

    def fill(self) -> None:
        """Give the parameters their values."""
        self.fetch()
        assert self.flat is not None
        if self.work is not None:
            self.work.wait()
            self.work = None
        for p, view in zip(self.parameters, self.layout.views(self.flat), strict=True):
            p.data = view

    def open(self) -> None:
        """Let autograd add gradients up in one flat tensor."""
        self.sums = self.master.new_zeros(self.layout.padded, dtype=self.dtype)
        for p, view in zip(self.parameters, self.layout.views(self.sums), strict=True):
            p.grad = view

    def close(self) -> Tensor:
        """The sums, which the parameters no longer hold."""
        sums, self.sums = self.sums, None
        assert sums is not None
        for p in self.parameters:
            p.grad = None
        return sums

    def release(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None
        self.flat = self.sums = None
        for p in self.parameters:
            p.grad = None
            p.data = torch.empty(0, dtype=self.dtype, device=p.device)


class ShardedLayers(ShardOptimizer):
    """Layers of which each rank keeps 1/N, with an optimizer that steps each one by itself.

    It is the optimizer that schedules and checkpoints see; `step` has nothing left to do. Between
    batches the blocks' parameters are empty: `with shard.gathered(): ...` to evaluate or save.

    Args:
        blocks: the layers, no parameter in two of them.
        optimizer_cls: any optimizer whose update is elementwise, as a class or a partial of it.
        group: the ranks; None means all.

    Raises:
        UsageError: a tied parameter, a layer that does not train, or an optimizer that is not
            elementwise.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        optimizer_cls: Make,
        group: dist.ProcessGroup | None = None,
    ):
        check_elementwise(optimizer_cls)
        seen: set[int] = set()
        for index, block in enumerate(blocks):
            own = {id(p) for p in block.parameters()}
            if own & seen:
                raise UsageError(f"block {index} shares a parameter with another one; untie it")
            seen |= own
        self.blocks = list(blocks)
        layers = [_Layer(block, group) for block in blocks]
        parameters = [p for layer in layers for p in layer.parameters]
        super().__init__(optimizer_cls, [{"params": parameters}], [layers])
        self.layers = layers
        self._pending: tuple[_Layer, dist.Work] | None = None

    @contextlib.contextmanager
    def computing(self, layer: int, then: int | None, backward: bool) -> Iterator[None]:
        """Gather a layer, and begin to gather the one that comes next."""
        here = self.layers[layer]
        here.fill()
        if backward:
            here.open()
        if then is not None:
            self.layers[then].fetch()
        try:
            yield
        finally:
            here.release()

    @torch.no_grad()
    def reduce(self, index: int) -> None:
        """Begin to reduce a layer's gradients; the layer before is stepped first."""
        self.settle()
        layer = self.layers[index]
        flat = layer.close()
        layer.gradient = layer.layout.own(flat)
        work = layer.layout.begin_reduce(flat, layer.gradient)
        self._pending = (layer, work)

    @torch.no_grad()
    def settle(self) -> None:
        """Wait for the layer that is being reduced, and step it."""
        if self._pending is not None:
            layer, work = self._pending
            self._pending = None
            work.wait()
            self._step_unit(layer)
            layer.gradient = None

    def release(self) -> None:
        """Drop what is gathered, and gradients that were not stepped."""
        if self._pending is not None:
            layer, work = self._pending
            self._pending = None
            work.wait()
            layer.gradient = None
        for layer in self.layers:
            layer.release()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """All parameters whole, for as long as the context lasts; changes to them are lost."""
        for layer in self.layers:
            layer.fill()
        try:
            yield
        finally:
            self.release()

    def step(self, closure=None) -> None:  # type: ignore[override]
        """Nothing: every layer was stepped when its gradients were there."""

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        raise UsageError(
            "layers are stepped before the norm of all gradients is known; clip by value, or use "
            "zero(stage=3)"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: gradients do not outlive their layer."""
