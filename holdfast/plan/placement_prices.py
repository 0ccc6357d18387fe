"""Prices of fast memory: what a byte is worth at each instruction, and a bound from them."""

import numpy as np

from holdfast.plan.placement import Costs, Layout


class Prices:
    """What a byte and a nanosecond of the engine are worth at each instruction, by a relaxation.

    Lagrange multipliers of capacity and engine, by subgradient steps. `bound` is an upper bound of
    what any placement saves. Per use, in nanoseconds: `gain` of being fast alone, and the price of
    its bytes since the use before (`stay`), of a late copy (`copy`), or of just this instruction
    (`born`). `left[u]` is the bound's part from use u on.
    """

    STEPS = 60

    def __init__(self, costs: Costs):
        program = costs.program
        empty = Layout(costs)
        count, length = len(program.uses), len(program.instructions)
        self.gain = np.array([empty.gain(u.index) for u in program.uses], float)
        self.gain *= [costs.may_be_fast(u) for u in program.uses]
        stay, copy = np.zeros((count, length)), np.zeros((count, length))
        engine = np.zeros((count, length))
        may_stay, may_copy = np.zeros(count, bool), np.zeros(count, bool)
        for u in program.uses:
            storage = program.storages[u.storage]
            born = u.before is None and not storage.given
            may_stay[u.index] = born or u.before is not None
            since = u.instruction if u.before is None else program.uses[u.before].instruction + 1
            stay[u.index, since : u.instruction + 1] = storage.nbytes
            chunks = None if born else empty.chunks(u.index)
            if chunks is not None:
                may_copy[u.index] = True
                copy[u.index, chunks[0][0] : u.instruction + 1] = storage.nbytes
                for i, part in chunks:
                    engine[u.index, i] = part
        capacity, idle = costs.hardware.capacity, np.array(costs.idle, float)
        # Shares of capacity and of each instruction's engine; a price is for all of it.
        stay, copy = stay / max(1, capacity), copy / max(1, capacity)
        engine = engine / np.maximum(1, idle)
        byte, work = np.zeros(length), np.zeros(length)
        self.bound = float("inf")
        rate = self.gain.sum() / max(1, length)
        for step in range(self.STEPS):
            held = np.where(may_stay, stay @ byte, np.inf)
            copied = np.where(may_copy, copy @ byte + engine @ work, np.inf)
            profit = self.gain - np.minimum(held, copied)
            taken = profit > 0
            bound = profit[taken].sum() + byte.sum() + work.sum()
            if bound < self.bound:
                self.bound, best = float(bound), (byte.copy(), work.copy(), profit)
            by_copy = taken & (copied < held)
            load = stay[taken & ~by_copy].sum(0) + copy[by_copy].sum(0)
            decay = rate / (1 + step / 4)
            byte = np.maximum(0, byte + decay * np.clip(load - 1, -1, 1))
            work = np.maximum(0, work + decay * np.clip(engine[by_copy].sum(0) - 1, -1, 1))
        byte, work, profit = best
        self.stay, self.copy = stay @ byte, copy @ byte + engine @ work
        rows = np.arange(count)
        at = np.array([u.instruction for u in program.uses])
        self.born = stay[rows, at] * byte[at]
        rent = np.cumsum((byte + work)[::-1])[::-1]
        worth = np.cumsum(np.maximum(profit, 0)[::-1])[::-1]
        self.left = np.append(worth + rent[at], 0.0)
