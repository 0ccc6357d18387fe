"""A low-rank adapter for each user, trained on their dialogues beside their memory (MaLP, 150).

Keeps    a memory's notes as text; per user A (r, in) and B (out, r) of each target matrix.
Form     LoRA as `training.adapters` attaches and stores it, and whose it is beside its files.
Bytes    the sum over targets of r * (in + out) * bytes of an element; with the context's UTF-8
         bytes in one budget.
Source   K. Zhang et al., "LLM-based Medical Assistant Personalization with Short- and Long-Term
         Memory Coordination", 2024; E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language
         Models", 2022.
Departs  one adapter per space, refused for any other; a published one is for all users.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from holdfast import files
from holdfast.errors import UsageError
from holdfast.longterm.budget import Context, nbytes
from holdfast.longterm.memory import Memory
from holdfast.longterm.records import Space
from holdfast.training import adapters

OWNER = "owner.json"
IGNORED = -100  # a label that no loss counts


class MaLPTrainer:
    """One user's adapter on a model, and contexts from the same user's memory.

    Args:
        model: a causal model of Hugging Face's kind; frozen but for the adapter, until `close`.
        memory: holds the user's notes.
        space: whose adapter it is.
        encode: text to token ids.
        budget: bytes of the adapter and of a context together.
        rank, targets: of the adapter; see `holdfast.training.adapters.attach`.
        seed: of A and of the order of examples.

    Raises:
        UsageError: the adapter alone does not fit the budget.
    """

    def __init__(
        self,
        model: nn.Module,
        memory: Memory,
        space: Space | str,
        encode: Callable[[str], Sequence[int]],
        *,
        budget: int,
        rank: int = 8,
        targets: Any = "all-linear",
        seed: int = 0,
    ):
        self.model, self.memory, self.encode = model, memory, encode
        self.space, self.budget, self.seed = Space.of(space), budget, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapters.attach(model, "lora", targets, rank=rank)
        if self.nbytes() > budget:
            needs = self.nbytes()
            self.close()
            raise UsageError(
                f"the adapter takes {needs} bytes of a budget of {budget}; lower rank={rank}, "
                "name fewer targets or raise the budget"
            )

    def nbytes(self) -> int:
        """Bytes of the adapter."""
        state = adapters.adapter_state_dict(self.model)
        return sum(one.numel() * one.element_size() for one in state.values())

    def context(self, query: str) -> Context:
        """The user's memories for a query, in what the adapter leaves of the budget, in bytes."""
        left = self.budget - self.nbytes()
        return self.memory.context(query, left, count=nbytes, space=self.space)

    def fit(
        self, dialogues: Sequence[tuple[str, str]], *, steps: int = 100, lr: float = 1e-2
    ) -> float:
        """Train on (what was asked, what the user wants as the answer); the last loss.

        Only the answers' tokens count.

        Raises:
            UsageError: no dialogue, or one whose answer has no token.
        """
        if not dialogues:
            raise UsageError("there is no dialogue to learn from; give pairs of texts")
        pairs = [(list(self.encode(asked)), list(self.encode(told))) for asked, told in dialogues]
        for (asked, told), (_, text) in zip(pairs, dialogues, strict=True):
            if not (asked and told):
                raise UsageError(f"the dialogue that ends in {text!r} has a side without tokens")
        device = next(self.model.parameters()).device
        length = max(len(asked) + len(told) for asked, told in pairs)
        ids = torch.zeros(len(pairs), length, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for row, (asked, told) in enumerate(pairs):
            ids[row, : len(asked) + len(told)] = torch.tensor([*asked, *told])
            labels[row, len(asked) : len(asked) + len(told)] = torch.tensor(told)
        learnt = [one for one in self.model.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(learnt, lr=lr, weight_decay=0.0)
        draw = torch.Generator().manual_seed(self.seed)
        loss = torch.zeros(())
        for _ in range(steps):
            some = torch.randint(len(pairs), (min(32, len(pairs)),), generator=draw)
            # Causal: what fills up a row on its right is never seen by an answer.
            logits = self.model(input_ids=ids[some].to(device)).logits[:, :-1]
            wanted = labels[some][:, 1:].to(device)
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    def save(self, directory: str | os.PathLike) -> None:
        """Write the adapter in the format of peft, and whose it is."""
        adapters.save(self.model, directory)
        files.write_text(Path(directory) / OWNER, json.dumps({"space": str(self.space)}))

    def load(self, directory: str | os.PathLike) -> None:
        """Take over an adapter that `save` wrote for the same user.

        Raises:
            UsageError: it is another user's, or nobody's.
        """
        path = Path(directory) / OWNER
        try:
            owner = json.loads(path.read_text())["space"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            raise UsageError(f"{path} does not say whose adapter it is; save() writes it") from None
        if owner != str(self.space):
            raise UsageError(
                f"the adapter in {directory} is of space {owner!r}, this one is for "
                f"{str(self.space)!r}; an adapter holds what its user said: train one for each"
            )
        adapters.load(self.model, directory)

    def close(self) -> None:
        """Take the adapter off; the model is what it was."""
        adapters.detach(self.model)
