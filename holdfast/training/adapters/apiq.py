"""ApiQ (004): round to 2-4 bits and start LoRA together, so that activations survive.

Keeps    per linear (m, n) frozen codes, and A (r, n), B (m, r), trained. Until the optimisation is
         done, the given weights lie on disk.
Form     codes of `bits` bits in groups of `group` neighbours of a row, each with an fp16 scale and
         a one-byte zero; A and B in the dtype of the weight, or `dtype`. No trace of the clipping.
Bytes    m * ceil(n * bits / 8) + 3 * m * n / group, and r * (m + n) trained elements. While it is
         optimised, up to three times the dense weights of one block in fp32, and the inputs of a
         block for all batches, in both streams. Plans do not predict this part.
Source   Liao, Herold, Khadivi, Monz, ApiQ: finetuning of 2-bit quantized large language model,
         EMNLP 2024; what the authors' code does, from a description of it. Clipping: Shao et al.,
         OmniQuant, ICLR 2024.
Departs  zero lies within every group's range, as in `Affine`; a zero takes a byte, not `bits` bits.
         Linears outside the repeated blocks are rounded to the nearest and not optimised.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from holdfast.attach import Handle, Targets, blocks, features, find, swap
from holdfast.errors import UsageError
from holdfast.forms.affine import Affine
from holdfast.forms.packed import Packed
from holdfast.places import DiskArena
from holdfast.plan.method import Method, Quality
from holdfast.training.adapters import files
from holdfast.training.adapters.apiq_fit import Batch, BlockFit, Fitted, calls_of, evaluating
from holdfast.training.adapters.base import attach, attached, layers, refuse_tied
from holdfast.training.adapters.lora import LoRA

BITS = (2, 3, 4)
EPOCHS = 20


class Originals(nn.Module):
    """The given weights of one model, on disk from `attach` until each block is optimised."""

    def __init__(self, nbytes: int):
        super().__init__()
        self.arena = DiskArena(nbytes) if nbytes else None
        self.count = 0

    def put(self, weight: Tensor) -> int:
        """Returns the key."""
        self.count += 1
        if self.arena is not None:
            self.arena.put(self.count, weight)
        return self.count

    def drop(self) -> None:
        if self.arena is not None:
            self.arena.close()
            self.arena = None

    def __deepcopy__(self, memo: dict) -> "Originals":
        return self  # a file that nobody changes


class ApiQ(LoRA):
    """LoRA beside a weight in codes, which `optimise` chooses together with A and B.

    Attaching rounds to the nearest and frees the dense weight; `detach` and `merge` give the
    rounded one back. A file holds the codes too, since the given model does not tell them; its
    `peft_type` is "APIQ", because a LoRA on the given model would be another one. `save_peft`
    writes what peft opens.

    Args:
        bits: of a code: 2, 3 or 4.
        group: neighbours in a row that share a scale; divides the inputs.
        rank, alpha, dtype: as in LoRA.
        originals: made by `attach`, shared by all linears of the model.

    Raises:
        UsageError: other bits, or a group that does not divide the inputs; names the layer.
    """

    key = "apiq"
    shares = ("originals",)

    def __init__(
        self,
        linear: nn.Module,
        *,
        originals: Originals,
        bits: int = 2,
        group: int = 64,
        rank: int = 64,
        alpha: float = 16.0,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(linear, rank=rank, alpha=alpha, dtype=dtype)
        _check(linear, "this linear", bits, group)
        dense = self.weight.detach().mT if self.transposed else self.weight.detach()
        self.weight_required_grad = self.weight.requires_grad
        self.original = originals.put(dense)
        self.take(Affine(bits, group).encode(dense))
        linear.register_parameter("weight", None)

    @classmethod
    def shared(cls, model: nn.Module, linears: Mapping[str, nn.Module], **knobs: Any) -> dict:
        for name, linear in linears.items():
            _check(linear, name, knobs["bits"], knobs["group"])
        refuse_tied(model, linears)
        weights = [linear.get_parameter("weight") for linear in linears.values()]
        symbolic = any(w.is_meta or isinstance(w, FakeTensor) for w in weights)
        return {"originals": Originals(0 if symbolic else sum(w.nbytes for w in weights))}

    @property
    def packed(self) -> Packed:
        """The codes, (out, in)."""
        weight: Any = self.weight.data
        return weight.t() if self.transposed else weight

    def take(self, packed: Packed) -> None:
        """Use these codes, (out, in), from now on."""
        stored = packed.t() if self.transposed else packed
        self.weight = nn.Parameter(stored, requires_grad=False)

    def restored(self) -> nn.Module:
        (linear,) = self.replaced
        dense = self.packed.dequantize()
        dense = dense.mT.contiguous() if self.transposed else dense
        linear.weight = nn.Parameter(dense, requires_grad=self.weight_required_grad)
        linear.bias = self.bias
        return linear.train(self.training)

    def beside(self) -> dict[str, Tensor]:
        return self.packed.to_buffers()

    @classmethod
    def check_others(cls, model: nn.Module, others: Mapping[str, Tensor]) -> None:
        adapted: dict[str, Any] = layers(model)
        known = {name.removeprefix("base_model.model."): t for name, t in others.items()}
        for name, layer in adapted.items():
            now = layer.packed
            found = {key: known.pop(f"{name}.{key}", None) for key in now.buffers}
            if missing := [key for key, tensor in found.items() if tensor is None]:
                raise UsageError(f"the file lacks {name}.{missing[0]}, a part of the weight")
            moved = {key: tensor.to(now.device) for key, tensor in found.items()}
            layer.take(Packed.from_buffers(now.form, now.stored_shape, now.dtype, moved))
        super().check_others(model, known)
        _originals(model).drop()

    @classmethod
    def to_file(cls, knobs: Mapping[str, Any]) -> dict[str, Any]:
        own = {"peft_type": "APIQ", "bits": knobs["bits"], "group": knobs["group"]}
        return super().to_file({"dropout": 0.0, **knobs}) | own

    @classmethod
    def from_file(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        found = super().from_file(config)
        del found["dropout"]
        return found | {"bits": config["bits"], "group": config["group"]}


def apiq(
    model: nn.Module,
    calib: Iterable[Batch],
    bits: int = 2,
    group: int = 64,
    rank: int = 64,
    *,
    alpha: float = 16.0,
    targets: Targets = "all-linear",
    level: Literal["block", "layer"] = "block",
    epochs: int = EPOCHS,
    aug_loss: bool = False,
) -> nn.Module:
    """Write the linears of `model` in few bits and start LoRA so that its activations stay.

    In place; afterwards only A and B train, and everything for adapters works on the model.

    Args:
        calib: batches as the model takes them: keyword arguments, or one tensor. The paper has 128
            sequences of 2048 tokens, one at a time.
        bits, group, rank, alpha: see `ApiQ`.
        targets: see `holdfast.attach.find`.
        level, epochs, aug_loss: see `optimise`.

    Raises:
        UsageError: of `attach` and `optimise`.
    """
    attach(model, "apiq", targets, bits=bits, group=group, rank=rank, alpha=alpha)
    return optimise(model, calib, level=level, epochs=epochs, aug_loss=aug_loss)


def optimise(
    model: nn.Module,
    calib: Iterable[Batch],
    *,
    level: Literal["block", "layer"] = "block",
    epochs: int = EPOCHS,
    aug_loss: bool = False,
) -> nn.Module:
    """Choose codes, A and B of every block in turn, so that its output stays what it was.

    Two streams go through the blocks: the outputs of the given model, and those of the model in
    codes, which are what the block will see. Deterministic.

    Args:
        model: has the adapter `apiq`, just attached.
        calib: as in `apiq`.
        level: match the output of a block, or of each linear in the order in which they run.
        epochs: passes over the batches for each block, or linear.
        aug_loss: also match the output that the given block has on the stream of the codes.

    Raises:
        UsageError: another adapter, one that is optimised already, no batches, or a model whose
            blocks are not one stack.
    """
    if level not in ("block", "layer"):
        raise UsageError(f"level={level!r}; expected 'block' or 'layer'")
    batches = list(calib)
    if (key := attached(model).cls.key) != "apiq" or not batches:
        raise UsageError(
            f"optimise got the adapter {key!r} and {len(batches)} batches; it needs "
            "attach(model, 'apiq') and at least one batch"
        )
    originals = _originals(model)
    if originals.arena is None:
        raise UsageError("this adapter is optimised already, or has no values; attach a fresh one")
    path, stack = _stack(model)
    with evaluating(model), torch.no_grad():
        calls, given = calls_of(model, stack[0], batches)
        coded = given
        for i, block in enumerate(stack):
            mine: dict[str, Any] = {
                name: layer
                for name, layer in layers(model).items()
                if name.startswith(f"{path}.{i}.")
            }
            fitted = {
                name: Fitted(layer, originals.arena.get(layer.original))
                for name, layer in mine.items()
            }
            handle = Handle()
            try:
                for name, part in fitted.items():
                    handle += swap(model, name, part)
                block_fit = BlockFit(block, calls, fitted, epochs)
                if level == "block":
                    after = block_fit.whole(given, coded, aug_loss)
                else:
                    after = block_fit.linears(given, coded, aug_loss)
            finally:
                handle.remove()
            for name, layer in mine.items():
                layer.take(fitted[name].packed(layer.packed))
                layer.lora_A.copy_(fitted[name].a)
                layer.lora_B.copy_(fitted[name].b)
            del fitted, block_fit
            given = after
            coded = [call(block, h) for call, h in zip(calls, coded, strict=True)]
    originals.drop()
    return model


def save_peft(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write what transformers and peft open: the rounded model, dense, and `adapter` beside it.

    The adapter is a plain LoRA for the model in `directory`, not for the given one. Weights are
    decoded all at once.

    Raises:
        UsageError: another adapter than `apiq`, or not a transformers model.
    """
    record = attached(model)
    if record.cls is not ApiQ or not hasattr(model, "save_pretrained"):
        raise UsageError(
            f"save_peft got {type(model).__name__} with the adapter {record.cls.key!r}; it needs "
            "a transformers model with 'apiq'; adapters.save writes any other"
        )
    adapted: dict[str, Any] = layers(model)
    own = {f"{name}.{key}" for name in adapted for key in ApiQ.trainable}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in own}
    for name, layer in adapted.items():
        state[f"{name}.weight"] = layer.weight.dequantize().contiguous()
    path = Path(directory)
    model.save_pretrained(path, state_dict=state)
    knobs = {"dropout": 0.0, **record.knobs}
    model.__dict__["_holdfast_adapter"] = replace(record, cls=LoRA, knobs=knobs)
    try:
        files.save(model, path / "adapter")
    finally:
        model.__dict__["_holdfast_adapter"] = record


def _originals(model: nn.Module) -> Originals:
    return next(module for module in model.modules() if isinstance(module, Originals))


def _stack(model: nn.Module) -> tuple[str, Any]:
    found = blocks(model)
    if len(found) != 1:
        raise UsageError(
            f"{type(model).__name__} has {len(found)} stacks of blocks "
            f"({', '.join(path for path, _ in found) or 'none'}); ApiQ goes through one"
        )
    return found[0]


def _check(linear: nn.Module, name: str, bits: int, group: int) -> None:
    if isinstance(linear._parameters["weight"], Packed):
        raise UsageError(f"the weight of {name} is packed already; ApiQ starts from dense weights")
    if bits not in BITS:
        raise UsageError(f"bits={bits} is not a size of code; use 2, 3 or 4")
    inputs, _ = features(linear)
    if group < 1 or inputs % group:
        raise UsageError(
            f"group={group} does not divide the {inputs} inputs of {name}; "
            f"use a divisor, for example {math.gcd(inputs, 64)}"
        )


ADAPTER = ApiQ


def _apply(model: nn.Module, *, bits: int, group: int, rank: int) -> nn.Module:
    return attach(model, "apiq", bits=bits, group=group, rank=rank)


def _calibrate(model: nn.Module, batches: Iterable[Batch], **knobs: Any) -> None:
    optimise(model, batches)


def _applies(model: nn.Module, *, bits: int, group: int, rank: int) -> str | None:
    try:
        chosen = find(model)
        for name, linear in chosen.items():
            _check(linear, name, bits, group)
        refuse_tied(model, chosen)
        _stack(model)
    except UsageError as error:
        return str(error)
    return None


METHOD = Method(
    key="apiq",
    slot="adapter",
    writes={
        ("parameters", "form"): "few-bit codes chosen with the adapter",
        ("parameters", "extent"): "all; two thin matrices a linear train",
    },
    apply=_apply,
    calibrate=_calibrate,
    knobs={"bits": (2, 3, 4), "group": (64, 32, 128), "rank": (64, 16, 8)},
    automatic=False,
    quality=lambda bits=2, **_: Quality(
        "lossy", 0.005 if bits == 2 else 0.002, "holdfast check apiq"
    ),
    applies=_applies,
    forbids={key: "ApiQ writes the weights in codes of its own" for key in ("int4", "int8")},
)
