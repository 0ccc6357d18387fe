"""A step of tinylm on 1, 2 and 4 ranks: gradients, bytes held and bytes sent by ring attention."""

import torch
import torch.distributed as dist
from torch import Tensor

from holdfast.checks import Result, check, tinylm
from holdfast.meter import Meter
from holdfast.parallel.launch import launch
from holdfast.parallel.ring_attention import ring_nbytes
from holdfast.parallel.sequence import sequence_parallel

LENGTH, BATCH, RANKS, LIMIT = 512, 2, (2, 4), 300.0
FORMS = (("rsa", "contiguous"), ("rsa", "zigzag"), ("online", "contiguous"), ("online", "zigzag"))


def _batch(seed: int, length: int) -> dict[str, Tensor]:
    """Windows of the corpus; one row is padded on the left, one on the right."""
    ids = next(tinylm.batches(tinylm.corpus()[0], 1, seed, BATCH, length))
    mask = torch.ones_like(ids)
    mask[0, : length // 5] = 0
    mask[1, -length // 8 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _step(model: torch.nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The gradients of one step; the model keeps none."""
    model(**inputs).loss.backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    return grads


def _peak(model: torch.nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes that a step holds beside the model and its inputs."""
    _step(model, inputs)
    with Meter(model, inputs=inputs) as meter:
        _step(model, inputs)
    return meter.peak - meter.base


def _difference(found: list[Tensor], want: list[Tensor]) -> float:
    """Largest relative difference of a parameter's gradient."""
    pairs = zip(found, want, strict=True)
    return max(((x - y).norm() / y.norm()).item() for x, y in pairs)


def _rank(seed: int, attention: str, layout: str) -> tuple[float, int, int]:
    model, inputs = tinylm.model(seed, num_key_value_heads=2), _batch(seed, LENGTH)
    want = _step(model, inputs)
    parallel = sequence_parallel(model, attention=attention, layout=layout)
    difference = _difference(_step(model, inputs), want)
    config = model.config
    formula = config.num_hidden_layers * sum(
        ring_nbytes(
            dist.get_world_size(), batch=BATCH, length=LENGTH, size=config.head_dim,
            key_heads=config.num_key_value_heads,
        )
    )  # fmt: skip
    return difference, parallel.traffic.sent - formula, _peak(model, inputs)


def _forms(seed: int) -> dict[tuple[str, str], tuple[float, int, int]]:
    return {form: _rank(seed, *form) for form in FORMS}


def _doubled(seed: int) -> float:
    model = tinylm.model(seed, num_key_value_heads=2)
    sequence_parallel(model)
    once, twice = (_peak(model, _batch(seed, n)) for n in (LENGTH, 2 * LENGTH))
    return twice / once


@check(
    "sequence",
    claim="a sequence over N ranks: same gradients, 1/N of the activations, no L^2 term online",
)
def run(seed: int) -> Result:
    plain = tinylm.model(seed, num_key_value_heads=2)
    base = _peak(plain, _batch(seed, LENGTH))
    measured: dict[str, float] = {}
    passed = True
    for ranks in RANKS:
        found = launch(_forms, ranks, seed, limit=LIMIT)
        for attention in ("rsa", "online"):
            mine = [of[form] for of in found for form in FORMS if form[0] == attention]
            difference = max(x for x, _, _ in mine)
            peak = max(x for _, _, x in mine)
            measured |= {
                f"{attention} gradient difference, {ranks} ranks": difference,
                f"{attention} peak bytes, {ranks} ranks": peak,
            }
            passed &= difference < 1e-5 and not any(x for _, x, _ in mine)
        passed &= measured[f"online peak bytes, {ranks} ranks"] < 1.02 * base / ranks
    measured["rsa bytes at twice the ranks"] = (
        measured["rsa peak bytes, 4 ranks"] / measured["rsa peak bytes, 2 ranks"]
    )
    measured["online bytes at twice the length"] = max(launch(_doubled, 2, seed, limit=LIMIT))
    passed &= measured["rsa bytes at twice the ranks"] < 0.52
    passed &= 1.98 < measured["online bytes at twice the length"] < 2.02
    return Result(
        measured,
        {"peak bytes, one process with SDPA": base},
        "gradients within 1e-5; sent bytes = formula; online peak <= 1.02/N of the baseline; "
        "rsa halves with N (<= 0.52); online doubles with L (2 +- 0.04)",
        bool(passed),
    )
