"""Long transformations as tasks: which come first, and which are finished, through any kill."""

import heapq
import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import UsageError


class TaskGraph:
    """Tasks and what each needs done before; tasks that need each other are done together."""

    def __init__(self, needs: Mapping[str, Iterable[str]]):
        self.needs = {task: sorted(set(wanted) & needs.keys()) for task, wanted in needs.items()}
        self.groups = self._groups()

    def order(self, priority: Callable[[str], Any] = str) -> list[tuple[str, ...]]:
        """Groups of tasks, each after all that it needs; `priority` chooses among the ready."""
        of = {task: group for group in self.groups for task in group}
        waits = {g: {of[n] for task in g for n in self.needs[task]} - {g} for g in self.groups}
        users: dict[tuple[str, ...], list[tuple[str, ...]]] = {group: [] for group in self.groups}
        for group, wanted in waits.items():
            for one in wanted:
                users[one].append(group)
        left = {group: len(wanted) for group, wanted in waits.items()}
        ready = [(priority(group[0]), group) for group in self.groups if not left[group]]
        heapq.heapify(ready)
        done = []
        while ready:
            _, group = heapq.heappop(ready)
            done.append(group)
            for user in users[group]:
                left[user] -= 1
                if not left[user]:
                    heapq.heappush(ready, (priority(user[0]), user))
        return done

    def _groups(self) -> list[tuple[str, ...]]:
        """Strongly connected components, by Tarjan's algorithm without recursion."""
        index: dict[str, int] = {}
        low: dict[str, int] = {}
        stack: list[str] = []
        held: set[str] = set()
        groups = []
        for root in sorted(self.needs):
            if root in index:
                continue
            work = [(root, iter(self.needs[root]))]
            index[root] = low[root] = len(index)
            stack.append(root)
            held.add(root)
            while work:
                task, wanted = work[-1]
                for one in wanted:
                    if one not in index:
                        index[one] = low[one] = len(index)
                        stack.append(one)
                        held.add(one)
                        work.append((one, iter(self.needs[one])))
                        break
                    if one in held:
                        low[task] = min(low[task], index[one])
                else:
                    work.pop()
                    if work:
                        low[work[-1][0]] = min(low[work[-1][0]], low[task])
                    if low[task] == index[task]:
                        at = stack.index(task)
                        groups.append(tuple(sorted(stack[at:])))
                        held -= set(stack[at:])
                        del stack[at:]
        return groups


class FactStore:
    """Results of finished tasks in one SQLite file; what `put` returned from survives a kill.

    A result counts only for the digest it was stored with: a task whose text, context or model
    instructions changed is done again.
    """

    def __init__(self, path: str | Path = ":memory:"):
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS task (name TEXT PRIMARY KEY, digest TEXT, facts TEXT)"
            )
        except sqlite3.Error as error:
            raise UsageError(
                f"{path} does not open as a store of tasks: {error}; name a new file"
            ) from error

    def get(self, task: str, digest: str) -> Any | None:
        row = self._db.execute(
            "SELECT facts FROM task WHERE name = ? AND digest = ?", (task, digest)
        ).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, task: str, digest: str, facts: Any) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO task VALUES (?, ?, ?)",
            (task, digest, json.dumps(facts, sort_keys=True)),
        )

    def close(self) -> None:
        self._db.close()
