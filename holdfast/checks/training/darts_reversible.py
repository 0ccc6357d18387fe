"""A search on copying at a distance, which only attention can do, and the network that it finds."""

import torch
from torch import Tensor

from holdfast.checks import Result, check
from holdfast.training.loss import IGNORE
from holdfast.training.models.darts_reversible import Architecture, DartsTransformer, darts
from holdfast.training.models.operations import OPERATIONS
from holdfast.training.saved import saved_bytes

SEEDS, STEPS, BATCH = 5, 150, 16
# Two convolutions of 15 reach 14 positions; the nearest answer is 17 behind.
LENGTH, SOURCES, QUERIES, TOKENS, WIDTH = 32, 8, 8, 4, 16
LR, ALPHA_LR, WARMUP = 1e-2, 2e-2, 20
QUERY, FIRST = 1, 2


def copying(generator: torch.Generator, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Random tokens, one of the first `SOURCES` marked; the last `QUERIES` positions ask for it."""
    source = torch.randint(FIRST, FIRST + TOKENS, (size, LENGTH), generator=generator)
    rows, marked = torch.arange(size), torch.randint(0, SOURCES, (size,), generator=generator)
    answers = source[rows, marked]
    source[rows, marked] = answers + TOKENS
    source[:, -QUERIES:] = QUERY
    labels = torch.full_like(source, IGNORE)
    labels[:, -QUERIES:] = answers[:, None]
    return source, labels


def network(seed: int, layers: int = 1, **options) -> DartsTransformer:
    torch.manual_seed(seed)
    return DartsTransformer(
        FIRST + 2 * TOKENS,
        WIDTH,
        encoder_layers=layers,
        decoder_layers=0,
        searched=1,
        heads=4,
        dropout=0.0,
        **options,
    )


def search(seed: int, operations: tuple[str, ...] = OPERATIONS) -> Architecture:
    generator = torch.Generator().manual_seed(seed)
    train, val = ([copying(generator) for _ in range(STEPS)] for _ in range(2))
    model = network(seed, operations=operations)
    return darts(model, train, val, lr=LR, warmup=WARMUP, alpha_lr=ALPHA_LR)


def accuracy(seed: int, found: Architecture) -> float:
    """Answers copied by a found architecture, trained from the start with backpropagation."""
    model = network(seed + 1, architecture=found)
    optimizer = torch.optim.Adam(model.parameters(), LR, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / WARMUP))
    generator = torch.Generator().manual_seed(seed + 1000)
    for _ in range(2 * STEPS):
        optimizer.zero_grad()
        model(*copying(generator)).backward()
        optimizer.step()
        schedule.step()
    source, labels = copying(generator, 512)
    with torch.no_grad():
        right = model.logits(source).argmax(-1) == labels
    return right[labels != IGNORE].float().mean().item()


def kept(layers: int, reversible: bool) -> int:
    """Bytes that the encoder of a search keeps for backward."""
    stack = network(0, layers).encoder
    stack.reversible = reversible
    x, mask = torch.ones(BATCH, LENGTH, WIDTH), torch.ones(BATCH, LENGTH, dtype=torch.bool)
    return saved_bytes(lambda: stack(x, mask, None), stack, [x, mask])


@check(
    "darts_reversible",
    claim="finds attention where only attention can solve the task, in bytes that do not grow "
    "with depth",
)
def run(seed: int) -> Result:
    seeds = range(seed, seed + SEEDS)
    found = [search(s) for s in seeds]
    picked = sum("self_attention" in layer for a in found for layer in a.encoder)
    solved = [accuracy(s, a) for s, a in zip(seeds, found, strict=True)]
    others = tuple(name for name in OPERATIONS if name != "self_attention")
    without = search(seed, others)
    chance = accuracy(seed, without)
    bytes_at = {(n, way): kept(n, way) for n in (2, 8) for way in (True, False)}
    good = sum(value >= 0.9 for value in solved)
    return Result(
        measured={
            "seeds_with_attention": picked,
            "seeds_solved_after_retraining": good,
            "accuracy": solved,
            "saved_bytes_2_layers": bytes_at[2, True],
            "saved_bytes_8_layers": bytes_at[8, True],
        },
        baseline={
            "name": "the same search without attention; ordinary backpropagation of the search",
            "found": " ".join(without.encoder[0]),
            "accuracy": chance,
            "saved_bytes_2_layers": bytes_at[2, False],
            "saved_bytes_8_layers": bytes_at[8, False],
        },
        threshold=f"argmax holds attention, and the retrained network copies >= 90 %, in >= 4 of "
        f"{SEEDS} seeds; baseline copies <= {1.5 / TOKENS:.0%} (chance {1 / TOKENS:.0%}); saved "
        "bytes equal at 2 and 8 layers, baseline's >= 3.9 x",
        passed=picked >= 4
        and good >= 4
        and chance <= 1.5 / TOKENS
        and bytes_at[2, True] == bytes_at[8, True]
        and bytes_at[8, False] >= 3.9 * bytes_at[2, False],
    )
