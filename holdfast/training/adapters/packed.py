"""Frozen weights as integers: the base that an adapter trains beside.

Keeps    every linear but the head as 4- or 8-bit integers with a scale and a zero per group.
Form     `Int4`; `Affine` with 8 bits. A group is 64 neighbours in a row of the (out, in) weight,
         fewer where 64 does not divide the inputs.
Bytes    the form's, exactly; products decode a tile at a time, backward too.
Source   Dettmers, Pagnoni, Holtzman, Zettlemoyer, QLoRA: efficient finetuning of quantized LLMs,
         NeurIPS 2023.
Departs  affine groups with fp16 scales instead of NF4 with scales that are rounded again.
"""

import math

from torch import nn

from holdfast.attach import Targets, features, find, is_transposed
from holdfast.errors import UsageError
from holdfast.forms.affine import Affine
from holdfast.forms.packed import Packed
from holdfast.plan.method import Method, Quality
from holdfast.training.adapters.base import refuse_tied

GROUP = 64
# Below this a group's scale and zero cost more than a 4-bit code each.
LEAST_GROUP = 8


def form_of(linear: nn.Module, bits: int) -> Affine:
    """The form in which the weight of a linear is written: the largest group that divides GROUP
    and the inputs, or a row where that would be too small."""
    group = math.gcd(features(linear)[0], GROUP)
    return Affine(bits=bits, group=group if group >= LEAST_GROUP else None)


def pack_weights(model: nn.Module, bits: int = 4, targets: Targets = "all-linear") -> nn.Module:
    """Write the weights of linears as frozen integers, in place, one after the other.

    Everything else of the model is as before. Each dense weight is freed before the next is
    written, so that loading needs no second model.

    Args:
        bits: 2, 3, 4 or 8.
        targets: see `holdfast.attach.find`.

    Raises:
        UsageError: other bits, unknown targets, a weight that is packed already or that another
            module shares.
    """
    chosen = find(model, targets)
    refuse_tied(model, chosen)
    for name, linear in chosen.items():
        form_of(linear, bits)
        if isinstance(linear.weight, Packed):
            raise UsageError(f"{name} is {linear.weight.form} already; pack dense weights only")
    for linear in chosen.values():
        dense = linear.get_parameter("weight").detach()
        # Groups run along the inputs, whichever way the weight is stored.
        packed = form_of(linear, bits).encode(dense.mT if is_transposed(linear) else dense)
        frozen = packed.t() if is_transposed(linear) else packed
        linear.weight = nn.Parameter(frozen, requires_grad=False)
    return model


def _applies(model: nn.Module) -> str | None:
    try:
        refuse_tied(model, find(model))
    except UsageError as error:
        return str(error)
    return None


def _method(key: str, bits: int, estimate: float) -> Method:
    source = "validation loss of tinylm after rounding its trained weights"
    return Method(
        key=key,
        slot="weights",
        writes={("parameters", "form"): f"{bits}-bit codes with group scales"},
        apply=lambda model: pack_weights(model, bits),
        quality=lambda: Quality("lossy", estimate, source),
        applies=_applies,
        requires={"lora": "rounded weights are frozen, so an adapter has to train beside them"},
    )


METHODS = (_method("int4", 4, 0.001), _method("int8", 8, 0.0001))
