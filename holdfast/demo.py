"""The main job on real text: train one model plainly, then within 40 % of what that took.

Everything is run through the command line that users have: `holdfast fit` and `holdfast train`.
The plain recipe is torch's default AdamW in fp32 that keeps every activation.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from holdfast.host import machine
from holdfast.ledger import CATEGORIES
from holdfast.units import format_bytes

FRACTION = 0.40
BATCH, SEQUENCE, STEPS = 8, 256, 30
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 264,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
# Packages of Python's standard library: text that every machine with Python has.
CORPUS = ("asyncio", "collections", "concurrent", "email", "http", "json", "logging", "xml")


def corpus() -> list[str]:
    return [str(Path(os.__file__).parent / name) for name in CORPUS]


def plain_plan(config: Path) -> dict:
    """What most people run: fp32, AdamW as torch ships it, nothing recomputed."""
    return {
        "model": str(config),
        "task": "pretrain",
        "batch": BATCH,
        "micro_batch": BATCH,
        "sequence": SEQUENCE,
        "budget": {"device": "64GiB"},
        "methods": {
            "dtype": "float32",
            "optimizer": {"adamw": {"fused": False}},
            "blocks": {"model.layers": f"keep*{CONFIG['num_hidden_layers']}"},
        },
        "training": {"learning_rate": 1e-3},
        "hardware": "cpu-2core",
    }


def holdfast(*arguments: str) -> str:
    """Run the command line in a process of its own; its stdout."""
    command = [sys.executable, "-m", "holdfast", *arguments]
    print("$ holdfast " + " ".join(arguments), file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"holdfast {arguments[0]} ended with exit code {done.returncode}")
    return done.stdout


def train(plan: Path, out: Path, steps: int) -> dict:
    data = [part for path in corpus() for part in ("--data", path)]
    return json.loads(
        holdfast(
            "train", str(plan), *data, "--glob", "**/*.py", "--steps", str(steps),
            "--out", str(out), "--json",
        )
    )  # fmt: skip


def peak(report: dict) -> int:
    """The larger of what the Meter saw and what the allocator handed out over the whole run."""
    measured = report["measured"]
    return max(measured["peak_bytes"], measured["allocator_peak_bytes"] or 0)


def run(directory: Path, steps: int) -> dict:
    """Both runs; returns their reports, the budget and whether every promise was kept."""
    import yaml

    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    config = directory / "config.json"
    config.write_text(json.dumps(CONFIG))
    (directory / "plain.yaml").write_text(yaml.safe_dump(plain_plan(config), sort_keys=False))
    plain = train(directory / "plain.yaml", directory / "plain", steps)
    budget = int(peak(plain) * FRACTION)
    fitted = json.loads(
        holdfast(
            "fit", str(config), "--budget", str(budget), "--task", "pretrain",
            "--batch", str(BATCH), "--sequence", str(SEQUENCE), "--allow", "lossy",
            "--hardware", "cpu-2core", "--out", str(directory / "plan.yaml"), "--json",
        )
    )  # fmt: skip
    plan = train(directory / "plan.yaml", directory / "plan", steps)
    kept = {
        f"peak within {FRACTION:.0%} of plain": peak(plan) <= budget,
        "validation loss within 3 % of plain": plan["loss"]["validation"]
        <= 1.03 * plain["loss"]["validation"],
        "seconds per step at most 2x": plan["seconds_per_step"] <= 2 * plain["seconds_per_step"],
    }
    return {"plain": plain, "plan": plan, "fit": fitted, "budget_bytes": budget, "kept": kept}


def show(result: dict, console: Console) -> None:
    plain, plan = result["plain"], result["plan"]
    methods = result["fit"]["plan"]["methods"]
    console.print(f"plan: {json.dumps(methods)}")
    table = Table("", "plain", "plan", "plan / plain", title="The same model, batch, tokens, steps")

    def row(name, key, shown=format_bytes):
        one, two = key(plain), key(plan)
        table.add_row(name, shown(one), shown(two), f"{two / one:.2f}" if one else "")

    row("peak, device + host", peak)
    row("  by Meter", lambda r: r["measured"]["peak_bytes"])
    row("  by allocator, whole run", lambda r: r["measured"]["allocator_peak_bytes"] or 0)
    row("peak RSS increase", lambda r: r["measured"]["rss_increase_bytes"])
    row("validation loss", lambda r: r["loss"]["validation"], "{:.4f}".format)
    row("seconds per step", lambda r: r["seconds_per_step"], "{:.3f}".format)
    row("steps", lambda r: r["steps"], str)
    row("tokens", lambda r: r["tokens"], str)
    console.print(table)
    table = Table("category", "plain", "predicted", "measured", title="Bytes at the peak, plan")
    for category in CATEGORIES:
        cells = [
            plain["measured"]["by_category"][category],
            plan["predicted"]["by_category"][category],
            plan["measured"]["by_category"][category],
        ]
        if any(cells):
            table.add_row(category, *map(format_bytes, cells))
    totals = [
        plain["measured"]["peak_bytes"],
        plan["predicted"]["peak_bytes"],
        plan["measured"]["peak_bytes"],
    ]
    table.add_row("total", *map(format_bytes, totals), style="bold")
    console.print(table)
    console.print(f"budget: {format_bytes(result['budget_bytes'])}")
    for promise, held in result["kept"].items():
        console.print(f"{'kept  ' if held else 'BROKEN'}  {promise}")


def summary(result: dict) -> dict:
    """The figures that README shows, with the machine on which they were measured."""
    runs = {
        name: {
            "peak_bytes": peak(result[name]),
            "rss_increase_bytes": result[name]["measured"]["rss_increase_bytes"],
            "predicted_bytes": result[name]["predicted"]["peak_bytes"],
            "meter_bytes": result[name]["measured"]["peak_bytes"],
            "validation_loss": result[name]["loss"]["validation"],
            "seconds_per_step": result[name]["seconds_per_step"],
        }
        for name in ("plain", "plan")
    }
    return runs | {"steps": result["plan"]["steps"], "machine": machine()}


def markdown(recorded: dict) -> str:
    """The table of README's first page."""
    plain, plan = recorded["plain"], recorded["plan"]
    rows = [
        ("peak bytes, device + host", "peak_bytes", format_bytes),
        ("peak RSS increase", "rss_increase_bytes", format_bytes),
        ("validation loss", "validation_loss", "{:.4f}".format),
        ("seconds per step", "seconds_per_step", "{:.2f}".format),
    ]
    lines = ["| the same model, batch, tokens, steps | plain | plan | ratio |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {shown(plain[key])} | {shown(plan[key])} | {plan[key] / plain[key]:.2f} |"
        for name, key, shown in rows
    ]
    error = plan["meter_bytes"] - plan["predicted_bytes"]
    return "\n".join(
        [
            *lines,
            "",
            f"Predicted {plan['predicted_bytes']:,} bytes, measured {plan['meter_bytes']:,}: "
            f"{error:+,} ({recorded['machine']['cpu']}, {recorded['machine']['cores']} cores, "
            f"{recorded['steps']} steps).",
        ]
    )


def record(result: dict, chart: Path) -> None:
    """Put the figures and the chart into the project's documentation."""
    root = Path(__file__).parents[1]
    text = json.dumps(summary(result), indent=1) + "\n"
    (root / "docs" / "demo.json").write_text(text, encoding="utf-8")
    shutil.copy(chart, root / "docs" / "demo.png")
    readme = (root / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- demo:begin -->\n", "<!-- demo:end -->"
    head, _, rest = readme.partition(begin)
    tail = rest.partition(end)[2]
    table = markdown(summary(result))
    (root / "README.md").write_text(f"{head}{begin}{table}\n{end}{tail}", encoding="utf-8")


def draw(result: dict, path: Path) -> None:
    """Stacked bars by category: plain, predicted, measured, and the budget's line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = {
        "plain\n(measured)": result["plain"]["measured"]["by_category"],
        "plan\n(predicted)": result["plan"]["predicted"]["by_category"],
        "plan\n(measured)": result["plan"]["measured"]["by_category"],
    }
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.5), width_ratios=(3, 2))
    bottoms = [0.0] * len(bars)
    for category in CATEGORIES:
        sizes = [cells[category] / 2**20 for cells in bars.values()]
        if max(sizes) >= 0.01:
            left.bar(list(bars), sizes, bottom=bottoms, label=category, width=0.6)
            bottoms = [a + b for a, b in zip(bottoms, sizes, strict=True)]
    budget = result["budget_bytes"] / 2**20
    left.axhline(budget, color="black", linestyle="--", linewidth=1)
    left.text(2.35, budget, f" budget\n {FRACTION:.0%}", va="center", fontsize=8)
    left.set_ylabel("MiB at the peak")
    left.legend(fontsize=8)
    for name in ("plain", "plan"):
        log = Path(path).with_name(name) / "log.jsonl"
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        right.plot([e["step"] for e in entries], [e["loss"] for e in entries], label=name)
    right.set_xlabel("step")
    right.set_ylabel("training loss")
    right.legend(fontsize=8)
    figure.suptitle("The same model, batch, tokens and steps")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m holdfast.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--record", action="store_true", help="update README and docs")
    options = parser.parse_args()
    console = Console(width=100)
    result = run(options.out, options.steps)
    (options.out / "result.json").write_text(json.dumps(result, indent=1))
    show(result, console)
    draw(result, options.out / "demo.png")
    console.print(f"chart: {options.out / 'demo.png'}")
    if options.record:
        record(result, options.out / "demo.png")
    if not all(result["kept"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
