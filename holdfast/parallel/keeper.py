"""Keeper: follows an offload plan on one rank, and measures what its activations hold.

At each action it releases, loads and saves what the plan has bound to that position of the rank's
order, whatever the clock says.
"""

import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from holdfast.parallel._torch_pp import Runtime
from holdfast.parallel.offload_plan import OffloadPlan
from holdfast.parallel.schedule import Action
from holdfast.places import ActivationStore, Arena
from holdfast.places.copies import copies_of


@dataclass(frozen=True)
class Measured:
    """Peaks of one rank in one step, by the storages that were there."""

    chunks: int
    device_bytes: int
    host_bytes: int
    seconds: float


class Keeper:
    """Follows a plan on one rank: opens stores, releases and loads them at their positions."""

    runtime: Runtime

    def __init__(
        self,
        plan: OffloadPlan,
        rank: int,
        arena: Arena | None,
        pair: dist.ProcessGroup | None,
    ):
        self.plan, self.rank, self.arena, self.pair = plan, rank, arena, pair
        self.order, self.moves = plan.schedule[rank], plan.moves.get(rank, {})
        self.sizes: dict[int, int] = {}
        self.left: dict[int, int] = {}
        self.times: dict[Action, int] = {}
        shared = [
            slot for copy, slot in plan.slots.items() if copy[1] % plan.ranks // 2 == rank // 2
        ]
        mine = sorted(slot for copy, slot in plan.slots.items() if copy[1] % plan.ranks == rank)
        # The slots up to which this rank has nothing to copy, after each of its copies.
        self._free_until = [*mine, max(shared, default=-1)]
        self.stores: dict[tuple[int, int], list[ActivationStore]] = {}

    def begin(self) -> None:
        self.position = self.chunks = self.device_bytes = self.met = self.copied = 0
        self.stores.clear()
        if self.arena is not None:
            self.arena.peak_bytes = self.arena.resident_bytes
        self._meet(0)

    def end(self, seconds: float) -> Measured:
        left = sum(store.device_bytes for stores in self.stores.values() for store in stores)
        assert not left, f"{left} bytes of activations outlive the step"
        host = 0 if self.arena is None else self.arena.peak_bytes
        return Measured(self.chunks, self.device_bytes, host, seconds)

    def before(self, action: Action) -> None:
        assert self.order[self.position] == action, (self.order[self.position], action)
        self.runtime.before()
        moves = self.moves.get(self.position, [])
        for move in moves:
            for store in self.stores[move.stage, move.micro]:
                if move.kind == "release":
                    store.release()
                else:
                    store.prefetch()
            if move.kind == "load":
                self._meet(1)
        if moves:
            self._note()
        self.position += 1
        self._started = time.perf_counter_ns()

    def store(self, action: Action, keep: list[Tensor]) -> ActivationStore:
        key = action.stage, action.micro
        away = key in self.plan.moved
        store = ActivationStore(self.arena if away else None, keep=keep, overlap=True, retain=True)
        self.stores.setdefault(key, []).append(store)
        return store

    def saved(self, action: Action) -> None:
        key = action.stage, action.micro
        self._note()
        if key in self.plan.moved:
            self._meet(1)
        self.sizes[action.stage] = sum(store.device_bytes for store in self.stores[key])
        if key in self.plan.moved and not self.plan.asynchronous:
            for store in self.stores[key]:
                store.release()

    def after(self, action: Action) -> None:
        self.times[action] = time.perf_counter_ns() - self._started
        if action.kind == "I":
            stores = self.stores[action.stage, action.micro]
            self.left[action.stage] = sum(store.device_bytes for store in stores)
        elif action.kind != "F":
            # The graph is gone, and with it what the stores were holding.
            self.stores.pop((action.stage, action.micro))

    def _note(self) -> None:
        held = [sum(s.device_bytes for s in stores) for stores in self.stores.values()]
        self.chunks = max(self.chunks, sum(1 for nbytes in held if nbytes))
        self.device_bytes = max(self.device_bytes, sum(held))

    def _meet(self, copied: int) -> None:
        """In the copier's turn: after `copied` copies, meet the partner until the next slot."""
        if self.pair is None:
            return
        self.copied += copied
        while self.met <= self._free_until[self.copied]:
            copies_of(torch.device("cpu")).run(partial(dist.barrier, self.pair))
            self.met += 1


def pair_group(plan: OffloadPlan, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A group of its own for each pair, because copiers meet while stages send."""
    if not plan.pair:
        return None
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    mine = None
    for first in range(0, len(ranks), 2):
        made = dist.new_group(ranks[first : first + 2], backend="gloo")
        if dist.get_rank(group) // 2 * 2 == first:
            mine = made
    return mine
