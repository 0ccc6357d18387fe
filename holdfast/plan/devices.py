"""`fit --devices N`: how several devices share a model, its batch and its bytes.

Replicas share the batch and, by ZeRO's stages, the model's states; or a replica is spread over the
ranks of a pipeline, whose activations may wait on the host. Candidates are tried in the order of
their predicted time; what a candidate's ranks would hold is found by rehearsing their own program.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from holdfast import attach
from holdfast.errors import DoesNotFit, UsageError
from holdfast.ledger import Ledger
from holdfast.parallel.offload_plan import StageCost, timeline
from holdfast.parallel.pipeoffload import choose_offload
from holdfast.parallel.program import ledger_of, part_layers, part_sizes
from holdfast.plan.file import Methods, Parallel, PlanFile, Training, format_runs, parse_runs
from holdfast.plan.fitter import Fitter
from holdfast.plan.plan import Plan
from holdfast.plan.skeletons import Request
from holdfast.units import format_bytes

CHUNKS = (1, 2, 4)
NO_COSTS = (1, 1, 1, 0, 0, 0, 0)


@dataclass(frozen=True)
class Shared:
    """A way to share the work: what is planned, its predicted time, and once known its bytes."""

    spec: PlanFile
    seconds: float
    least: int  # bytes that its worst rank holds at least
    ledger: Ledger | None = None

    def label(self) -> str:
        p = self.spec.parallel
        assert p is not None
        options = [o for runs in self.spec.methods.blocks.values() for o in parse_runs(runs)]
        blocks = f"{options.count('recompute')} of {len(options)} blocks recomputed"
        if p.pipeline == 1:
            how = f"{p.data} replicas, ZeRO {p.zero}"
        else:
            chunks = f" x {p.chunks} chunks" if p.chunks > 1 else ""
            offload = f", {p.offload} offloaded" if p.offload else ""
            how = f"{p.data} x pipeline of {p.pipeline}{chunks}, {p.order}{offload}"
        return f"{how}, {blocks}, {self.spec.accumulation} x {self.spec.micro_batch}"

    @property
    def peak(self) -> int:
        return max(self._peaks("device"), default=0)

    @property
    def host_bytes(self) -> int:
        return max(self._peaks("host"), default=0)

    def _peaks(self, place: str) -> list[int]:
        assert self.ledger is not None and self.spec.parallel is not None
        return [self.ledger.peak(place, rank=r) for r in range(self.spec.parallel.ranks)]


class DeviceFitter:
    """Searches ways to share one request over `devices` ranks."""

    def __init__(self, request: Request, devices: int, training: Training | None = None):
        if devices < 2:
            raise UsageError(f"devices {devices}: one device is planned without --devices")
        self.request, self.devices = request, devices
        self.training = training or Training(clip=request.clip)
        self.fitter = Fitter(request)
        self.hardware = self.fitter.hardware
        if self.fitter.source.task_head != "causal-lm":
            raise UsageError(
                f"{self.fitter.source.name} is a {self.fitter.source.task_head} model; several "
                "devices train causal language models"
            )
        if not self.depth:
            raise UsageError(
                f"{self.fitter.source.name} has no single list of blocks to share; plan it for one "
                "device"
            )
        unusable = [
            name
            for name, value in (
                ("methods", self.request.methods),
                ("adapter", self.request.adapter != "any" and self.request.adapter),
                ("optimizer", self.request.optimizer not in ("any", "adamw")),
            )
            if value
        ]
        if unusable or request.tune == "adapter":
            names = ", ".join(f"--{n}" for n in unusable) or "--tune adapter"
            raise UsageError(
                f"several devices train whole models with AdamW; leave out {names}, or write the "
                "plan's methods by hand"
            )
        self.apart = self.hardware.device.kind == "cuda"
        self.tried: list[Shared] = []
        self._known_single: dict[tuple[int, str], tuple[float, int]] = {}

    def search(self, on_try: Callable[[Shared], None] = lambda tried: None) -> Shared | None:
        """The fastest way that fits; `on_try` hears of each one whose bytes have been found."""
        budget = self.request.budget
        for shared in sorted(self.candidates(), key=lambda s: s.seconds):
            if shared.least > budget.device:
                continue
            try:
                exact = self._with_sizes(shared.spec)
                known = replace(shared, spec=exact, ledger=ledger_of(exact, apart=self.apart))
            except UsageError as error:
                self.tried.append(shared)
                reason = error
                continue
            self.tried.append(known)
            on_try(known)
            fits = known.peak + self.fitter.reserve <= budget.device
            if fits and (not self.apart or known.host_bytes <= budget.host):
                return known
        if not any(s.ledger for s in self.tried) and self.tried:
            raise reason
        return None

    def candidates(self) -> Iterator[Shared]:
        """Every way that the sizes allow, with its predicted time."""
        request, depth = self.request, self.depth
        for data in _divisors(self.devices):
            pipeline = self.devices // data
            if request.batch % data:
                continue
            for micro in _divisors(request.batch // data):
                if pipeline == 1:
                    for zero, again in itertools.product((1, 2, 3), sorted({0, depth // 2, depth})):
                        yield self._replicated(micro, again, Parallel(data=data, zero=zero))
                    continue
                for chunks in CHUNKS:
                    if pipeline * chunks > depth:
                        continue
                    # Earlier ranks hold more micro-batches, so they are the first to recompute.
                    for ranks in range(pipeline + 1):
                        yield from self._pipelined(micro, ranks, data, pipeline, chunks)

    @property
    def depth(self) -> int:
        stacks = attach.blocks(self.fitter.skeleton_model)
        return len(stacks[0][1]) if len(stacks) == 1 else 0

    def _spec(self, micro: int, again: list[bool], parallel: Parallel) -> PlanFile:
        """The plan; `again` says of each block whether it is recomputed."""
        request = self.request
        runs = format_runs(["recompute" if recomputed else "keep" for recomputed in again])
        dtype = "float32" if request.dtype == "auto" else request.dtype
        model = request.model if isinstance(request.model, str) else self.fitter.source.name
        return PlanFile(
            model=model,
            task=request.task,  # type: ignore[arg-type]
            batch=request.batch,
            micro_batch=micro,
            sequence=request.sequence,
            budget={p: n for p in ("device", "host") if (n := getattr(request.budget, p))},  # type: ignore[misc]
            methods=Methods(
                dtype=dtype,  # type: ignore[arg-type]
                blocks={path: runs for path, _ in attach.blocks(self.fitter.skeleton_model)},
            ),
            parallel=parallel,
            training=self.training,
            hardware=request.hardware or self.hardware.name,
        )

    def _replicated(self, micro: int, again: int, parallel: Parallel) -> Shared:
        spec = self._spec(micro, [i < again for i in range(self.depth)], parallel)
        share = again / self.depth
        kept, recomputed = self._single(micro, "keep"), self._single(micro, "recompute")
        compute = spec.accumulation * (kept[0] + share * (recomputed[0] - kept[0]))
        # Gathers and reductions, in shares of what each rank holds; backward hides none of it.
        passes = 3 * (spec.accumulation if parallel.zero == 3 else 1)
        if parallel.zero == 2:
            passes = 2 * spec.accumulation
        moved = passes * self.parameter_bytes * (parallel.data - 1) / parallel.data
        states = self.parameter_bytes * (parallel.zero < 3) + self._states(parallel.data)
        least = states + int(kept[1] + share * (recomputed[1] - kept[1]))
        return Shared(spec, compute + moved / self._network, least)

    def _pipelined(
        self, micro: int, recomputing: int, data: int, pipeline: int, chunks: int
    ) -> Iterator[Shared]:
        """Pipelines whose first `recomputing` ranks run their blocks' forward again in backward."""
        parts = pipeline * chunks
        plain = Parallel(
            data=data, pipeline=pipeline, chunks=chunks, order="bfs", costs=[NO_COSTS] * parts
        )
        again = [part % pipeline < recomputing for part in range(parts)]
        layers = part_layers(self.depth, parts)
        each = [a for part, a in enumerate(again) for _ in range(layers[part])]
        spec = self._spec(micro, each, plain)
        micros = spec.accumulation
        orders = [("1f1b", 0)] if chunks == 1 or micros % pipeline == 0 else []
        # A backward in two parts keeps what was recomputed until the second one.
        if not recomputing:
            orders.append(("zero-bubble" if chunks == 1 else "uniform", 0))
            if chunks > 1 and self.apart and self.request.budget.host:
                orders += [("uniform", n) for n in range(1, chunks + 1)]
        costs = self._costs(micro, again)
        for order, offload in orders:
            try:
                plan = choose_offload(
                    order, pipeline, chunks, micros, costs, offload=offload,
                    split_backward=order != "1f1b",
                )  # fmt: skip
            except UsageError:
                continue  # copies cannot keep up
            trace = timeline(plan, costs)
            seconds = trace.end / 1e9
            # Shares are not even: part of what is held at the ends is nobody else's.
            held = int(0.7 * max(trace.peak(rank, "device") for rank in range(pipeline)))
            if data > 1:
                seconds += 2 * self.parameter_bytes / pipeline / self._network
            listed = [_listed(cost) for cost in costs]
            parallel = plain.model_copy(
                update={"order": order, "offload": offload, "costs": listed}
            )
            yield Shared(
                spec.model_copy(update={"parallel": parallel}),
                seconds,
                held + self._part_states(pipeline),
            )

    def _costs(self, micro: int, again: list[bool]) -> list[StageCost]:
        """Of all parts, as even shares of one device's; `_with_sizes` has what they really save."""
        costs = []
        for recomputed in again:
            seconds, held = self._single(micro, "recompute" if recomputed else "keep")
            # Forward, and the two halves of backward, cost about the same where nothing is
            # recomputed; what is recomputed comes with the first half.
            third = int(self._single(micro, "keep")[0] * 1e9 / len(again) / 3)
            whole = int(seconds * 1e9 / len(again))
            saved = held // len(again)
            costs.append(self._cost((third, whole - 2 * third, third), saved, saved))
        return costs

    def _with_sizes(self, spec: PlanFile) -> PlanFile:
        """The plan with what its parts really save."""
        parallel = spec.parallel
        assert parallel is not None
        if parallel.pipeline == 1:
            return spec
        sizes = part_sizes(spec)
        costs = [
            _listed(self._cost(cost[:3], saved, left))
            for cost, (saved, left) in zip(parallel.costs, sizes, strict=True)
        ]
        update = {"parallel": parallel.model_copy(update={"costs": costs})}
        return spec.model_copy(update=update)

    def _cost(self, times: tuple[int, int, int], saved: int, left: int) -> StageCost:
        save, load = self._copy("device", "host", saved), self._copy("host", "device", saved)
        return StageCost(*times, saved, save, load, left=left)

    def _copy(self, source: str, target: str, nbytes: int) -> int:
        if not self.apart:
            return int(nbytes / self.hardware.host.bandwidth * 1e9)
        return int(self.hardware.transfer_seconds(nbytes, source, target) * 1e9)

    def _single(self, micro: int, blocks: str) -> tuple[float, int]:
        """One micro-batch through the whole model on one device: seconds, activation bytes."""
        known = self._known_single
        if (micro, blocks) not in known:
            one = Fitter(replace(self.request, batch=micro, methods=("adamw",)))
            skeleton = min(
                (s for s in one.skeletons() if s.globals.micro == micro and not s.in_backward),
                key=lambda s: s.quality.rank,
            )
            composer, problem = one.problem(skeleton)
            for option in ("keep", "recompute"):
                choice = dict.fromkeys(problem.blocks, option)
                held = composer.ledger(choice).column("device", "forward")["activations"]
                known[micro, option] = composer.seconds(choice), held
        return known[micro, blocks]

    def _states(self, ranks: int) -> int:
        """AdamW's two moments of a rank's share, in fp32."""
        return 8 * self._parameters // ranks

    def _part_states(self, parts: int) -> int:
        """Parameters and moments of a rank's layers, without what surrounds them."""
        layers = sum(
            p.numel()
            for _, stack in attach.blocks(self.fitter.skeleton_model)
            for layer in stack
            for p in layer.parameters()
        )
        return layers // parts * (self._element_bytes + 8)

    @property
    def _parameters(self) -> int:
        return sum(p.numel() for p in self.fitter.skeleton_model.parameters())

    @property
    def _element_bytes(self) -> int:
        return 2 if self.request.dtype == "bfloat16" else 4

    @property
    def parameter_bytes(self) -> int:
        return self._element_bytes * self._parameters

    @property
    def _network(self) -> float:
        """Bytes per second between two devices."""
        between = [x for x in self.hardware.links if x.source == x.target == "device"]
        if between:
            return between[0].bandwidth
        slow = [x.bandwidth for x in self.hardware.links]
        return min(slow) if slow else self.hardware.host.bandwidth / 4


def _listed(cost: StageCost) -> tuple[int, int, int, int, int, int, int]:
    left = cost.saved if cost.left is None else cost.left
    return cost.forward, cost.input, cost.weight, cost.saved, cost.save, cost.load, left


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def to_plan(fitter: DeviceFitter, best: Shared) -> Plan:
    """The plan of the way that was found, with every rank's predicted bytes."""
    assert best.ledger is not None
    spec = best.spec.model_copy(
        update={
            "predicted": {
                "peak_bytes": best.peak,
                "step_seconds": best.seconds,
                "quality": "exact",
                "ledger": best.ledger.to_json(),
            }
        }
    )
    return Plan(spec, alternatives=[_described(s) for s in fitter.tried])


def _described(shared: Shared) -> dict[str, Any]:
    known = shared.ledger is not None
    return {
        "label": shared.label(),
        "step_seconds": shared.seconds,
        "peak_bytes": shared.peak if known else None,
        "host_bytes": shared.host_bytes if known else None,
    }


def does_not_fit(fitter: DeviceFitter) -> DoesNotFit:
    """The error where no way fits; carries a JSON document in `details`."""
    known = [s for s in fitter.tried if s.ledger is not None]
    budget = fitter.request.budget
    head = f"{fitter.fitter.source.name} on {fitter.devices} devices of {budget} does not fit"
    if not known:
        error = DoesNotFit(
            f"{head}: its parameters, gradients and optimizer states alone are more; use more "
            "devices or a larger budget"
        )
        error.details = {"fits": False, "plan": None, "relaxations": [], "alternatives": []}
        return error
    smallest = min(known, key=lambda s: s.peak)
    needed = smallest.peak + fitter.fitter.reserve
    error = DoesNotFit(
        f"{head}: the smallest way ({smallest.label()}) needs {format_bytes(needed)} on a device.\n"
        f"Cheapest ways to fit: --budget {math.ceil(needed / 1024)}KiB, --devices "
        f"{2 * fitter.devices}, or --sequence {fitter.request.sequence // 2}"
    )
    error.details = {
        "fits": False,
        "plan": None,
        "smallest_budget": needed,
        "predicted": {"peak_bytes": smallest.peak},
        "relaxations": [
            {"options": f"--budget {math.ceil(needed / 1024)}KiB", "peak_bytes": smallest.peak}
        ],
        "alternatives": [_described(s) for s in known],
    }
    return error


def document(best: Shared, plan: Plan, fitter: DeviceFitter) -> dict[str, Any]:
    """What `fit --devices N --json` prints for a plan that fits."""
    assert best.ledger is not None
    ranks = range(fitter.devices)
    worst = max(ranks, key=lambda r: best.ledger.peak("device", rank=r))  # type: ignore[union-attr]
    cells = best.ledger.at_peak("device", rank=worst)
    return {
        "fits": True,
        "plan": plan.spec.model_dump(mode="json"),
        "predicted": {
            "peak_bytes": best.peak,
            "by_category": cells,
            "by_phase": best.ledger.phase_peaks("device", rank=worst),
            "host_bytes": best.host_bytes,
            "ranks": [
                {
                    "rank": r,
                    "peak_bytes": best.ledger.peak("device", rank=r),
                    "by_category": best.ledger.at_peak("device", rank=r),
                    "host_bytes": best.ledger.peak("host", rank=r),
                }
                for r in ranks
            ],
        },
        "step_seconds": best.seconds,
        "hardware": fitter.hardware.name,
        "alternatives": plan.alternatives,
        "binding": {"rank": worst, "category": max(cells, key=lambda c: cells[c])},
        "relaxations": [],
    }
