"""Errors that a user can act on, each with the exit code of the command line."""

import difflib
from collections.abc import Iterable


class HoldfastError(Exception):
    """Something failed while running; exit code 1."""

    exit_code = 1


class UsageError(HoldfastError, ValueError):
    """Bad usage or input: the message says what was given, what was expected, what to do."""

    exit_code = 2


class DoesNotFit(HoldfastError):
    """No allowed plan fits the budget; carries the smallest budget that would."""

    exit_code = 3
    details: dict


class OverBudget(HoldfastError):
    """A run held more bytes than its plan's budget."""

    exit_code = 4


def unknown(what: str, given: str, known: Iterable[str]) -> UsageError:
    """An error for a name that is not in `known`, listing the nearest ones."""
    known = sorted(known)
    near = difflib.get_close_matches(given, known, n=3, cutoff=0.4) or known[:12]
    return UsageError(f"unknown {what} {given!r}; nearest known: {', '.join(near)}")
