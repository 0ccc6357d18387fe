"""What a plan keeps of each category, as records of four fields: form, extent, place, life.

Plain training keeps everything, in the parameters' dtype, on the device, as long as it is used.
Each method edits the fields that it writes; two methods that write the same one exclude each other.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from holdfast.plan.file import Methods, parse_runs
from holdfast.plan.registry import methods


class Record(NamedTuple):
    """How one category is kept: in what form, how much of it, where, and for how long."""

    form: str
    extent: str
    place: str
    life: str


def plain(dtype: str) -> dict[str, Record]:
    """What training keeps where no method changes it."""
    return {
        "parameters": Record(dtype, "all, all train", "device", "the whole run"),
        "gradients": Record(dtype, "all that train", "device", "from backward to the step"),
        "optimizer": Record(dtype, "two moments of all that train", "device", "the whole run"),
        "activations": Record(dtype, "what backward reads", "device", "from forward to backward"),
    }


def records(spec: Methods) -> dict[str, Record]:
    """Category -> its record under the methods of a plan file."""
    found = plain(spec.dtype)
    choices = (spec.weights, spec.adapter, spec.optimizer, *spec.saved)
    for key in (next(iter(choice)) for choice in choices if choice):
        for category, record in found.items():
            found[category] = methods()[key].edit(category, record)
    if spec.gradients == "backward":
        found["gradients"] = found["gradients"]._replace(life="consumed within backward")
    options = [option for runs in spec.blocks.values() for option in parse_runs(runs)]
    kept = found["activations"]
    for option in sorted({*options} - {"keep"}):
        share = f"{options.count(option)} of {len(options)} blocks"
        if option == "recompute":
            kept = kept._replace(life=f"{kept.life}; recomputed in {share}")
        else:
            kept = kept._replace(place=f"{kept.place}; {option} for {share}")
    if spec.loss_chunk:
        kept = kept._replace(extent=f"{kept.extent}; logits of {spec.loss_chunk} tokens at once")
    found["activations"] = kept
    return found


# Stands for gradients that are consumed within backward, where a method forbids them.
BACKWARD = "backward"


def refusal(keys: Iterable[str]) -> str | None:
    """Why methods, and `BACKWARD` if gradients are so consumed, cannot be in one plan, or None."""
    keys = list(keys)
    chosen = [methods()[k] for k in keys if k != BACKWARD]
    for one in chosen:
        for other, reason in one.forbids.items():
            if other in keys:
                return f"{one.key} excludes {other}: {reason}"
        for needed, reason in one.requires.items():
            if needed not in keys:
                return f"{one.key} needs {needed}: {reason}"
    for one, two in itertools.combinations(chosen, 2):
        for category, field in sorted(one.writes.keys() & two.writes.keys()):
            return f"{one.key} and {two.key} both write the {field} of {category}"
    return None


def with_needs(keys: Iterable[str]) -> list[str]:
    """Methods and those that they require beside them."""
    found = list(keys)
    for key in found:
        if key != BACKWARD:
            found += [needed for needed in methods()[key].requires if needed not in found]
    return found


def rules() -> dict[tuple[str, str], str]:
    """Every pair of methods of different slots, or of the slot `saved`, that excludes each other.

    A method may also not apply to a model, for example because an adapter has frozen what it works
    on; it says so itself where it is applied.
    """
    found = {}
    for one, two in itertools.combinations([*methods(), BACKWARD], 2):
        slots = [methods()[key].slot for key in (one, two) if key != BACKWARD]
        if len(slots) == 2 and slots[0] == slots[1] != "saved":
            continue  # a plan has room for one
        keys = with_needs((one, two))
        taken = [methods()[key].slot for key in keys if key != BACKWARD]
        double = next((s for s in taken if s != "saved" and taken.count(s) > 1), None)
        reason = refusal(keys)
        if reason is None and double is not None:
            reason = f"{one} and {two} need two methods of the slot {double}"
        if reason is not None:
            found[one, two] = reason
    return found
