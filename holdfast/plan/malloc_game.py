"""mallocGame (209): place each use of each tensor in fast or slow memory, one after the other.

Keeps    of a program's tensors those in fast memory whose uses there save the most time.
Form     residencies: a storage, its uses, from when to when, at which offset, copied in when.
Bytes    at most `capacity` at any instruction, whatever the plan.
Source   Wang, Sazanovich, Ilbeyi, Phothilimthana, Purohit, Tay, Vu, Wang, Paduraru, Leurent,
         Zhernov, Huang, Schrittwieser, Hubert, Tung, Kurylowicz, Milan, Vinyals, Mankowitz,
         "Optimizing Memory Mapping Using Deep Reinforcement Learning", 2023. No code was published.
Departs  a copy begins as late as the engine allows, which leaves other tensors more room; what is
         written in fast memory is never copied back. Time is that of a model, not of a machine.
         The agent is small, trained for a minute on generated programs and not on the one that it
         places; before its own games it is shown games of local search, and it sees prices from a
         relaxation of the problem.
"""

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from holdfast.errors import UsageError, unknown
from holdfast.plan.placement import Costs, Layout, Placement, Residency, TwoLevel
from holdfast.plan.placement_exact import exact
from holdfast.plan.placement_greedy import greedy, local_search
from holdfast.plan.placement_prices import Prices
from holdfast.plan.placement_program import Program

if TYPE_CHECKING:
    from holdfast.plan.muzero import Agent

COPY, NOCOPY, DROP = range(3)
ACTIONS = ("Copy", "NoCopy", "Drop")
METHODS = ("portfolio", "exact", "greedy", "local", "muzero")

# An observation: an image of the last instructions, the next uses, and numbers of the whole game.
STEPS, BINS, CHANNELS = 16, 16, 2
WINDOW, PER_USE = 8, 21
GLOBALS = 14
OBSERVATION = CHANNELS * STEPS * BINS + WINDOW * PER_USE + GLOBALS
_HORIZONS = (0, 1, 2, 4, 8, 16)


class MallocGame:
    """A game in Gymnasium's idiom; an action for each use, in the order of `program.uses`.

    Copy: prefetched, its bytes found by best-fit. NoCopy: used where it is, or born there.
    Drop: served from slow memory. A reward is what an action saves, as a share of `reachable`: no
    placement saves more nanoseconds than these. Where no action is left, because a tensor that
    exists in fast memory alone has lost its place, the game goes back to where it was written
    there, drops that use and plays the others as before; the reward takes back what this costs.
    """

    def __init__(self, program: Program, hardware: TwoLevel):
        self.program, self.hardware = program, hardware
        self.costs = Costs(program, hardware)
        self._static = _Static(self.costs)
        self.reachable = max(1.0, self._static.reachable)
        self.reset()

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The first observation, (OBSERVATION,) fp32; nothing is drawn, so no seed matters."""
        self.banned: set[int] = set()
        self._clear()
        return self.observation(), {}

    def _clear(self) -> None:
        self.layout = Layout(self.costs)
        self.actions: list[int] = []
        count = len(self.program.storages)
        self._open: list[Residency | None] = [None] * count
        self._in_slow = [s.given for s in self.program.storages]
        self._written: list[int | None] = [None] * count  # where slow memory lost its copy
        self._grid = np.zeros((len(self.program.instructions), BINS), np.float32)
        self._choices = self._find()

    @property
    def at(self) -> int:
        """Index of the use that is to be decided."""
        return len(self.actions)

    @property
    def done(self) -> bool:
        return self.at == len(self.program.uses)

    def legal(self) -> np.ndarray:
        """Which of Copy, NoCopy and Drop can be played, (3,) bool; none when the game is over."""
        return np.array([action in self._choices for action in range(3)])

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """(observation, reward, terminated, truncated, info), as Gymnasium's.

        Raises:
            UsageError: the action is not legal here.
        """
        if action not in self._choices:
            allowed = ", ".join(ACTIONS[a] for a in self._choices) or "none, the game is over"
            raise UsageError(f"action {action} is not legal at use {self.at}; legal: {allowed}")
        before = self.layout.total
        self._play(action)
        while not self._choices and not self.done:
            self._back_up()
        reward = (before - self.layout.total) / self.reachable
        info = {"total": self.layout.total}
        return self.observation(), reward, self.done, False, info

    def placement(self, method: str = "game") -> Placement:
        """What was played; uses that were not are in slow memory."""
        return Placement.of(self.layout, method)

    def _find(self) -> dict[int, Residency | None]:
        """The legal actions, each with the residency that it makes."""
        if self.done:
            return {}
        use = self.program.uses[self.at]
        storage = self.program.storages[use.storage]
        choices: dict[int, Residency | None] = {}
        if self._in_slow[use.storage] or not use.reads:
            choices[DROP] = None
        if use.index in self.banned or not self.costs.may_be_fast(use):
            return choices
        held = self._open[use.storage]
        if held is not None:
            longer = self._longer(held, use.index)
            if longer is not None:
                choices[NOCOPY] = longer
                return choices
        copied = self._in_slow[use.storage]
        if copied or (use.before is None and not storage.given):
            # What is written in fast memory stays until its last use; what is read may go before.
            until = self.program.uses[storage.uses[-1]].instruction if use.writes else None
            made = self.layout.find([use.index], self._reserved(), until)
            if made is None:
                made = self.layout.find([use.index])
            if made is not None:
                choices[COPY if copied else NOCOPY] = made
        if self._written[use.storage] is not None:
            choices.pop(DROP, None)
        return choices

    def _reserved(self) -> list[Residency]:
        """What slow memory lacks, until its last use; to take these bytes is to drop it."""
        return [
            replace(held, end=self.program.uses[storage.uses[-1]].instruction)
            for storage, held, written in zip(
                self.program.storages, self._open, self._written, strict=True
            )
            if held is not None and written is not None
        ]

    def _longer(self, held: Residency, use: int) -> Residency | None:
        """The residency, extended to this use, if nothing has taken its bytes since."""
        end = self.program.uses[use].instruction
        sizes = self.program.storages
        top = held.offset + sizes[held.storage].nbytes
        for r in self.layout.meeting(held.end + 1, end):
            if r.offset < top and held.offset < r.offset + sizes[r.storage].nbytes:
                return None
        return Residency(held.storage, (*held.uses, use), held.start, end, held.offset, held.chunks)

    def _play(self, action: int) -> None:
        use, made = self.program.uses[self.at], self._choices[action]
        if made is None:
            self._open[use.storage] = None
            self._in_slow[use.storage] = True
        else:
            held = self._open[use.storage]
            if action == NOCOPY and held is not None:
                self.layout.remove(held)
            self.layout.add(made)
            self._paint(made)
            self._open[use.storage] = made
            if use.writes:
                self._in_slow[use.storage] = False
                if self._written[use.storage] is None:
                    self._written[use.storage] = use.index
        self.actions.append(action)
        self._choices = self._find()

    def _back_up(self) -> None:
        """Drop where slow memory lost what cannot stay, and play all other uses as before."""
        played = self.actions
        while True:
            culprit = self._written[self.program.uses[self.at].storage]
            assert culprit is not None, "only what slow memory lacks is left without an action"
            self.banned.add(culprit)
            self._clear()
            for wanted in played:
                if not self._choices:
                    break
                # What was copied may have to be born now, or the other way round.
                kinds = (DROP,) if wanted == DROP else (wanted, COPY + NOCOPY - wanted, DROP)
                self._play(next(a for a in (*kinds, *self._choices) if a in self._choices))
            else:
                return

    def _paint(self, r: Residency) -> None:
        capacity = self.hardware.capacity
        low = r.offset / capacity * BINS
        high = (r.offset + self.program.storages[r.storage].nbytes) / capacity * BINS
        cells = np.arange(BINS)
        share = np.clip(np.minimum(cells + 1, high) - np.maximum(cells, low), 0, 1)
        rows = self._grid[r.start : r.end + 1]
        np.maximum(rows, share, out=rows)

    def observation(self) -> np.ndarray:
        """What the agent sees: (OBSERVATION,) fp32."""
        static, at = self._static, min(self.at, len(self.program.uses) - 1)
        seen = np.zeros(OBSERVATION, np.float32)
        image = seen[: CHANNELS * STEPS * BINS].reshape(CHANNELS, STEPS, BINS)
        now = self.program.uses[at].instruction
        first = max(0, now + 1 - STEPS)
        rows = now + 1 - first
        image[0, -rows:] = self._grid[first : now + 1]
        idle = np.array(self.layout.idle[first : now + 1], np.float32)
        image[1, -rows:] = (idle / static.idle[first : now + 1])[:, None]
        window = seen[CHANNELS * STEPS * BINS : -GLOBALS].reshape(WINDOW, PER_USE)
        count = 0 if self.done else min(WINDOW, len(self.program.uses) - at)
        window[:count, : static.uses.shape[1]] = static.uses[at : at + count]
        for k in range(count):
            use = self.program.uses[at + k]
            gain = min(self.layout.gain(use.index), static.gain[use.index])  # 0 if never fast
            window[k, -6:] = (
                self._in_slow[use.storage],
                self._open[use.storage] is not None,
                (use.instruction - now) / WINDOW,
                gain / static.scale,
                10 * gain / self.reachable,
                gain / max(1.0, static.gain[use.index]),
            )
        whole = seen[-GLOBALS:]
        if not self.done:
            whole[:3] = self.legal()
            whole[3] = static.left[at]
        whole[4] = (self.costs.slowest - self.layout.total) / self.reachable
        whole[5 : 5 + len(_HORIZONS)] = static.demand[now]
        whole[11] = self._grid[now].mean()
        whole[12] = 1 - at / len(self.program.uses)
        whole[13] = static.tightness
        return seen


class _Static:
    """What an observation shows that no action changes."""

    def __init__(self, costs: Costs):
        program, capacity = costs.program, max(1, costs.hardware.capacity)
        length = len(program.instructions)
        prices = Prices(costs)
        self.reachable, gain = prices.bound, prices.gain
        self.gain = gain
        self.scale = max(1.0, costs.slowest / length)
        self.idle = np.maximum(1, np.array(costs.idle, np.float32))
        self.left = prices.left / max(1.0, self.reachable)
        self.tightness = np.log1p(program.nbytes / capacity) / 3
        live = np.zeros(length + _HORIZONS[-1])
        for s in program.storages:
            if s.nbytes <= capacity:
                first, last = (program.uses[s.uses[k]].instruction for k in (0, -1))
                live[first : last + 1] += s.nbytes / capacity
        at = np.arange(length)[:, None] + np.array(_HORIZONS)
        self.demand = np.log1p(live[at]).astype(np.float32)
        busy = np.cumsum([0, *costs.idle])
        rows = []
        for use in program.uses:
            s, u = program.storages[use.storage], use.index
            since = 0 if use.before is None else program.uses[use.before].instruction + 1
            spare = max(1, busy[use.instruction] - busy[since])
            until = None if use.after is None else program.uses[use.after].instruction
            later = [w for w in s.uses if w > u]
            rest = gain[u] + gain[later].sum()
            kept = rest - prices.born[u] - prices.stay[later].sum()
            arithmetic = costs.compute[use.instruction] / max(1, costs.all_slow[use.instruction])
            rows.append(
                (
                    np.log1p(s.nbytes / capacity),
                    np.log1p(gain[u] / self.scale),
                    use.reads,
                    use.writes,
                    use.before is None and not s.given,
                    costs.may_be_fast(use),
                    np.tanh((use.instruction - since) / 8),
                    1 if until is None else np.tanh((until - use.instruction) / 8),
                    len(later) / 4,
                    rest / max(1.0, self.reachable) * 4,
                    _margin(gain[u] - prices.stay[u], gain[u]),
                    _margin(gain[u] - prices.copy[u], gain[u]),
                    _margin(kept, rest),
                    min(2.0, costs.copies[use.storage] / spare),
                    min(2.0, arithmetic),
                )
            )
        self.uses = np.array(rows, np.float32)


def _margin(profit: float, gain: float) -> float:
    return float(np.clip(profit / max(1.0, gain), -2, 1))


def solve(
    program: Program,
    hardware: TwoLevel,
    method: Literal["portfolio", "exact", "greedy", "local", "muzero"] = "portfolio",
    time_limit: float = 60.0,
    *,
    agent: "Agent | None" = None,
    seed: int = 0,
) -> Placement:
    """Place a program's tensors; `bound` and `optimal` of the result say what is proven.

    The portfolio asks the exact solver, which starts from greedy, and where it proves nothing also
    local search and the agent; it returns the best of them. Without an `agent` one is trained on
    generated programs, for half of the time that is left.

    Raises:
        UsageError: an unknown method, or a time limit that is not positive.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if time_limit <= 0:
        raise UsageError(f"time_limit={time_limit:g} leaves no time; give seconds above 0")
    deadline = time.monotonic() + time_limit
    if method == "greedy":
        return greedy(program, hardware)
    if method == "local":
        return local_search(program, hardware, time_limit, seed)
    if method == "exact":
        return exact(program, hardware, time_limit, start=greedy(program, hardware))
    if method == "muzero":
        return _learned(program, hardware, deadline, agent, seed)
    proven = exact(program, hardware, time_limit / 3, start=greedy(program, hardware))
    if proven.optimal:
        return proven
    others = (
        local_search(program, hardware, time_limit / 10, seed),
        _learned(program, hardware, deadline, agent, seed),
    )
    best = min((proven, *others), key=lambda placement: placement.total)
    return replace(best, bound=proven.bound, optimal=best.total == proven.bound)


def _learned(
    program: Program, hardware: TwoLevel, deadline: float, agent: "Agent | None", seed: int
) -> Placement:
    from holdfast.plan.muzero_train import train  # imports torch

    agent = agent or train(seconds=(deadline - time.monotonic()) / 2, seed=seed)
    return agent.place(program, hardware, seed=seed)
