"""Systems that change what a forward pass keeps for its backward pass."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(fn: Callable[[], Any], model: nn.Module, inputs: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps after `fn()`, without those of the model and of `inputs`.

    A storage that several operations keep is counted once. What a Function hides in attributes of
    `ctx` instead of `save_for_backward` is not seen.
    """
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *inputs)}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        # Returning the tensor itself would tie a saved output to its own graph in a cycle.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = fn()  # its graph keeps the storages alive, so that no address is used twice
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total
