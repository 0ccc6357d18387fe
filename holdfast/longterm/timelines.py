"""What leads to an event and what comes of it, by typed edges that go forward in time."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from holdfast.errors import UsageError
from holdfast.longterm.language.judgement import RELATIONS

if TYPE_CHECKING:
    from holdfast.longterm.store.view import View

PATHS = 64  # at most, of those through one event


class Timelines:
    """The edges between events, both ways; those of an event are read when they are asked for."""

    def __init__(self, view: "View"):
        self._view = view
        self._next: dict[str, dict[str, str]] = {}
        self._last: dict[str, dict[str, str]] = {}

    def _read(self, events: Iterable[str]) -> None:
        fresh = set(events) - self._next.keys()
        for event in fresh:
            self._next[event], self._last[event] = {}, {}
        for edge in self._view.edges_of(fresh):
            if edge.rel in RELATIONS:
                if edge.src in fresh:
                    self._next[edge.src][edge.dst] = edge.rel
                if edge.dst in fresh:
                    self._last[edge.dst][edge.src] = edge.rel

    def after(self, event: str) -> dict[str, str]:
        """What comes of an event, each with its relation."""
        self._read([event])
        return self._next[event]

    def into(self, event: str) -> dict[str, str]:
        """What an event comes of, each with the event's relation to it."""
        self._read([event])
        return self._last[event]

    def add(self, old: str, relation: str, new: str) -> None:
        self.after(old)[new] = relation
        self.into(new)[old] = relation

    def relation(self, old: str, new: str) -> str | None:
        """Of an edge, or of the last edge on a way between two events."""
        return self.after(old).get(new) or next(iter(self.into(new).values()), None)

    def parts(self, events: Iterable[str]) -> list[set[str]]:
        """Some events, those together that are connected; no more is read than it takes to tell."""
        wanted = list(dict.fromkeys(events))
        parts = [({event}, {event}) for event in wanted]  # what is reached, and what of it last
        # One that is reached in full cannot be part of another.
        while len(open_ := [part for part in parts if part[1]]) > 1:
            known, last = least = min(open_, key=lambda part: len(part[1]))
            self._read(last)
            last = {near for one in last for near in (*self.after(one), *self.into(one))} - known
            known = known | last
            parts.remove(least)
            for met in [part for part in parts if part[0] & known]:
                known, last = known | met[0], last | met[1]
                parts.remove(met)
            parts.append((known, last))
        found = [{event for event in wanted if event in known} for known, _ in parts]
        return sorted(found, key=lambda part: min(map(wanted.index, part)))

    def before(self, event: str) -> list[str]:
        """All that leads to an event, the event first.

        Raises:
            UsageError: the event leads to itself.
        """
        found, open_ = {event: None}, [event]
        while open_:
            for one in self.into(open_.pop()):
                if one == event:
                    raise UsageError(
                        f"event {event} leads to itself: edges must go forward in time; unlink one"
                    )
                if one not in found:
                    found[one] = None
                    open_.append(one)
        return list(found)

    def through(self, event: str) -> list[list[str]]:
        """At most `PATHS` ways through an event, from where they begin to where they end."""
        ancestors = set(self.before(event))
        roots = sorted(one for one in ancestors if not self.into(one))
        heads = [way for root in roots for way in self._ways(root, event, ancestors)][:PATHS]
        tails = self._ways(event, None, None)
        return [[*head, *tail[1:]] for tail in tails for head in heads][:PATHS]

    def _ways(self, start: str, end: str | None, among: set[str] | None) -> list[list[str]]:
        found: list[list[str]] = []
        open_ = [[start]]
        while open_ and len(found) < PATHS:
            path = open_.pop()
            if path[-1] == end:
                found.append(path)
                continue
            more = [o for o in self.after(path[-1]) if among is None or o in among]
            if not more and end is None:
                found.append(path)
            if set(more) & set(path):
                raise UsageError(
                    f"event {path[-1]} leads back to itself: edges must go forward in time"
                )
            open_ += [[*path, one] for one in reversed(more)]
        return found
