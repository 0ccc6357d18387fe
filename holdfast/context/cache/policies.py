"""Cache policies by name: those of the catalogue that work, and the baselines."""

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

from holdfast import catalogue
from holdfast.context.cache.baselines import Full, Random, SinksRecent, Window
from holdfast.context.cache.policy import CachePolicy
from holdfast.errors import UsageError, unknown

BASELINES: dict[str, type[CachePolicy]] = {
    "full": Full,
    "sinks_recent": SinksRecent,
    "window": Window,
    "random": Random,
}


def policies() -> dict[str, type[CachePolicy]]:
    """Name -> class, baselines first, then in the catalogue's order."""
    found = dict(BASELINES)
    for system in catalogue.systems():
        if system.room == "context" and system.status == "works":
            cls = _policy_in(system.module)
            if cls is not None:
                found[system.key] = cls
    return found


def untrained() -> dict[str, type[CachePolicy]]:
    """Those that work with their default options alone."""
    return {name: cls for name, cls in policies().items() if not _missing(cls, ())}


def find(name: str, **options: Any) -> CachePolicy:
    """A policy by its name, with the options of its class.

    Raises:
        UsageError: an unknown name, or options that the policy does not have or that it needs.
    """
    known = policies()
    if name not in known:
        raise unknown("cache policy", name, known)
    accepted = inspect.signature(known[name]).parameters
    for option in options:
        if option not in accepted:
            raise unknown(f"option of {name}", option, accepted)
    missing = _missing(known[name], options)
    if missing:
        raise UsageError(f"policy {name} needs {', '.join(missing)}, which has no default")
    return known[name](**options)


def _missing(cls: type[CachePolicy], given: Iterable[str]) -> list[str]:
    parameters = inspect.signature(cls).parameters.items()
    return [o for o, p in parameters if p.default is p.empty and o not in given]


def _policy_in(module: str) -> type[CachePolicy] | None:
    """The policy that a module defines, if it defines one."""
    loaded = importlib.import_module(module)
    for value in vars(loaded).values():
        if (
            inspect.isclass(value)
            and issubclass(value, CachePolicy)
            and value.__module__ == loaded.__name__
        ):
            return value
    return None
