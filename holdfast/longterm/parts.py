"""Several policies in one space: each sees and changes a part of it, told apart by kinds.

A memory of part `p` has the kind `p/kind`; whatever has none of the known parts in front is in the
main part, whose name is empty. Two processes, or a policy made anew, find the same parts.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from holdfast.longterm.records import Add, Change, Edge, Hit, Item, Link, Revise, Source
from holdfast.longterm.store.view import View


def split(kind: str, names: Sequence[str]) -> tuple[str, str]:
    """The part that a kind of the space is in, and the kind within it."""
    head, slash, rest = kind.partition("/")
    return (head, rest) if slash and head in names else ("", kind)


class Part(View):
    """A view in which only one part's memories are, under the kinds that its policy gave them.

    Args:
        name: of the part; empty for what is in none of the others.
        names: of all parts but the main one.
    """

    def __init__(self, view: View, name: str, names: Sequence[str]):
        self.__dict__.update(vars(view))
        self._name, self._names = name, names

    def kind(self, kind: str) -> str:
        """The kind under which the space has it."""
        return f"{self._name}/{kind}" if self._name else kind

    def bare(self, item: Item) -> Item:
        return replace(item, kind=split(item.kind, self._names)[1])

    def _items(self, where: str, args: Sequence[Any], tail: str = "") -> list[Item]:
        if self._name:
            clause, patterns = "kind LIKE ?", [f"{self._name}/%"]
        else:
            clause = " AND ".join(["kind NOT LIKE ?"] * len(self._names))
            patterns = [f"{name}/%" for name in self._names]
        found = super()._items(f"{clause} AND {where}", [*patterns, *args], tail)
        return [self.bare(item) for item in found]

    def items(self, *, kind: str | None = None, **given: Any) -> list[Item]:
        return super().items(kind=None if kind is None else self.kind(kind), **given)

    def as_of(self, *times: Any, kind: str | None = None, **given: Any) -> list[Item]:
        return super().as_of(*times, kind=None if kind is None else self.kind(kind), **given)

    def kinds(self) -> list[str]:
        known = (split(kind, self._names) for kind in super().kinds())
        return [kind for name, kind in known if name == self._name]

    def _real(self, kinds: Sequence[str] | None) -> list[str]:
        return [self.kind(kind) for kind in (self.kinds() if kinds is None else kinds)]

    def count(self, kind: str | None = None) -> int:
        return sum(super(Part, self).count(k) for k in self._real(None if kind is None else [kind]))

    def edges(self, **ends: str | None) -> list[Edge]:
        return self._within(super().edges(**ends))

    def edges_of(self, items: Collection[str]) -> list[Edge]:
        return self._within(super().edges_of(items))

    def _within(self, found: Sequence[Edge]) -> list[Edge]:
        here = self.get_many(end for edge in found for end in (edge.src, edge.dst))
        return [edge for edge in found if edge.src in here and edge.dst in here]

    def search(
        self, query: str, limit: int = 10, *, kinds: Sequence[str] | None = None, **given: Any
    ) -> list[Hit]:
        return super().search(query, limit, kinds=self._real(kinds), **given)

    def nearest(
        self,
        to: str | np.ndarray,
        limit: int,
        *,
        kinds: Sequence[str] | None = None,
        **given: Any,
    ) -> list[tuple[Item, float]]:
        return super().nearest(to, limit, kinds=self._real(kinds), **given)

    def changes(self, given: Iterable[Change], sources: Sequence[Source] = ()) -> list[Change]:
        """A policy's changes with the kinds of the space; `sources` join those of what is added."""
        made: dict[int, Add] = {}

        # Changes name what is added by the object, and an Add with another kind is another object.
        def put(one: Any) -> Any:
            return made.get(id(one), one)

        changes: list[Change] = []
        for change in given:
            new = change
            if isinstance(change, Add):
                of = (*map(put, change.sources), *sources)
                new = made[id(change)] = replace(change, kind=self.kind(change.kind), sources=of)
            elif isinstance(change, Revise):
                new = replace(change, id=put(change.id), sources=[*map(put, change.sources)])
            elif isinstance(change, Link):
                new = replace(change, src=put(change.src), dst=put(change.dst))
            changes.append(new)
        return changes
