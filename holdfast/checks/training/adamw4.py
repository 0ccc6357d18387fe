from unittest import mock

import torch

from holdfast import native
from holdfast.checks import Result, check, tinylm
from holdfast.forms import maps
from holdfast.training.optim.adamw4 import AdamW4, state_bytes

# The card's bound on what 4-bit states may cost, in nats per byte; a broken map costs far more.
COST, BROKEN = 0.06, 0.5


def _loss(seed: int, make) -> float:
    model = tinylm.model(seed)
    tinylm.train(model, make(model.parameters(), lr=tinylm.LR), seed=seed)
    return tinylm.evaluate(model)


def _ours(second: str):
    # Without the size threshold, so that every state is in 4 bits.
    return lambda params, lr: AdamW4(params, lr=lr, second=second, min_numel=1)


def _with_zero(seed: int) -> float:
    """The same optimizer, but its map for v has 16 even steps from 0."""
    levels = maps.levels
    even = tuple(i / 15 for i in range(16))
    wrong = mock.patch.object(maps, "levels", lambda n: even if n == "linear4" else levels(n))
    # The native kernel has the map's formula built in; torch reads the map.
    with native.force("off"), wrong:
        return _loss(seed, _ours("rank1"))


@check(
    "adamw4",
    claim="4-bit states train like fp32 states; a map for v that holds zero does not",
)
def run(seed: int, full: bool = False) -> Result:
    seeds = range(seed, seed + (3 if full else 1))
    measured: dict[str, float] = {}
    baseline: dict[str, float] = {}
    passed = True
    for s in seeds:
        fp32 = _loss(s, torch.optim.AdamW)
        rank1, block = (_loss(s, _ours(second)) for second in ("rank1", "block"))
        zero = _with_zero(s)
        measured |= {f"loss_rank1_seed{s}": rank1, f"loss_block_seed{s}": block}
        baseline |= {f"loss_fp32_seed{s}": fp32, f"loss_map_with_zero_seed{s}": zero}
        # NaN compares false with everything, hence the negation for the control.
        passed &= max(rank1, block) <= fp32 + COST and not zero <= fp32 + BROKEN
    parameters = list(tinylm.model(seed).parameters())
    kept = sum(state_bytes(p.shape, p.dtype) for p in parameters)
    measured["state_bytes_by_default"] = kept
    baseline["state_bytes_fp32"] = sum(8 * p.numel() + 4 for p in parameters)
    return Result(
        measured,
        baseline,
        f"rank-1 and block losses <= fp32 + {COST}; map with zero > fp32 + {BROKEN} or NaN",
        bool(passed),
    )
