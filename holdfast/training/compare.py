"""The same job under several methods: one run each, then bytes, loss and time side by side.

Every run is a process of its own, so that its peak is its own and one that dies takes no other
along. Runs that are finished are not repeated.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import UsageError, unknown
from holdfast.files import write_text
from holdfast.plan.file import Training
from holdfast.plan.plan import Plan
from holdfast.plan.records import BACKWARD, refusal
from holdfast.plan.registry import methods
from holdfast.plan.skeletons import Request
from holdfast.training.recipes import Predictor, Recipe

# Words beside the methods' keys, and what they change in a recipe.
WORDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recompute": {"option": "recompute"},
    "backward": {"in_backward": True},
    "chunk": {"chunk_loss": True},
    "bf16": {"dtype": "bfloat16"},
}


@dataclass(frozen=True)
class Contender:
    """A plan with the name under which it is shown."""

    label: str
    plan: Plan


def parse(text: str) -> tuple[Recipe, float | None]:
    """ "lora+int4@3e-3" -> a recipe of these methods, and its own learning rate or None.

    Raises:
        UsageError: an unknown word, methods that do not go together, a malformed rate.
    """
    words, _, rate = text.partition("@")
    changes: dict[str, Any] = {}
    keys: list[str] = []
    for word in words.split("+"):
        if word in WORDS:
            changes |= WORDS[word]
        elif word in methods():
            keys.append(word)
        else:
            raise unknown("method", word, [*WORDS, *methods()])
    reason = refusal([*keys, *([BACKWARD] if "in_backward" in changes else [])])
    if reason is not None:
        raise UsageError(f"{text} cannot be planned: {reason}")
    by_slot: dict[str, list[str]] = {}
    for key in keys:
        by_slot.setdefault(methods()[key].slot, []).append(key)
    for slot in ("optimizer", "weights", "adapter"):
        if len(found := by_slot.get(slot, [])) > 1:
            raise UsageError(f"{text} names {len(found)} methods of the slot {slot}; name one")
        if slot in by_slot:
            changes[slot] = by_slot[slot][0]
    recipe = Recipe(text, saved=tuple(by_slot.get("saved", ())), **changes)
    if not rate:
        return recipe, None
    try:
        return recipe, float(rate)
    except ValueError:
        raise UsageError(
            f"{rate!r} in {text} is no learning rate; write for example {words}@1e-3"
        ) from None


def from_methods(request: Request, texts: Sequence[str], training: Training) -> list[Contender]:
    """A predicted plan for each combination; its budget is what it is predicted to need.

    Raises:
        UsageError: as in `parse`, or a method does not apply to the model.
    """
    predictor = Predictor(request)
    found = []
    for recipe, rate in map(parse, texts):
        spec = predictor.row(recipe).plan.spec
        own = training if rate is None else training.model_copy(update={"learning_rate": rate})
        found.append(Contender(recipe.label, Plan(spec.model_copy(update={"training": own}))))
    return found


def from_files(paths: Sequence[Path]) -> list[Contender]:
    """Plans as they are, named by their files.

    Raises:
        UsageError: they are not of one job, or two have the same name.
    """
    found = [Contender(path.stem, Plan.load(path)) for path in paths]
    first = found[0].plan.spec
    for other in found[1:]:
        for name in ("model", "task", "batch", "sequence"):
            one, two = getattr(first, name), getattr(other.plan.spec, name)
            if one != two:
                raise UsageError(
                    f"{paths[0]} has {name} {one}, {other.label} has {two}; "
                    "compare plans of the same job"
                )
    return found


def run(
    contenders: Sequence[Contender],
    out: Path,
    options: Sequence[str],
    on_start: Callable[[str, int], None] = lambda label, index: None,
) -> dict[str, Any]:
    """Train every contender with `holdfast train` and its `options`; write `out/compare.json`.

    Returns:
        {"rows": one per contender, smallest peak first, "pareto": labels}. A row that failed has
        `error` instead of figures.

    Raises:
        UsageError: two contenders have the same name.
    """
    labels = [c.label for c in contenders]
    double = next((one for one in labels if labels.count(one) > 1), None)
    if double is not None:
        raise UsageError(f"{double} is given twice; give every plan a name of its own")
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, contender in enumerate(contenders):
        on_start(contender.label, index)
        rows.append(_row(contender, out, options))
    rows.sort(key=lambda row: row.get("peak_bytes", float("inf")))
    document = {"rows": rows, "pareto": pareto(rows)}
    write_text(out / "compare.json", json.dumps(document, indent=1) + "\n")
    return document


def _row(contender: Contender, out: Path, options: Sequence[str]) -> dict[str, Any]:
    directory = out / contender.label
    plan = out / f"{contender.label}.yaml"
    contender.plan.save(plan)
    command = [sys.executable, "-m", "holdfast", "train", str(plan), "--out", str(directory)]
    done = subprocess.run(
        [*command, *options, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    row: dict[str, Any] = {
        "label": contender.label,
        "plan": str(plan),
        "exit_code": done.returncode,
    }
    # 4 ran, but held more than planned: its figures are as true as any.
    if done.returncode not in (0, 4):
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
        return row | {"error": f"ended with {how}; its message is above"}
    report = json.loads(done.stdout)
    measured = report["measured"]
    return row | {
        "peak_bytes": max(measured["peak_bytes"], measured["allocator_peak_bytes"] or 0),
        "predicted_bytes": report["predicted"]["peak_bytes"],
        "meter_bytes": measured["peak_bytes"],
        "rss_increase_bytes": measured["rss_increase_bytes"],
        "by_category": measured["by_category"],
        "loss": report["loss"]["last"],
        "validation_loss": report["loss"].get("validation"),
        "seconds_per_step": report["seconds_per_step"],
        "steps": report["steps"],
        "within_budget": report["within_budget"],
    }


def _merits(row: dict[str, Any]) -> tuple[float, ...]:
    """Smaller is better in each."""
    loss = row["loss"] if row["validation_loss"] is None else row["validation_loss"]
    return row["peak_bytes"], loss, row["seconds_per_step"] or 0.0


def pareto(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Labels of rows that no other row equals or beats in bytes, loss and time together."""
    ran = [row for row in rows if "error" not in row]

    def beaten(row: dict[str, Any]) -> bool:
        mine = _merits(row)
        others = (_merits(other) for other in ran if other is not row)
        return any(
            all(a <= b for a, b in zip(theirs, mine, strict=True)) and theirs != mine
            for theirs in others
        )

    return [row["label"] for row in ran if not beaten(row)]


def draw(document: dict[str, Any], path: Path) -> None:
    """Peak bytes against loss, time as colour; what no other beats is filled and joined."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ran = [row for row in document["rows"] if "error" not in row]
    figure, axes = pyplot.subplots(figsize=(8, 5))
    sizes = [row["peak_bytes"] / 2**20 for row in ran]
    losses = [_merits(row)[1] for row in ran]
    seconds = [row["seconds_per_step"] or 0.0 for row in ran]
    front = [row["label"] in document["pareto"] for row in ran]
    points = axes.scatter(sizes, losses, c=seconds, cmap="viridis", s=70, zorder=3)
    figure.colorbar(points, label="seconds per step")
    for size, loss, row, best in zip(sizes, losses, ran, front, strict=True):
        if best:
            axes.scatter([size], [loss], facecolors="none", edgecolors="black", s=170, zorder=2)
        axes.annotate(
            row["label"], (size, loss), xytext=(6, 6), textcoords="offset points", fontsize=8
        )
    axes.set_xlabel("peak MiB, device + host")
    axes.set_ylabel("validation loss" if ran and ran[0]["validation_loss"] else "loss")
    axes.set_title("Circled: no other run is as good in bytes, loss and time together", fontsize=9)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
