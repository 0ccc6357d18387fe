"""Method: what the planner sees of a system.

A method never returns a total. It says which field (form, extent, place, life) of which category
it writes, and changes the model or makes the optimizer. One engine traces the changed step and sums
what its events hold, so that bytes compose by construction and no formula is believed untested.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from holdfast.plan.records import Record

FIELDS = ("form", "extent", "place", "life")
SLOTS = ("parameters", "weights", "adapter", "optimizer", "gradients", "saved", "blocks", "loss")


@dataclass(frozen=True)
class Quality:
    """How far a method may move the result: exact, bounded by `estimate`, or lossy.

    `estimate` is the relative increase in validation loss; `source` says where it was measured.
    """

    kind: Literal["exact", "bounded", "lossy"] = "exact"
    estimate: float = 0.0
    source: str = ""

    @property
    def rank(self) -> int:
        return ("exact", "bounded", "lossy").index(self.kind)


EXACT = Quality()


@dataclass(frozen=True)
class Method:
    """One system in one slot of a plan.

    Args:
        key: the system's key in the catalogue, or a baseline's name such as `adamw`.
        slot: which decision of a plan it answers; `saved` takes several, the others one.
        writes: (category, field) -> what it makes of that field, in a few words; two methods that
            share a pair exclude each other. Adapters write what of the parameters trains; that
            gradients and optimizer follow is not written again.
        apply: `optimizer`: (named_parameters, lr, *, weight_decay, **knobs) -> an optimizer;
            `weights`, `adapter`, `saved`: (model, **knobs) -> model, changed in place. Must also
            work on meta and fake tensors, because predictions trace it.
        wrap: (model, optimizer, **knobs) -> the optimizer to use instead, for methods that also act
            around each step.
        calibrate: (model, batches, **knobs) -> None, once before the first step of a new run, on
            batches of the training data as the model takes them.
        knobs: name -> finite domain, default first.
        quality: knobs -> Quality.
        applies: (model, **knobs) -> None, or one line that says why not.
        state_bytes: optimizers: (shape, dtype, **knobs) -> exact bytes kept per parameter between
            steps, including step counters, scales and indices.
        automatic: considered by `fit` where the user names no method of the slot.
        requires, forbids: keys of methods that must, or must not, be in the same plan, each with
            its reason; `backward` in forbids: gradients consumed within backward.
    """

    key: str
    slot: str
    writes: Mapping[tuple[str, str], str]
    apply: Callable[..., Any]
    knobs: Mapping[str, tuple] = field(default_factory=dict)
    quality: Callable[..., Quality] = lambda **knobs: EXACT
    applies: Callable[..., str | None] = lambda model, **knobs: None
    state_bytes: Callable[..., int] | None = None
    wrap: Callable[..., Any] | None = None
    calibrate: Callable[..., None] | None = None
    automatic: bool = True
    requires: Mapping[str, str] = field(default_factory=dict)
    forbids: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.slot not in SLOTS:
            raise ValueError(f"slot {self.slot!r} of {self.key!r} is not one of {SLOTS}")
        for _, what in self.writes:
            if what not in FIELDS:
                raise ValueError(f"{self.key!r} writes {what!r}, which is not one of {FIELDS}")

    def edit(self, category: str, record: "Record") -> "Record":
        """The record of a category as this method leaves it."""
        mine = {what: text for (c, what), text in self.writes.items() if c == category}
        return record._replace(**mine)

    def defaults(self) -> dict[str, Any]:
        return {name: domain[0] for name, domain in self.knobs.items()}
