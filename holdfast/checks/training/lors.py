"""LoRS: a pruned model wins back its loss with its zeros in place, without a mask kept anywhere."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from holdfast.attach import find
from holdfast.checks import Result, check, tinylm
from holdfast.training import adapters
from holdfast.training.adapters.base import layers
from holdfast.training.adapters.lors import gradient_init
from holdfast.training.saved import saved_bytes

STEPS, RANK, CALIBRATION = 100, 8, 4
RATES = (3e-3, 1e-2)


def pruned(seed: int) -> nn.Module:
    """tinylm without the smaller half of each row's weights."""
    model = copy.deepcopy(tinylm.trained(seed))
    with torch.no_grad():
        for linear in find(model).values():
            weight = linear.get_parameter("weight")
            smaller = weight.abs().argsort(1)[:, : weight.shape[1] // 2]
            weight.scatter_(1, smaller, 0)
    return model


def trained(seed: int, init: str, exact_grad: bool) -> tuple[float, nn.Module]:
    """Validation loss after training at the better of `RATES`, and the model."""

    def at(rate: float) -> tuple[float, nn.Module]:
        torch.manual_seed(seed)
        model = adapters.attach(pruned(seed), "lors", rank=RANK, exact_grad=exact_grad)
        if init == "gradient":
            batches = tinylm.batches(tinylm.corpus()[0], CALIBRATION, seed + 100)
            gradient_init(model, [{"input_ids": ids, "labels": ids} for ids in batches])
        own = [p for p in model.parameters() if p.requires_grad]
        tinylm.train(model, torch.optim.Adam(own, lr=rate), steps=STEPS, seed=seed + 1)
        return tinylm.evaluate(model), model

    return min((at(rate) for rate in RATES), key=lambda found: found[0])


class Masked(nn.Module):
    """The masked product left to autograd, as sparse LoRA did it before."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        weight, a, b = self.layer.weight, self.layer.lora_A, self.layer.lora_B
        return F.linear(x, weight + self.layer.scale * (b @ a) * (weight != 0), self.layer.bias)


def kept(model: nn.Module) -> int:
    ids = next(tinylm.batches(tinylm.corpus()[0], 1, 0, batch=1, length=32))
    return saved_bytes(lambda: model(input_ids=ids, labels=ids).loss, model, [ids])


@check("lors", claim="from a gradient start trains no worse than from kaiming, and keeps no mask")
def run(seed: int) -> Result:
    start = tinylm.evaluate(pruned(seed))
    ours, model = trained(seed, "gradient", exact_grad=False)
    exact, _ = trained(seed, "gradient", exact_grad=True)
    kaiming, _ = trained(seed, "kaiming", exact_grad=False)
    masks = sum(layer.weight.numel() for layer in layers(model).values())
    bytes_ours = kept(model)
    plain = copy.deepcopy(model)
    for name, layer in layers(plain).items():
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, Masked(layer))
    bytes_plain = kept(plain)
    zeros = {n: layer.weight == 0 for n, layer in layers(model).items()}
    adapters.merge(model)
    same = all(torch.equal(model.get_submodule(n).weight == 0, z) for n, z in zeros.items())
    return Result(
        measured={
            "loss": ours,
            "kept_bytes": bytes_ours,
            "zeros_same_after_merge": same,
            "loss_merged": tinylm.evaluate(model),
        },
        baseline={
            "pruned": start,
            "kaiming": kaiming,
            "exact_grad": exact,
            "kept_bytes_autograd": bytes_plain,
            "mask_elements": masks,
        },
        threshold="loss <= kaiming, within 0.02 of exact_grad, 0.1 below pruned; same zeros; "
        "keeps a byte a mask element less than autograd, or better",
        passed=ours <= kaiming
        and ours <= exact + 0.02
        and ours <= start - 0.1
        and same
        and bytes_plain - bytes_ours >= masks,
    )
