"""Adapters: train a small addition to linears of a frozen model."""

from holdfast.training.adapters.base import (
    Adapter,
    adapter_state_dict,
    attach,
    detach,
    load_adapter_state_dict,
    merge,
)
from holdfast.training.adapters.files import load, save

__all__ = [
    "Adapter",
    "adapter_state_dict",
    "attach",
    "detach",
    "load",
    "load_adapter_state_dict",
    "merge",
    "save",
]
