"""Sessions that have begun and not been made anything of yet, for policies that wait for their end.

They are kept in one item of the space that is never found: a policy keeps no state of its own.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from holdfast.longterm.records import Add, Change, Item, Touch

if TYPE_CHECKING:
    from holdfast.longterm.store.view import View

STATE = "open sessions"


def begun(view: "View") -> dict[str | None, int]:
    """Open sessions, in the order in which they began, each with its first turn's position."""
    return {session: at for state in view.items(kind=STATE) for session, at in state.data["open"]}


def noted(view: "View", open_: Mapping[str | None, int]) -> list[Change]:
    """The changes after which exactly these sessions are open."""
    data = {"open": [[session, at] for session, at in open_.items()]}
    for state in view.items(kind=STATE):
        return [] if state.data == data else [Touch(state.id, data=data)]
    return [Add(STATE, kind=STATE, data=data, searchable=False)] if open_ else []


def turns(
    view: "View",
    open_: Mapping[str | None, int],
    sessions: Collection[str | None],
    mine: Callable[[Item], bool],
) -> list[Item]:
    """The turns of some open sessions, session by session; `mine` tells turns from other items."""
    return [
        item
        for session in sessions
        for item in view.items(session=session, after=open_[session] - 1)
        if item.session == session and mine(item)
    ]


def first(items: Sequence[Item]) -> dict[str | None, int]:
    """The sessions of items that follow one another, each with the position of its first."""
    found: dict[str | None, int] = {}
    for item in items:
        found.setdefault(item.session, item.position)
    return found
