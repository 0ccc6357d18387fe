"""Policies decide what is remembered, how it changes and what is recalled; `Memory` carries it out.

A policy is a class with some of seven verbs. Each verb looks at a `View`, a consistent reading of
one space, and returns changes or hits; none writes anything itself, so that one call of the user
is one transaction whatever the policy does. A verb may be called again with the same input after
another process has changed the space, so it must not have effects of its own.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.errors import UsageError, unknown
from holdfast.longterm.budget import Context, pack
from holdfast.longterm.records import Add, Change, Hit, Item, Revise, Turn

if TYPE_CHECKING:
    from holdfast.longterm.store.view import View

TYPES = ("episodic", "semantic", "procedural")
FORMS = ("turns", "facts", "notes", "graph", "summaries", "thoughts", "rationales", "feedback")
PROCESSES = ("encode", "consolidate", "store", "retrieve", "forget")
CONFLICTS = ("keeps both", "supersedes", "removes", "links", "merges")


@dataclass(frozen=True)
class Traits:
    """What a policy is, as rows of the taxonomy; a test compares it with what the policy does."""

    types: tuple[str, ...] = ("episodic",)
    form: str = "turns"
    processes: tuple[str, ...] = ("encode", "store", "retrieve")
    forgets: bool = False
    conflict: str = "keeps both"
    needs_llm: bool = False

    def __post_init__(self) -> None:
        for name, given, known in (
            *(("type", value, TYPES) for value in self.types),
            ("form", self.form, FORMS),
            *(("process", value, PROCESSES) for value in self.processes),
            ("conflict", self.conflict, CONFLICTS),
        ):
            if given not in known:
                raise unknown(f"{name} of a policy", given, known)


class Policy:
    """Remember every turn, recall by hybrid search; others override what they do differently."""

    traits = Traits()

    def write(self, view: "View", turns: Sequence[Turn]) -> list[Change]:
        """What to store of new input; repeats are recognised when the changes are applied."""
        return [as_turn(turn) for turn in turns]

    def link(self, view: "View", items: Sequence[Item]) -> list[Change]:
        """What follows from items that `write` has just stored, in the same transaction."""
        return []

    def update(self, view: "View", item: Item, text: str) -> list[Change]:
        """What a user's correction of an item changes."""
        return [Revise(item.id, text=text, why="updated")]

    def forget(self, view: "View", at: datetime) -> list[Change]:
        """What is no longer kept at a time."""
        return []

    def removed(self, view: "View", gone: Sequence[str], *, purged: bool) -> list[Change]:
        """What follows from memories that a user has deleted or purged, in the same transaction.

        A purge has erased by then all that names them as a source; what else a policy made of
        their text it must undo here.
        """
        return []

    def summarise(self, view: "View", session: str | None) -> list[Change]:
        """What is made of a session that has ended (None: of all that has not been yet)."""
        return []

    def retrieve(self, view: "View", query: str, limit: int) -> list[Hit]:
        """The hits for a query, best first, at most `limit`."""
        return view.search(query, limit)

    def recalled(self, view: "View", hits: Sequence[Hit]) -> list[Change]:
        """What handing out hits changes; with nothing here, reads never write."""
        return []

    def compose(
        self, view: "View", query: str, budget: int, count: Callable[[str], int]
    ) -> Context:
        """A text for a prompt, at most `budget` by `count`."""
        return pack(self.retrieve(view, query, 50), budget, count)


def as_turn(turn: Turn, **changed: Any) -> Add:
    """The change that stores a turn as it is."""
    fields = {
        "text": turn.text,
        "kind": turn.kind,
        "speaker": turn.speaker,
        "session": turn.session,
        "metadata": turn.metadata,
        "valid_from": turn.when,
        # Equal texts of one session by one speaker are one memory, unless the caller names them.
        "key": "\x1f".join((turn.speaker or "", turn.session or "", turn.id or "")),
    }
    return Add(**{**fields, **changed})


def policies() -> dict[str, type[Policy]]:
    """Name -> class of every policy in `longterm/policies`; some files there hold tools."""
    found = {name: _policy_in(name) for name in _files()}
    return {name: cls for name, cls in found.items() if cls is not None}


def _files() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "policies").glob("[!_]*.py"))


def _policy_in(name: str) -> type[Policy] | None:
    module = importlib.import_module(f"holdfast.longterm.policies.{name}")
    for value in vars(module).values():
        if (
            inspect.isclass(value)
            and issubclass(value, Policy)
            and value.__module__ == module.__name__
        ):
            return value
    return None


def find(policy: "str | Policy", **options: Any) -> Policy:
    """A policy by its name, with the options of its class; a policy itself is returned.

    Raises:
        UsageError: an unknown name or option, or options for a policy that is made already.
    """
    if isinstance(policy, Policy):
        if options:
            raise UsageError(f"{type(policy).__name__} is made already; give it options there")
        return policy
    made = _policy_in(policy) if policy in _files() else None
    if made is None:
        raise unknown("memory policy", policy, policies())
    accepted = inspect.signature(made).parameters
    for option in options:
        if option not in accepted:
            raise unknown(f"option of {policy}", option, accepted)
    return made(**options)
