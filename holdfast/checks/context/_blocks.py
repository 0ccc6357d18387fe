"""A small byte language model around any attention module, which several checks train."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.checks import tinylm

VOCABULARY = 128


class Block(nn.Module):
    """Attention and a two-layer MLP, each on normalised inputs and added to the stream."""

    def __init__(self, width: int, mixer: nn.Module, hidden: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mixer = mixer
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class ByteLM(nn.Module):
    """Logits of the next byte.

    Args:
        width: E.
        mixers: one module per layer, (B,n,E) -> (B,n,E).
        parameters: of the whole model; MLPs are as wide as that allows.
        positions: rows of a table of learned positions that is added to the embeddings; 0 is none.
    """

    def __init__(
        self, width: int, mixers: Sequence[nn.Module], parameters: int, *, positions: int = 0
    ):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(positions, width) if positions else None
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        for table in (self.embed, self.positions):
            if table is not None:
                nn.init.normal_(table.weight, std=0.1)
        # Beside its mixer a block has two norms and the bias of its output.
        fixed = count(self) + sum(count(mixer) + 5 * width for mixer in mixers)
        hidden = (parameters - fixed) // (len(mixers) * (2 * width + 1))
        self.blocks = nn.Sequential(*(Block(width, mixer, hidden) for mixer in mixers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.positions is not None:
            x = x + self.positions.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def count(model: nn.Module) -> int:
    """Parameters that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean nats per byte."""
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def trained(
    build: Callable[[], nn.Module], steps: int, lr: float, seed: int, *, batch: int, length: int
) -> nn.Module:
    """A model trained on windows of the corpus by Adam, its rate falling to nothing as a cosine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    batches = tinylm.batches(tinylm.corpus()[0], steps, seed, batch, length)
    for step, ids in enumerate(batches):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 10)
            group["lr"] = lr * warm * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def evaluate(
    model: nn.Module, length: int, windows: int, *, pieces: int = 1
) -> tuple[float, float]:
    """Nats per byte and accuracy over evenly spaced windows of the held-out text.

    With `pieces` each window is read as that many texts, one after the other; which bytes are
    predicted does not depend on it, but for the first of each piece.
    """
    text = tinylm.corpus()[1]
    starts = torch.linspace(0, len(text) - length, windows).long()
    texts = text.unfold(0, length, 1)[starts].reshape(windows * pieces, -1)
    nats = right = 0.0
    for ids in texts.split(max(1, 4096 // texts.shape[1])):
        logits, wanted = model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        nats += F.cross_entropy(logits, wanted, reduction="sum").item()
        right += (logits.argmax(-1) == wanted).sum().item()
    predicted = texts[:, 1:].numel()
    return nats / predicted, right / predicted
