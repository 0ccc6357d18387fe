"""Plans of `fit` beside those of torch's and accelerate's planners, at equal bytes.

    .venv/bin/pip install -c constraints.txt -r benchmarks/requirements.txt
    .venv/bin/python benchmarks/plans.py [--json] [--write]

A peer plans a GPT-2 of 8 blocks for a share of what plain training holds; its plan is run, and
`fit` gets what it really held as the budget. All steps are the same: one batch, fp32, fused AdamW,
equal gradients. Only `fit` may also split the batch, update in backward or form the loss by chunks;
plans say what they do.

device_map      accelerate's `infer_auto_device_map`, which `device_map="auto"` calls. It places
                weights for inference, and does not count gradients, states or activations.
recompute       Hugging Face's gradient checkpointing of every block, whatever the budget
sac_milp        torch.distributed._tools.sac_ilp, with selective recompute inside modules. It does
                not count optimizer states, so their bytes are taken off its budget; its estimators
                ask CUDA for the price of an operation and get the one that `fit` uses.
peak            the Meter's logical bytes of the second step
seconds         of this process, which has one thread and waits for nobody; median over rounds in
                which the plans take turns. A ratio is the median over rounds, ours to the peer's.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from results import conditions, write_section
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import GPT2Config, GPT2LMHeadModel

import holdfast
from holdfast.budget import Budget
from holdfast.meter import Meter, fake_step
from holdfast.plan.file import parse_runs
from holdfast.plan.fit import to_plan
from holdfast.plan.fitter import Candidate, Fitter
from holdfast.plan.hardware import load_hardware
from holdfast.plan.plan import Plan
from holdfast.plan.skeletons import Request
from holdfast.plan.trace import _flops
from holdfast.units import format_bytes

HARDWARE = "cpu-2core"
SHARES = (0.8, 0.65, 0.5)  # of the bytes of plain training
NOISE = 1.02  # two runs of one plan differ by less


@dataclass(frozen=True)
class Job:
    width: int
    layers: int
    batch: int
    sequence: int
    rounds: int

    def config(self) -> GPT2Config:
        return GPT2Config(
            vocab_size=256,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=4,
            n_positions=self.sequence,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            loss_type="ForCausalLM",
        )

    def model(self) -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(self.config()).train()

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, 256, (self.batch, self.sequence), generator=generator)


JOBS = {"full": Job(256, 8, 4, 256, rounds=9), "tiny": Job(64, 3, 2, 64, rounds=3)}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


class Running:
    """A model under a plan: steps on one batch, what they hold, and how long they take."""

    def __init__(self, job: Job, model: nn.Module, optimizer: Any = None, accumulation: int = 1):
        self.model, self.optimizer = model, optimizer or adamw(model)
        self.ids, self.accumulation = job.inputs(), accumulation
        self.labels = self.ids.clone()
        self.seconds: list[float] = []
        self.step()
        with Meter(model, self.optimizer, inputs=[self.ids, self.labels]) as meter:
            self.step()
        self.peak = meter.peak

    def step(self) -> None:
        parts = (t.chunk(self.accumulation) for t in (self.ids, self.labels))
        for ids, labels in zip(*parts, strict=True):
            loss = self.model(input_ids=ids, labels=labels).loss
            (loss if self.accumulation == 1 else loss / self.accumulation).backward()
            del loss
        self.optimizer.step()
        self.optimizer.zero_grad()

    def turn(self) -> None:
        start = time.process_time()
        self.step()
        self.seconds.append(time.process_time() - start)


def ours(job: Job, budget: int) -> tuple[Running, str, int]:
    """What `fit` runs within `budget`, in words, and its predicted bytes.

    Raises:
        DoesNotFit: nothing does.
    """
    plan = holdfast.fit(job.config(), budget, **request(job))
    return _run(job, plan)


def recomputing(job: Job, budget: int) -> tuple[Running, str, int] | None:
    """The same with nothing but recomputing: the batch whole, updates after backward."""
    fitter = Fitter(Request(job.config(), Budget(device=budget), **request(job)))
    plain = next(s for s in fitter.skeletons() if s.globals.micro == job.batch)
    composer, problem = fitter.problem(plain)
    solution = problem.fastest(fitter.request.budget)
    if solution is None:
        return None
    return _run(job, to_plan(fitter, Candidate(plain, composer, problem, solution)))


def request(job: Job) -> dict[str, Any]:
    return {
        "task": "pretrain",
        "batch": job.batch,
        "sequence": job.sequence,
        "allow": "exact",
        "dtype": "float32",
        "optimizer": "adamw",
        "hardware": HARDWARE,
        # What is kept free otherwise, the Meter, by which the peers are judged, does not see.
        "reserve": 0,
    }


def _run(job: Job, plan: Plan) -> tuple[Running, str, int]:
    spec = plan.spec
    options = [o for runs in spec.methods.blocks.values() for o in parse_runs(runs)]
    parts = [f"{options.count('recompute')} of {len(options)} blocks recomputed"]
    parts += [key for choice in spec.methods.saved for key in choice]
    if spec.methods.loss_chunk:
        parts.append("loss by chunks")
    if spec.methods.gradients == "backward":
        parts.append("updates in backward")
    if spec.accumulation > 1:
        parts.append(f"{spec.accumulation} micro-batches")
    running = Running(job, *plan.apply(job.model()), spec.accumulation)
    return running, ", ".join(parts), plan.predicted.peak("device")


def device_map(job: Job, budget: int) -> tuple[Running, str, int | None]:
    """accelerate's placement in `budget` bytes of the only device that a CPU has.

    Raises:
        ValueError: weights would lie on disk, where nothing trains them.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import compute_module_sizes

    model = job.model()
    found = infer_auto_device_map(
        model, max_memory={"cpu": budget}, no_split_module_classes=model._no_split_modules
    )
    away = Counter(found.values())["disk"]
    if away:
        raise ValueError(f"{away} modules would lie on disk, which trains none of them")
    dispatched = dispatch_model(model, found)
    return Running(job, dispatched), "every weight on the device", compute_module_sizes(model)[""]


def recompute(job: Job, _budget: int) -> tuple[Running, str, int | None]:
    model = job.model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return Running(job, model), "every block recomputed", None


def sac(job: Job, budget: int) -> tuple[Running, str, int | None]:
    """torch's mixed-integer program, and its policies within each module that it chose.

    Raises:
        ValueError: it finds no solution.
    """
    from torch.distributed._tools.sac_ilp import (
        get_optimal_checkpointing_policy_per_module,
        sac_milp,
    )

    graph, estimator, states = _estimated(job)
    solution, _, peak = sac_milp(graph, (budget - states) / 2**30)
    if peak < 0:
        raise ValueError("its program is infeasible")
    model = job.model()
    for name, discarded in solution.items():
        stats = estimator.sac_mod_stats[name]
        keep = get_optimal_checkpointing_policy_per_module(stats, 1 - discarded)
        _, _, path = name.partition(".")  # the model's class comes first
        _recompute_selected(model.get_submodule(path), stats.func_names, keep)
    shares = statistics.fmean(solution.values()) if solution else 0.0
    what = f"{shares:.0%} of what {len(solution)} modules save recomputed"
    return Running(job, model), what, peak + states


def _estimated(job: Job) -> tuple[Any, Any, int]:
    """sac_milp's graph of modules, its estimator, and the bytes of optimizer states."""
    from torch.distributed._tools import ilp_utils
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.distributed._tools.runtime_estimator import RuntimeEstimator
    from torch.distributed._tools.sac_estimator import SACEstimator

    hardware = load_hardware(HARDWARE)

    def priced(func, args, kwargs) -> tuple[Any, float]:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out, 0.0
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        moved = sum(t.numel() * t.element_size() for t in tensors)
        flops = _flops(func, args, kwargs or {}, out)
        return out, 1e3 * hardware.seconds(flops, moved, torch.float32)

    mode = "operator-level-cost-model"
    quiet = contextlib.redirect_stdout(io.StringIO())
    price = mock.patch.object(RuntimeEstimator, "_roofline_estimate", staticmethod(priced))
    with fake_step(), price, quiet:
        model, ids = job.model(), torch.zeros(job.batch, job.sequence, dtype=torch.long)
        optimizer = adamw(model)

        def step() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        memory = MemTracker()
        memory.track_external(model, optimizer)
        with memory:
            step()
            memory.reset_mod_stats()  # the first step makes the optimizer's states
            step()
        runtime = RuntimeEstimator()
        with runtime(mode):
            step()
        estimator = SACEstimator()
        with estimator(mode):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        cpu = torch.device("cpu")
        found = ilp_utils.aggregate_stats(model, memory, runtime, estimator, cpu)
        states = sum(t.nbytes for t in tree_leaves(optimizer.state_dict()["state"]))
    return ilp_utils.parse_module_info(found), estimator, states


def _recompute_selected(module: nn.Module, names: list[str], keep: list[int]) -> None:
    """Checkpoint `module`, saving the operations whose entry in `keep` is 1, by their order."""

    def contexts():
        seen: Counter[bool] = Counter()

        def policy(context, func, *args, **kwargs) -> CheckpointPolicy:
            i = seen[context.is_recompute]
            seen[context.is_recompute] += 1
            name = func._overloadpacket.__name__
            if i >= len(names) or names[i] != name:
                raise RuntimeError(f"operation {i} is {name}, which was not estimated there")
            return (CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_SAVE)[keep[i]]

        return create_selective_checkpoint_contexts(policy)

    forward = module.forward
    module.forward = partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


@dataclass(frozen=True)
class Peer:
    plan: Callable[[Job, int], tuple[Running, str, int | None]]
    needs: tuple[str, ...] = ()
    by_budget: bool = True  # whether it plans at all


PEERS = {
    "device_map": Peer(device_map, ("accelerate",)),
    "recompute": Peer(recompute, by_budget=False),
    "sac_milp": Peer(sac, ("pulp", "pwlf")),
}


def missing(peer: Peer) -> list[str]:
    found = []
    for name in peer.needs:
        try:
            import_module(name)
        except ImportError:
            found.append(name)
    return found


def compare(names: list[str], job: Job) -> dict:
    """A row for each plan of a peer, and ours in as many bytes."""
    found, plain = conditions(), Running(job, job.model()).peak
    rows: list[dict] = []
    races: list[tuple[dict, dict[str, Running]]] = []
    for name in names:
        peer = PEERS[name]
        shares: tuple[float | None, ...] = SHARES if peer.by_budget else (None,)
        if absent := missing(peer):
            rows.append({"peer": name, "error": f"needs {', '.join(absent)}: not installed"})
            continue
        for share in (1.0, *shares) if name == "device_map" else shares:
            budget = int(plain * (share or 1.0))
            row: dict = {"peer": name, "budget": budget if share else None}
            rows.append(row)
            print(f"{name} {share or ''}", file=sys.stderr)
            try:
                theirs, row["plan"], row["predicted"] = peer.plan(job, budget)
            except ValueError as error:
                row["error"] = str(error)
                continue
            row["peak"] = theirs.peak
            row["over"] = share is not None and theirs.peak > budget
            if any(r is not row and r.get("plan") == row["plan"] for r in rows):
                continue  # one plan, whatever the budget, is run once
            mine, row["our_plan"], row["our_predicted"] = ours(job, theirs.peak)
            row["our_peak"] = mine.peak
            race = {"their": theirs, "our": mine}
            if same := recomputing(job, theirs.peak):
                race["recomputing"], row["recomputing_plan"], _ = same
            races.append((row, race))
    for turn in range(job.rounds):
        print(f"\rround {turn + 1}/{job.rounds}", end="", file=sys.stderr)
        for _, race in races:
            # Who goes first changes, so that nobody always finds the caches warm.
            for running in list(race.values())[:: -1 if turn % 2 else 1]:
                running.turn()
    print(file=sys.stderr)
    for row, race in races:
        for who, running in race.items():
            row[f"{who}_seconds"] = statistics.median(running.seconds)
            pairs = zip(running.seconds, race["their"].seconds, strict=True)
            row[f"{who}_ratio"] = statistics.median(mine / theirs for mine, theirs in pairs)
    timed = [row for row in rows if "our_ratio" in row]
    held = [row["our_peak"] <= row["peak"] and row["our_ratio"] <= NOISE for row in timed]
    return {"plain": plain, "rows": rows, "conditions": found, "held": bool(held) and all(held)}


def table(result: dict) -> str:
    lines = [
        "| peer | budget | its plan | its peak | its s/step "
        "| our plan | our peak | s/step | ratio | ratio, recomputing alone |",
        "| --- | ---: | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        budget = format_bytes(row["budget"]) if row.get("budget") else ""
        if "error" in row:
            lines.append(f"| {row['peer']} | {budget} | {row['error']} |" + " |" * 7)
            continue
        cells = [row["peer"], budget, row["plan"]]
        cells.append(format_bytes(row["peak"]) + (" OVER" if row["over"] else ""))
        if "our_ratio" in row:
            cells += [f"{row['their_seconds']:.3f}", row["our_plan"], format_bytes(row["our_peak"])]
            cells += [f"{row['our_seconds']:.3f}", f"{row['our_ratio']:.3f}"]
            alone = row.get("recomputing_ratio")
            cells.append("nothing fits" if alone is None else f"{alone:.3f}")
        else:
            cells += ["", "as above", "", "", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def notes(result: dict, job: Job) -> str:
    def errors(ours: bool) -> str:
        prefix = "our_" if ours else ""
        found = [
            abs(row[f"{prefix}predicted"] / row[f"{prefix}peak"] - 1)
            for row in result["rows"]
            if row.get(f"{prefix}predicted") and (ours or row["peer"] == "sac_milp")
        ]
        return f"{max(found):.1%}" if found else "not known"

    return (
        f"GPT-2, {job.layers} blocks of width {job.width}, batch {job.batch} x {job.sequence}; "
        f"plain training holds {format_bytes(result['plain'])}. Only `fit` offers moving what is "
        "saved, micro-batches, updates in backward and a loss by chunks. device_map offers placing "
        "weights for inference alone; sac_milp offers recomputing alone, but within modules, which "
        "`fit` does by whole blocks: the last column is `fit` with no more than that and the "
        "loss.\n\n"
        f"Largest error of a predicted peak: sac_milp {errors(False)}, fit {errors(True)}. In as "
        f"many bytes, our plan is as fast as every peer's (within {NOISE - 1:.0%}): "
        f"{'yes' if result['held'] else 'NO'}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", choices=JOBS, default="full")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--write", action="store_true", help="store the section in RESULTS.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    job = JOBS[options.job]
    result = compare(options.peers, job)
    text = f"{table(result)}\n\n{notes(result, job)}"
    print(json.dumps(result, indent=1) if options.json else text)
    if options.write:
        write_section("Plans", text, result["conditions"])
    if not result["held"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
