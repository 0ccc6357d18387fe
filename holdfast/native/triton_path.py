"""Which operators run as Triton kernels: on GPUs where triton is installed; torch does the rest.

`HOLDFAST_NATIVE=off` and `native.force("off")` turn these kernels off with those for CPUs.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from holdfast import native

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def pick(module: str, name: str, reference: Callable, *tensors: Tensor) -> Callable:
    """The function `name` of `holdfast.native.<module>` where it can run, else the reference.

    Both take the same arguments. `tensors` are those whose dtype and device the caller chose.
    """
    device = tensors[0].device
    fits = all(t.device == device and t.dtype in _DTYPES for t in tensors)
    if not (fits and device.type == "cuda" and not native.turned_off()):
        return reference
    if not _runs_on(device):
        return reference
    return getattr(importlib.import_module(f"holdfast.native.{module}"), name)


@cache
def _runs_on(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    # Triton needs Volta or newer on NVIDIA's GPUs; on AMD's this number means something else.
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (7, 0)
