"""One fine-tuning job under plain torch, its peers and a Holdfast plan: bytes, seconds, loss.

    .venv/bin/pip install -c constraints.txt -r benchmarks/requirements.txt
    .venv/bin/python benchmarks/training_memory.py [--json] [--write]

A byte-level LLaMA, pretrained on source code of Python's standard library (once, then cached), is
fine-tuned on the reference documentation that Python carries. All methods see the same batches.
Each has a process of its own, and the processes take turns step by step, so that other load falls
on all alike. What is not installed or fails is shown with its error.

peak      torch's CPU allocator over the whole run, from before the model is built, the one metered
          step left out; the Meter's where the allocator library is not built
meter     the Meter's logical bytes of step 3, in which compiled optimizers run eagerly
rss       rise of the resident set over the whole run; what a method compiles or imports late is in
seconds   median over the steps after the third
loss      nats per byte on held-out topics after the last step
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import torch
from finetune_job import JOBS, Job, documentation, load, pretrained, validation_loss
from results import conditions, write_section
from torch import nn

from holdfast import host
from holdfast.meter import Meter
from holdfast.native.allocator import AllocatorPeak
from holdfast.units import format_bytes

METERED = 2  # the step, from 0, that the Meter sees; those before it warm up
SAME_LOSS = 1.03


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Args:
        build: (model, rate, plan file) -> (model, optimizer).
        rate: constant learning rate; of three, a factor of 3 apart and the documented one among
            them, the one with the least loss here (`--rate-factor` repeats that).
        use: how it is called.
        needs: the module that its package must offer.
        default: whether this is its documented default use, which the verdict compares with.
    """

    build: Callable[[nn.Module, float, str], tuple[nn.Module, torch.optim.Optimizer]]
    rate: float
    use: str
    needs: str = "torch"
    default: bool = True


def plain(model, rate, _plan):
    return model, torch.optim.AdamW(model.parameters(), lr=rate)


def lora(model, rate, _plan):
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=32, lora_dropout=0.1)
    return plain(get_peft_model(model, config), rate, _plan)


def torchao4(model, rate, _plan):
    from torchao.optim import AdamW4bit

    return model, AdamW4bit(model.parameters(), lr=rate)


def torchao8(model, rate, _plan):
    from torchao.optim import AdamW8bit

    return model, AdamW8bit(model.parameters(), lr=rate)


def bitsandbytes8(model, rate, _plan):
    from bitsandbytes.optim import AdamW8bit

    return model, AdamW8bit(model.parameters(), lr=rate)


def galore(model, rate, _plan):
    from galore_torch import GaLoreAdamW

    projected = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name)
    ]
    known = {id(weight) for weight in projected}
    others = [p for p in model.parameters() if id(p) not in known]
    knobs = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": others}, {"params": projected, **knobs}]
    return model, GaLoreAdamW(groups, lr=rate)


def holdfast_plan(model, rate, plan):
    from holdfast import Plan

    return Plan.load(plan).apply(model, torch.optim.AdamW(model.parameters(), lr=rate))


def checkpointing(build):
    """The same with Hugging Face's recompute of every block switched on."""

    def both(model, rate, plan):
        model.gradient_checkpointing_enable()
        return build(model, rate, plan)

    return both


METHODS = {
    "plain": Method(plain, 1e-3, "torch.optim.AdamW(parameters)"),
    "peft LoRA": Method(lora, 3e-3, "r=8, alpha=32, dropout 0.1, default targets", "peft"),
    "torchao 8-bit": Method(torchao8, 1e-3, "AdamW8bit(parameters)", "torchao.optim"),
    "torchao 4-bit": Method(torchao4, 1e-3, "AdamW4bit(parameters)", "torchao.optim"),
    "bitsandbytes 8-bit": Method(
        bitsandbytes8, 1e-3, "AdamW8bit(parameters)", "bitsandbytes.optim"
    ),
    "galore-torch": Method(
        galore, 3.3e-3, "GaLoreAdamW, rank 128, gap 200, scale 0.25", "galore_torch"
    ),
    "peft LoRA + recompute": Method(
        checkpointing(lora), 3e-3, "the same, gradient_checkpointing_enable()", "peft", False
    ),
    "torchao 4-bit + recompute": Method(
        checkpointing(torchao4),
        1e-3,
        "the same, gradient_checkpointing_enable()",
        "torchao.optim",
        False,
    ),
    "holdfast": Method(holdfast_plan, 1e-3, "fit, then plan.apply(model, AdamW)"),
}


def _eager():
    """What a peer compiles cannot be followed by a dispatch mode, so the metered step runs eagerly.

    The allocator sees it as it is compiled.
    """
    return torch.compiler.set_stance("force_eager")


def turns(method: Method, rate: float, job: Job, folder: Path, plan: str) -> Iterator[dict]:
    """One message per training step, then the report."""
    import_module(method.needs)
    from holdfast.plan.plan import Plan

    accumulation = Plan.load(plan).spec.accumulation if method.build is holdfast_plan else 1
    train, validation = documentation()
    able, _ = AllocatorPeak.supported()
    counter = AllocatorPeak() if able else None
    seconds, peak, meter = [], 0, None
    with counter or nullcontext(), host.PeakRss() as rss:
        torch.manual_seed(0)
        model, optimizer = method.build(load(folder), rate, plan)
        model.train()
        for step, batch in enumerate(job.batches(train, job.steps, seed=1)):
            metered = step == METERED
            if metered:
                peak = counter.peak if counter else 0
                meter = Meter(model, optimizer, inputs=[batch])
            start = time.perf_counter()
            with _eager() if metered else nullcontext(), meter if metered else nullcontext():
                for part in batch.chunk(accumulation):
                    loss = model(input_ids=part, labels=part).loss
                    (loss / accumulation).backward()
                optimizer.step()
                optimizer.zero_grad()
            taken = time.perf_counter() - start
            if metered and counter:
                counter.reset()
            if step > METERED:
                seconds.append(taken)
            del loss
            yield {"meter_bytes": meter.peak if meter else None}
        loss = validation_loss(model, validation, job)
    peak = max(peak, counter.peak) if counter else meter.peak
    yield {
        "peak_bytes": peak,
        "meter_bytes": meter.peak,
        "allocator_bytes": peak if counter else None,
        "rss_bytes": rss.increase,
        "seconds": statistics.median(seconds),
        "loss": loss,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def serve(pipe, name: str, rate: float, job: Job, folder: Path, plan: str) -> None:
    """In a process of its own: one turn for each message, until it fails or is done."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(host.cores())
    run = turns(METHODS[name], rate, job, folder, plan)
    while pipe.recv():
        try:
            pipe.send(next(run))
        # Whatever a peer's code raises is a result of the comparison.
        except Exception as error:
            line = next(iter(str(error).strip().splitlines()), "")
            pipe.send({"error": f"{type(error).__name__}: {line}"[:200]})
            return


class Worker:
    """The parent's end of one method's process."""

    def __init__(self, name: str, rate: float, job: Job, folder: Path, plan: str = ""):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, name, rate, job, folder, plan), daemon=True
        )
        self.process.start()
        theirs.close()
        self.last: dict = {}

    def turn(self, count: int = 1) -> dict:
        for _ in range(count):
            if "error" in self.last:
                break
            try:
                self.pipe.send(True)
                self.last = self.pipe.recv()
            except (EOFError, OSError):
                self.process.join()
                self.last = {"error": f"its process ended with code {self.process.exitcode}"}
        return self.last

    def close(self) -> None:
        if self.process.is_alive():
            self.process.terminate()
        self.process.join()


def compare(names: list[str], job: Job, factor: float) -> dict:
    """All rows, the plan, and whether what is promised of it held."""
    import holdfast

    folder = pretrained(job)
    found = conditions()
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as scratch:

        def start(name: str, plan: str = "") -> dict:
            print(f"{name}: warm-up", file=sys.stderr)
            workers[name] = Worker(name, METHODS[name].rate * factor, job, folder, plan)
            return workers[name].turn(METERED + 1)

        try:
            first = start("plain")
            if "error" in first:
                sys.exit(f"plain torch failed: {first['error']}")
            plan = holdfast.fit(
                str(folder),
                int(first["meter_bytes"] * job.fraction),
                batch=job.batch,
                sequence=job.sequence,
                tune="full",
                allow="lossy",
                dtype="float32",  # as all peers have it
                hardware="cpu-2core",
            )
            path = f"{scratch}/plan.yaml"
            plan.save(path)
            for name in names:
                if name != "plain":
                    start(name, path)
            for step in range(METERED + 1, job.steps):
                print(f"\rstep {step + 1}/{job.steps}", end="", file=sys.stderr)
                for worker in workers.values():
                    worker.turn()
            print(file=sys.stderr)
            rows = {name: worker.turn() for name, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.close()
    for name, row in rows.items():
        row.update(rate=METHODS[name].rate * factor, use=METHODS[name].use)
        row["default"] = METHODS[name].default
    return {
        "job": asdict(job) | {"parameters": rows["plain"]["trainable"]},
        "conditions": found,
        "rows": rows,
        "plan": {
            "budget_bytes": plan.budget.device,
            "predicted_bytes": plan.predicted.peak("device"),
            "micro_batch": plan.spec.micro_batch,
            "methods": plan.spec.methods.model_dump(mode="json"),
        },
        "verdict": verdict(rows),
    }


def verdict(rows: dict[str, dict]) -> dict:
    """Whether the plan is at equal loss, and below the peer of fewest bytes in default use."""
    ours, base = rows.get("holdfast", {}), rows["plain"]
    if "loss" not in ours:
        return {"equal_loss": False, "fewer_bytes": False, "best_peer": None}
    peers = {
        name: row["peak_bytes"]
        for name, row in rows.items()
        if name not in ("plain", "holdfast") and "loss" in row
    }
    default = {name: nbytes for name, nbytes in peers.items() if rows[name]["default"]}
    best = min(default, key=lambda name: default[name], default="plain")
    return {
        "equal_loss": ours["loss"] <= SAME_LOSS * base["loss"],
        "fewer_bytes": ours["peak_bytes"] < rows[best]["peak_bytes"],
        "best_peer": best,
        "of_best_peer": ours["peak_bytes"] / rows[best]["peak_bytes"],
        "fewer_still": [n for n, nbytes in peers.items() if nbytes < ours["peak_bytes"]],
    }


def table(result: dict) -> str:
    """The rows as markdown; ratios are to plain torch."""
    rows, base = result["rows"], result["rows"]["plain"]
    lines = [
        "| method | peak | / plain | meter | RSS | s/step | / plain | loss | / plain | rate |",
        "| --- " + "| ---: " * 9 + "|",
    ]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} |" + " |" * 8)
            continue
        cells = [name]
        for key, shown in (("peak_bytes", format_bytes), ("seconds", "{:.3f}".format)):
            cells += [shown(row[key]), f"{row[key] / base[key]:.2f}"]
            if key == "peak_bytes":
                cells += [format_bytes(row["meter_bytes"]), format_bytes(row["rss_bytes"])]
        cells += [f"{row['loss']:.4f}", f"{row['loss'] / base['loss']:.3f}", f"{row['rate']:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def notes(result: dict) -> str:
    """The job and what the rows do not say, as text."""
    job, plan, held = result["job"], result["plan"], result["verdict"]
    lines = [
        f"{job['parameters']:,} parameters in fp32, {job['layers']} layers, batch {job['batch']} x "
        f"{job['sequence']} bytes, {job['steps']} steps at constant rates.",
        "",
    ]
    lines += [f"- {name}: {row['use']}" for name, row in result["rows"].items()]
    chosen = {k: v for k, v in plan["methods"].items() if v}
    lines += [
        "",
        f"The plan, for {format_bytes(plan['budget_bytes'])} ({job['fraction']:.0%} of plain): "
        f"`{json.dumps(chosen)}`, micro-batch {plan['micro_batch']}; predicted peak "
        f"{format_bytes(plan['predicted_bytes'])}.",
        "",
    ]
    if held["best_peer"]:
        lines.append(
            f"Loss within 3 % of plain torch: {'yes' if held['equal_loss'] else 'NO'}. Fewer bytes "
            f"than the best peer in its default use ({held['best_peer']}): "
            f"{'yes' if held['fewer_bytes'] else 'NO'}, {held['of_best_peer']:.2f} of them."
        )
        if held["fewer_still"]:
            rows, base = result["rows"], result["rows"]["plain"]["loss"]
            fewer = [
                f"{n} (loss {rows[n]['loss'] / base:.3f} of plain)" for n in held["fewer_still"]
            ]
            lines.append(f"With fewer bytes than the plan: {', '.join(fewer)}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", choices=JOBS, default="full")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rate-factor", type=float, default=1.0, help="on every learning rate")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--write", action="store_true", help="store the section in RESULTS.md")
    options = parser.parse_args()
    result = compare(options.methods, JOBS[options.job], options.rate_factor)
    text = f"{table(result)}\n\n{notes(result)}"
    print(json.dumps(result, indent=1) if options.json else text)
    if options.write:
        write_section("Fine-tuning memory", text, result["conditions"])
    if not (result["verdict"]["equal_loss"] and result["verdict"]["fewer_bytes"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
