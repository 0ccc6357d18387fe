"""All methods that a plan can name: those of the catalogue and the baselines beside them."""

import functools
import importlib
from pathlib import Path

from holdfast.catalogue import systems
from holdfast.errors import unknown
from holdfast.plan.method import Method

_BASELINES = (
    "holdfast.training.optim.builtin",
    "holdfast.training.optim.adamw8",
    "holdfast.training.adapters.lora",
    "holdfast.training.adapters.packed",
)


@functools.cache
def methods() -> dict[str, Method]:
    """Every method by key."""
    rows = [s.module for s in systems() if s.room == "training"]
    found: dict[str, Method] = {}
    for name in (*_BASELINES, *rows):
        if not _exists(name):
            continue
        module = importlib.import_module(name)
        single = getattr(module, "METHOD", None)
        for method in getattr(module, "METHODS", (single,) if single else ()):
            found[method.key] = method
    return found


def _exists(module: str) -> bool:
    path = Path(__file__).parents[2].joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def method(key: str, slot: str) -> Method:
    """The method of a slot.

    Raises:
        UsageError: no method of this slot has that key.
    """
    known = {k: m for k, m in methods().items() if m.slot == slot}
    if key not in known:
        raise unknown(f"{slot} method", key, known)
    return known[key]


def of_slot(slot: str) -> list[Method]:
    return [m for m in methods().values() if m.slot == slot]
