"""One marked token in filler: can a token in the middle say which of four it is?

It lies outside of what the windows of all layers reach together, so that only global and random
blocks can tell. All tokens are asked while training, the one in the middle in the test.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from holdfast.checks import Result, check
from holdfast.context.attention.bigbird import bigbird
from holdfast.context.patterns import BlockPattern
from holdfast.meter import Meter

BLOCK, LAYERS, CLASSES = 16, 2, 4
FILLER, QUERY = CLASSES, CLASSES + 1
LENGTH, BATCH, STEPS, LR = 256, 8, 120, 5e-3
TESTS = 256
# Hand-over by the windows of two layers ends three blocks away from the query's block.
FAR = 4 * BLOCK


class Finder(nn.Module):
    """An encoder whose states are read as one of the classes: ids (B,n) -> (B,n,classes)."""

    def __init__(self, pattern: BlockPattern):
        super().__init__()
        config = BertConfig(
            vocab_size=QUERY + 1, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=8192, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.body = BertModel(config, add_pooling_layer=False)
        # Where a token stands is no matter here, and would be noise around one token in 256.
        embeddings = self.body.embeddings
        for table in (embeddings.position_embeddings, embeddings.token_type_embeddings):
            nn.init.zeros_(table.weight).requires_grad_(False)
        self.head = nn.Linear(32, CLASSES)
        self.use = bigbird(self.body, pattern)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(ids).last_hidden_state)


def batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids (B,n) with one token of a class far from the query, and the classes (B,)."""
    ids = torch.full((count, LENGTH), FILLER)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    middle = LENGTH // 2
    distance = torch.randint(FAR, middle, (count,), generator=generator)
    side = torch.randint(2, (count,), generator=generator) * 2 - 1
    ids[torch.arange(count), middle + side * distance] = labels
    ids[:, middle] = QUERY
    return ids, labels


def accuracy(pattern: BlockPattern, seed: int) -> float:
    torch.manual_seed(seed)
    model = Finder(pattern)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LR)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        ids, labels = batch(BATCH, generator)
        every = labels[:, None].expand(-1, LENGTH)
        F.cross_entropy(model(ids).mT, every).backward()
        optimizer.step()
        optimizer.zero_grad()
    ids, labels = batch(TESTS, generator)
    with torch.no_grad():
        found = torch.cat([model(part)[:, LENGTH // 2].argmax(-1) for part in ids.split(32)])
    return (found == labels).float().mean().item()


def peak(model: Finder, length: int) -> int:
    """Bytes that a forward and backward pass holds beside the model and its input."""
    ids = torch.zeros(1, length, dtype=torch.long)

    def step() -> None:
        model(ids).sum().backward()
        model.zero_grad()

    step()
    with Meter(model, inputs=ids) as meter:
        step()
    return meter.peak - meter.base


@check(
    "bigbird",
    claim="finds a token far outside the window, where windows alone are at chance, and its peak "
    "grows with the length, where that of dense attention grows with its square",
)
def run(seed: int) -> Result:
    ours = accuracy(BlockPattern(BLOCK), seed)
    near = accuracy(BlockPattern(BLOCK, global_=0, random=0), seed)
    model = Finder(BlockPattern())
    ratio = peak(model, 8192) / peak(model, 1024)
    model.use.remove()
    model.body.set_attn_implementation("eager")
    dense = peak(model, 4096) / peak(model, 512)
    chance = 1 / CLASSES
    return Result(
        measured={"accuracy": ours, "peak_ratio_8x": ratio},
        baseline={"window_only_accuracy": near, "chance": chance, "eager_peak_ratio_8x": dense},
        threshold="accuracy >= 0.95, window only <= chance + 0.1; 7 <= peak ratio <= 9 for 8 x the "
        "length, dense >= 32",
        passed=ours >= 0.95 and near <= chance + 0.1 and 7 <= ratio <= 9 and dense >= 32,
    )
