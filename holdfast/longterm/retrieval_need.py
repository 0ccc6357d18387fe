"""What you need is retrieval (147): what each way to more context buys, position by position.

Keeps    nothing; five small language models and the loss of each at every position of a document.
Source   Komatsuzaki, "Current Limitations of Language Models: What You Need is Retrieval", 2020.
Departs  the paper argues, here it is measured: all models begin as one trained model and train on
         alike, so that what differs is the way to more context and not the start. Never a mean over
         all positions, which hides where a gain is.
"""

import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from holdfast.errors import UsageError, unknown
from holdfast.longterm.marge import Block, CausalMARGE, Found

KINDS = ("short", "long", "recurrent", "conditional", "retrieval")
LONGER = 8  # times the short window
EXPERTS = 4


class Experts(nn.Module):
    """A mixture of MLPs, each token to one of them; all begin as copies of the given one."""

    def __init__(self, mlp: nn.Sequential, width: int, count: int = EXPERTS):
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.layers = nn.ModuleList()
        for _ in range(count):
            layers = (
                nn.Linear(layer.in_features, layer.out_features)
                if isinstance(layer, nn.Linear)
                else type(layer)()
                for layer in mlp
            )
            self.layers.append(nn.Sequential(*layers))
            self.layers[-1].load_state_dict(mlp.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        gate, chosen = self.router(flat).softmax(-1).max(-1)
        # Worth 1 at every token, so that the copies begin as what was copied; only the gradient
        # reaches the router.
        gate = gate / gate.detach()
        out = torch.zeros_like(flat)
        for number, layer in enumerate(self.layers):
            rows = (chosen == number).nonzero().squeeze(1)
            out = out.index_add(0, rows, layer(flat[rows]) * gate[rows, None])
        return out.view_as(x)


class Recurrent(nn.Module):
    """A layer that is also told a state of all earlier segments, faded segment by segment."""

    def __init__(self, block: Block, width: int, segment: int):
        super().__init__()
        self.block, self.segment = block, segment
        self.read, self.write = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.fade = nn.Parameter(torch.linspace(-1, 3, width))
        nn.init.zeros_(self.write.weight)

    def forward(self, x: Tensor, found: Found | None = None) -> Tensor:
        n = x.shape[1]
        padded = F.pad(x, (0, 0, 0, -n % self.segment))
        seen = torch.tanh(self.read(padded.unflatten(1, (-1, self.segment)).mean(2)))
        keep = self.fade.sigmoid()
        state, states = torch.zeros_like(seen[:, 0]), []
        for segment in seen.unbind(1):
            states.append(state)  # of the segments before; the first has none
            state = keep * state + (1 - keep) * segment
        told = self.write(torch.stack(states, 1)).repeat_interleave(self.segment, 1)[:, :n]
        return self.block(x + told, found)


def continued(kind: str, trained: CausalMARGE) -> CausalMARGE:
    """A model of one of `KINDS` that begins as a copy of a trained one, whose window is the short.

    Raises:
        UsageError: an unknown kind.
    """
    config = trained.config
    if kind not in KINDS:
        raise unknown("kind of language model", kind, KINDS)
    if kind == "long":
        config = replace(config, window=LONGER * config.window)
    if kind != "retrieval":
        config = replace(config, found=0)
    model = CausalMARGE(config)
    model.load_state_dict(
        {k: v for k, v in trained.state_dict().items() if k in model.state_dict()}, strict=False
    )
    if kind == "conditional":
        for block in model.blocks:
            block.mlp = Experts(block.mlp, config.width)
    if kind == "recurrent":
        model.blocks = nn.ModuleList(
            Recurrent(block, config.width, config.window) for block in model.blocks
        )
    return model


@torch.no_grad()
def position_losses(
    model: Callable[[Tensor], Tensor],
    documents: Tensor,
    *,
    window: int | None = None,
    batch: int = 8,
) -> Tensor:
    """Mean loss in nats at each position, over documents that begin at their rows.

    Args:
        model: ids (B,n) -> logits (B,n,V) of the next token.
        documents: (D,n) int64.
        window: let the model see no more than so many tokens; 3/4 of them at the least, once a
            document is as long.

    Returns:
        (n-1) fp32 on the CPU: element i is the loss at position i + 1, from i + 1 tokens.

    Raises:
        UsageError: a window that is larger than the documents, or documents of one token.
    """
    n = documents.shape[1]
    if n < 2:
        raise UsageError(f"documents of {n} token(s) have no loss; give at least 2")
    _fits(window, n)
    seen = n - 1 if window is None else window
    losses = _losses(model, documents[:, : seen + 1], batch)
    step = max(1, seen // 4)
    while len(losses) < n - 1:
        end = min(len(losses) + step, n - 1)
        new = _losses(model, documents[:, end - seen : end + 1], batch)
        losses = torch.cat([losses, new[len(losses) - end :]])
    return losses


def _losses(model: Callable[[Tensor], Tensor], rows: Tensor, batch: int) -> Tensor:
    total = torch.zeros(rows.shape[1] - 1, dtype=torch.float64)
    for part in rows.split(batch):
        logits = model(part[:, :-1]).float()
        losses = F.cross_entropy(logits.mT, part[:, 1:], reduction="none")
        total += losses.double().sum(0).cpu()
    return (total / len(rows)).float()


def octaves(length: int) -> list[tuple[int, int]]:
    """Positions 1 to length - 1 in ranges [a, b) that double: 1, 2-3, 4-7, ..."""
    starts = [1 << i for i in range((length - 1).bit_length())]
    return list(zip(starts, [*starts[1:], length], strict=True))


def read_documents(
    tokenizer: PreTrainedTokenizerBase, data: Path | None, length: int, count: int
) -> Tensor:
    """The first `length` tokens of up to `count` files, evenly spaced by name: (D,length) int64.

    Args:
        data: a text file or a folder of them; None for Python's standard library.

    Raises:
        UsageError: no file there has as many tokens.
    """
    if data is None:
        found = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    else:
        found = [data] if data.is_file() else sorted(p for p in data.rglob("*") if p.is_file())
    rows = []
    for path in found:
        # A token is a byte at the least and rarely more than 16.
        with path.open(encoding="utf-8", errors="replace") as file:
            ids = tokenizer(file.read(16 * length), add_special_tokens=False)["input_ids"]
        if len(ids) >= length:
            rows.append(ids[:length])
    if not rows:
        raise UsageError(
            f"none of {len(found)} file(s) in {data or 'the standard library'} has {length} "
            "tokens; give --data with longer texts, or a lower --length"
        )
    kept = torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()
    return torch.tensor(rows)[kept]


def _fits(window: int | None, length: int) -> None:
    if window is not None and not 0 < window < length:
        raise UsageError(
            f"window={window} and documents of {length} tokens: positions beyond the window are "
            f"what is measured; give a window from 1 to {length - 1}, or longer documents"
        )


def bands(losses: Tensor, window: int) -> dict[str, float]:
    """Mean loss before the short window is full, up to twice as far, and beyond.

    Args:
        losses: (n-1), as `position_losses` returns them.

    Raises:
        UsageError: the documents end before twice the window, beyond which contexts differ.
    """
    n = len(losses) + 1
    _fits(window, n)
    if n <= 2 * window + 1:
        raise UsageError(
            f"window={window} and documents of {n} tokens: beyond {2 * window} tokens nothing is "
            f"left to compare; give a window of at most {(n - 2) // 2}, or longer documents"
        )
    parts = {"early": losses[: window - 1], "middle": losses[window - 1 : 2 * window]}
    parts["late"] = losses[2 * window :]
    return {name: part.mean().item() for name, part in parts.items()}


def gains(curves: Mapping[str, Tensor], window: int) -> dict[str, dict[str, float]]:
    """For each curve, by how many nats it is better than "short", band by band.

    Raises:
        UsageError: there is no curve called "short".
    """
    if "short" not in curves:
        raise UsageError(f"no curve is called 'short' among {list(curves)}; it is the baseline")
    base = bands(curves["short"], window)
    return {
        name: {band: base[band] - value for band, value in bands(curve, window).items()}
        for name, curve in curves.items()
    }


def near_duplicates(
    documents: Tensor, among: Tensor, *, size: int = 8, share: float = 0.5
) -> Tensor:
    """Which of `among` repeat a document: at least `share` of either's runs of `size` tokens.

    Args:
        documents, among: (D,n) and (E,n) int64.

    Returns:
        (E) bool.
    """
    wanted = [_runs(row, size) for row in documents.tolist()]
    owners: dict[tuple[int, ...], list[int]] = {}
    for number, runs in enumerate(wanted):
        for run in runs:
            owners.setdefault(run, []).append(number)
    repeats = []
    for row in among.tolist():
        runs = _runs(row, size)
        shared: dict[int, int] = {}
        for run in runs:
            for number in owners.get(run, ()):
                shared[number] = shared.get(number, 0) + 1
        repeats.append(
            any(
                count >= share * min(len(runs), len(wanted[number]))
                for number, count in shared.items()
            )
        )
    return torch.tensor(repeats, dtype=torch.bool)


def _runs(row: Sequence[int], size: int) -> set[tuple[int, ...]]:
    return {tuple(row[i : i + size]) for i in range(len(row) - size + 1)}
