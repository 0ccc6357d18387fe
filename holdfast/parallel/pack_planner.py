"""The tasks that packs make, and the search for the fastest four-tuple.

A configuration says in which micro-batches and packs the forward and the backward pass run. Packs
that the device can hold are proposed, every combination is simulated, the fastest one is kept.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from holdfast.errors import UsageError
from holdfast.parallel.layer_profile import Profile, layer_too_large
from holdfast.parallel.packing import Packs, all_packings, balanced, divisors, greedy_memory
from holdfast.plan.simulate import Change, Task, Trace, simulate

# Up to this many layers every packing is tried.
EXHAUSTIVE = 6
PHASES = {"F": "forward", "B": "backward"}


@dataclass(frozen=True)
class Configuration:
    """Rows of a micro-batch and packs, in the order of layers, for each direction.

    The last backward pack runs its forward once, just before its backward: forward packs cover the
    layers before it.
    """

    micro_forward: int
    packs_forward: Packs
    micro_backward: int
    packs_backward: Packs

    def micro(self, kind: str) -> int:
        return self.micro_forward if kind == "F" else self.micro_backward


@dataclass(frozen=True)
class Step:
    """One pack on one rank in one direction."""

    kind: Literal["F", "B"]
    start: int
    stop: int
    rank: int

    @property
    def layers(self) -> range:
        return range(self.start, self.stop)


class Planner:
    """Proposes, simulates and compares configurations of one profile.

    Args:
        rows: samples of one rank's batch.
        budget: device bytes of each rank.
        ranks: devices; in mode "pp" packs go round them, in mode "dp" each runs every pack.
    """

    def __init__(self, profile: Profile, rows: int, budget: int, mode: str = "pp", ranks: int = 1):
        self.profile, self.rows, self.budget = profile, rows, budget
        self.mode, self.ranks = mode, ranks
        self.depth = len(profile.layers)
        self.pipelined = mode == "pp" and ranks > 1
        self.forward_bytes = cache(self._forward_bytes)
        self.backward_bytes = cache(self._backward_bytes)
        self.run_ns = cache(self._run_ns)

    def parameters(self, layers: Iterable[int]) -> int:
        return sum(self.profile.layers[i].parameter_bytes for i in layers)

    def gradients(self, layers: Iterable[int]) -> int:
        return sum(self.profile.layers[i].gradient_bytes for i in layers)

    def _forward_bytes(self, start: int, stop: int, micro: int) -> int | None:
        """Device bytes of a forward pack while it runs; None where its layers did not."""
        held = 0
        for i in range(start, stop):
            cost = self.profile.layers[i].costs.get(micro)
            if cost is None:
                return None
            held = max(held, self.profile.boundary_bytes(i, micro) + cost.forward_bytes)
        return self.profile.fixed_bytes + self.parameters(range(start, stop)) + held

    def _backward_bytes(self, start: int, stop: int, micro: int) -> int | None:
        """Device bytes of a backward pack while it runs: never less than it really holds."""
        saved = held = 0
        for i in range(start, stop):
            cost = self.profile.layers[i].costs.get(micro)
            if cost is None:
                return None
            held = max(held, saved + cost.backward_bytes)
            saved += cost.saved_bytes
        held += self.profile.boundary_bytes(start, micro)
        if stop < self.depth:  # its output and the gradient of that
            held += 2 * self.profile.boundary_bytes(stop, micro)
        layers = range(start, stop)
        return self.profile.fixed_bytes + self.parameters(layers) + self.gradients(layers) + held

    def needed(self, kind: str, start: int, stop: int, micro: int) -> int | None:
        of = self.forward_bytes if kind == "F" else self.backward_bytes
        return of(start, stop, micro)

    def bytes(self, step: Step, configuration: Configuration) -> int:
        """Device bytes of a pack that fits."""
        found = self.needed(step.kind, step.start, step.stop, configuration.micro(step.kind))
        assert found is not None
        return found

    def steps(self, configuration: Configuration) -> list[Step]:
        """All packs in their order, forward, then backward; in mode "dp" those of one rank."""
        packs = [("F", p) for p in configuration.packs_forward]
        packs += [("B", p) for p in reversed(configuration.packs_backward)]
        turn = self.ranks if self.pipelined else 1
        return [Step(kind, *pack, i % turn) for i, (kind, pack) in enumerate(packs)]  # type: ignore[arg-type]

    def prefetched(self, step: Step, following: Step, configuration: Configuration) -> bool:
        """Whether the parameters of `following` fit beside `step`, on the same rank."""
        both = self.bytes(step, configuration) + self.parameters(following.layers)
        return both <= self.budget

    def check(self, configuration: Configuration) -> None:
        """Refuse a configuration that is malformed, does not fit or cannot be right.

        Raises:
            UsageError: packs that do not cover the layers, sizes that do not divide the rows, or
                two sizes for a layer that draws random numbers.
            DoesNotFit: a pack passes the budget.
        """
        c = configuration
        for what, packs, stop in (
            ("backward", c.packs_backward, self.depth),
            ("forward", c.packs_forward, c.packs_backward[-1][0] if c.packs_backward else 0),
        ):
            ends = [0, *(b for _, b in packs)]
            if [a for a, _ in packs] != ends[:-1] or ends[-1] != stop or ends != sorted({*ends}):
                raise UsageError(
                    f"{what} packs {packs} do not cover layers 0 to {stop}; give pairs such as "
                    f"((0, {max(stop, 1)}),), forward up to the last backward pack"
                )
        for micro in (c.micro_forward, c.micro_backward):
            if micro < 1 or self.rows % micro:
                raise UsageError(
                    f"micro size {micro} does not divide the {self.rows} rows of a rank; "
                    f"use one of {divisors(self.rows)}"
                )
        random = next((layer.name for layer in self.profile.layers if layer.random), None)
        if random is not None and c.packs_forward and c.micro_forward != c.micro_backward:
            raise UsageError(
                f"{random} draws random numbers, and micro sizes {c.micro_forward} forward and "
                f"{c.micro_backward} backward would draw others when it is run again; "
                "use one size, or turn dropout off"
            )
        for step in self.steps(c):
            micro = c.micro(step.kind)
            needed = self.needed(step.kind, step.start, step.stop, micro)
            if needed is None or needed > self.budget:
                names = " to ".join(
                    dict.fromkeys(self.profile.layers[i].name for i in (step.start, step.stop - 1))
                )
                raise layer_too_large(
                    names, needed or self.budget + 1, self.budget, f"micro-batches of {micro}"
                )

    def weight_traffic(self, configuration: Configuration) -> int:
        """Bytes of parameters and gradients that a step moves, over all ranks."""
        every = range(self.depth)
        visits = self.parameters(every) + self.gradients(every)
        visits += sum(self.parameters(range(*pack)) for pack in configuration.packs_forward)
        return visits * (self.ranks if self.mode == "dp" else 1)

    def trace(self, configuration: Configuration) -> Trace:
        """The simulated step, with what the devices hold."""
        return simulate(self.tasks(configuration, bytes_too=True))

    def search(self) -> Configuration:
        """The configuration whose simulated step ends first.

        Raises:
            DoesNotFit: a layer that fits at no size; names it.
        """
        sizes = divisors(self.rows)
        # A whole batch at once may need less than a micro-batch: nothing is added to gradients.
        needed, micro, worst = min(self._largest_layer(micro) for micro in sizes)
        if needed > self.budget:
            name = self.profile.layers[worst].name
            raise layer_too_large(name, needed, self.budget, f"a micro-batch of {micro}")
        # In the order of what they cannot be faster than, so that most need no simulation.
        bounded = [(self._at_least(c), c) for c in self.candidates(sizes)]
        bounded.sort(key=lambda entry: entry[0])
        best, found = sys.maxsize, bounded[0][1]
        for bound, configuration in bounded:
            if bound >= best:
                break
            end = simulate(self.tasks(configuration)).end
            if end < best:
                best, found = end, configuration
        return found

    def _at_least(self, c: Configuration) -> int:
        """Nanoseconds that the busiest rank computes, and what nothing can overlap."""
        busy = [0] * self.ranks
        steps = self.steps(c)
        for step in steps:
            busy[step.rank] += self.run_ns(step.kind, step.start, step.stop, c.micro(step.kind))
        layers = self.profile.layers
        before = sum(layers[i].load_ns for i in steps[0].layers)
        after = sum(layers[i].update_ns for i in steps[-1].layers)
        return max(busy) if self.pipelined else busy[0] + before + after

    def _largest_layer(self, micro: int) -> tuple[int, int, int]:
        """Bytes of the backward of the layer that needs most, the micro size, and which it is."""
        found = [self.backward_bytes(i, i + 1, micro) for i in range(self.depth)]
        # One that ran out of memory needs more than there is.
        needs = [sys.maxsize if size is None else size for size in found]
        worst = needs.index(max(needs))
        return needs[worst], micro, worst

    def candidates(self, sizes: Sequence[int]) -> Iterator[Configuration]:
        """Backward packings first; the forward covers what is before their last pack."""
        random = any(layer.random for layer in self.profile.layers)
        for u_backward in sizes:
            for backward in self._packings("B", self.depth, u_backward):
                stop = backward[-1][0]
                if not stop:
                    yield Configuration(u_backward, (), u_backward, backward)
                    continue
                for u_forward in [u_backward] if random else sizes:
                    proposed = dict.fromkeys(self._packings("F", stop, u_forward))
                    reused = backward[:-1]
                    if all(self._fits("F", u_forward, a, b) is not None for a, b in reused):
                        proposed[reused] = None
                    for forward in proposed:
                        yield Configuration(u_forward, forward, u_backward, backward)

    def _fits(self, kind: str, micro: int, start: int, stop: int) -> int | None:
        needed = self.needed(kind, start, stop, micro)
        return None if needed is None or needed > self.budget else needed

    def _packings(self, kind: str, stop: int, micro: int) -> Iterator[Packs]:
        def size(a: int, b: int) -> int | None:
            return self._fits(kind, micro, a, b)

        def seconds(a: int, b: int) -> int:
            return self.run_ns(kind, a, b, micro)

        greedy = greedy_memory(size, stop)
        if greedy is None:
            return
        if self.depth <= EXHAUSTIVE:
            for packs in all_packings(stop):
                if all(size(*pack) is not None for pack in packs):
                    yield packs
            return
        yield greedy
        # Greedy needs the fewest packs; a pipeline may want some for each rank.
        most = min(len(greedy) + 2 * (self.ranks if self.pipelined else 1), stop)
        for count in range(len(greedy), most + 1):
            for cost in (size, seconds):
                found = balanced(cost, size, stop, count)
                if found is not None:
                    yield found

    def _run_ns(self, kind: str, start: int, stop: int, micro: int) -> int:
        """Nanoseconds in which a pack computes all rows, and moves what enters and leaves it."""
        costs = [self.profile.layers[i].costs[micro] for i in range(start, stop)]
        own = sum(c.forward_ns if kind == "F" else c.backward_ns for c in costs)
        ends = [start] * (start > 0) + [stop] * (stop < self.depth)
        crossing = sum(self.profile.boundary_bytes(p, micro) for p in ends)
        # Forward brings its input and sends its output, backward brings two and sends one.
        own += int(crossing * (1 if kind == "F" else 1.5) / self.profile.bandwidth)
        return own * (self.rows // micro)

    def tasks(self, configuration: Configuration, *, bytes_too: bool = False) -> list[Task]:
        """What one step does, for `simulate`; `bytes_too` says also what the device holds.

        Ranks without exchange run the micros of a pack as one task.
        """
        c, tasks = configuration, []
        steps = self.steps(c)
        mine: dict[int, list[int]] = {}
        for k, step in enumerate(steps):
            mine.setdefault(step.rank, []).append(k)
        for k, step in enumerate(steps):
            line = mine[step.rank]
            at = line.index(k)
            ahead = at > 0 and self.prefetched(steps[line[at - 1]], step, c)
            freed = at - 2 if ahead else at - 1
            after = (("done", line[freed]),) if freed >= 0 else ()
            load = sum(self.profile.layers[i].load_ns for i in step.layers)
            held = self._held(step, c) if bytes_too else {}
            early = {"parameters": held.pop("parameters")} if held else {}
            brought = _changes(step, early, "start")
            tasks.append(Task(("load", k), (step.rank, "h2d"), load, after, brought))
            first, *others = self._runs(steps, k, c)
            tasks += [replace(first, holds=_changes(step, held, "start")), *others]
            tasks += self._done(step, k, _changes(step, early | held, "end"))
        return tasks

    def _held(self, step: Step, c: Configuration) -> dict[str, int]:
        """Device bytes of a pack beside buffers; what is not parameters lives while it runs."""
        size = self.parameters(step.layers)
        trained = self.gradients(step.layers) if step.kind == "B" else 0
        other = self.bytes(step, c) - self.profile.fixed_bytes - size - trained
        return {"parameters": size, "gradients": trained, "activations": other}

    def _runs(self, steps: list[Step], k: int, c: Configuration) -> Iterator[Task]:
        step = steps[k]
        micro = c.micro(step.kind)
        every = self.run_ns(step.kind, step.start, step.stop, micro)
        stream, phase = (step.rank, "compute"), PHASES[step.kind]
        if not self.pipelined:
            yield Task(("run", k, 0), stream, every, (("load", k),), (), phase)
            return
        own = every // (self.rows // micro)
        sent = c.micro(steps[k - 1].kind) if k else micro
        for start in range(0, self.rows, micro):
            needs: list[tuple] = [("load", k)]
            if k:
                first = start // sent * sent
                needs += [("run", k - 1, row) for row in range(first, start + micro, sent)]
            yield Task(("run", k, start), stream, own, tuple(needs), (), phase)

    def _done(self, step: Step, k: int, freed: tuple[Change, ...]) -> Iterator[Task]:
        layers = [self.profile.layers[i] for i in step.layers]
        store = sum(layer.store_ns for layer in layers) if step.kind == "B" else 0
        yield Task(("done", k), (step.rank, "compute"), store, (), freed, PHASES[step.kind])
        if step.kind == "B":
            update = sum(layer.update_ns for layer in layers)
            if self.mode == "dp":  # gradients of all ranks are summed on the host first
                summed = (self.ranks - 1) * self.gradients(step.layers)
                update += int(summed / self.profile.bandwidth)
            yield Task(("update", k), (step.rank, "host"), update, (("done", k),), (), "step")


def _changes(step: Step, held: dict[str, int], at: Literal["start", "end"]) -> tuple[Change, ...]:
    sign = 1 if at == "start" else -1
    return tuple(Change(step.rank, "device", n, sign * size, at) for n, size in held.items())
