"""Locret (163): small heads, trained beside a frozen model, score every token once; the best stay.

Keeps    beta entries per layer and key head, of a capacity of beta + chunk, with one score each.
Form     keys un-rotated, in any form, at 0, 1, 2, ... of those that stay; scores fp32.
Bytes    2*L*B*H*m*d*b + 4*L*B*H*m for m = beta + chunk entries; beside that, in one layer at a
         time, 48*B*H*m while entries are chosen. The heads, which all caches of a model share, have
         L * width * ((Hq+2H)*d + H) parameters.
Source   Huang, Yuan, Han, Xiao, Liu, "Locret: Enhancing Eviction in Long-Context LLM Inference with
         Trained Retaining Heads", 2024. The rate after the warm-up is ours: it falls linearly to 0.
Departs  scores are computed from what the cache stores, so an int8 cache scores int8 keys. Queries
         of the prompt's last token make labels too: it predicts the first token of the answer.
         What comes after the prompt is not set apart: entries are dropped whenever the next tokens
         do not fit, and `cache.turn()` before a question drops them as after the final chunk.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from holdfast.context import interface
from holdfast.context.cache.deferred import NAME
from holdfast.context.cache.policy import SELECT_BYTES, CachePolicy, CacheShape, top_slots
from holdfast.errors import UsageError
from holdfast.files import sync_directory, write_tensors

if TYPE_CHECKING:
    from holdfast.context.cache.bounded import BoundedCache
    from holdfast.context.cache.layer import BoundedLayer, New

# Prompt and answer, int64 (n,) each.
Example = tuple[Tensor, Tensor]
# What stays and what of it is the most recent, in the paper: 2,500 of 6,000.
SHARE = 5 / 12


@dataclass(frozen=True)
class Sizes:
    """What heads must have in common with the model that they score tokens of."""

    layers: int
    query_heads: int
    heads: int
    key_width: int
    value_width: int
    activation: str

    @classmethod
    def of(cls, shape: CacheShape, activation: str) -> "Sizes":
        names = (field.name for field in fields(cls) if field.name != "activation")
        own: dict[str, Any] = {name: getattr(shape, name) for name in names}
        return cls(**own, activation=activation)


class RetainingHeads(nn.Module):
    """Per layer W2 act(W1 [q; k; v]), of one token's un-rotated q, k, v: a score per key head.

    `fit` trains them, `load` reads them back.

    Args:
        width: rows of W1.
    """

    def __init__(self, sizes: Sizes, *, width: int = 1024):
        super().__init__()
        self.sizes, self.width = sizes, width
        inputs = (sizes.query_heads + sizes.heads) * sizes.key_width
        inputs += sizes.heads * sizes.value_width
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(inputs, width, bias=False),
                ACT2FN[sizes.activation],
                nn.Linear(width, sizes.heads, bias=False),
            )
            for _ in range(sizes.layers)
        )

    @classmethod
    def untrained(
        cls, model: PreTrainedModel, *, width: int = 1024, seed: int = 0
    ) -> "RetainingHeads":
        """Random heads of the right shape, on the model's device."""
        from holdfast.context.cache.bounded import BoundedCache

        with interface.use(model, NAME):
            shape = BoundedCache.for_model(model, CachePolicy(), tokens=2, batch=1).shape
        activation = model.config.get_text_config(decoder=True).hidden_act
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(Sizes.of(shape, activation), width=width).to(model.device)

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel,
        dataset: Sequence[Example],
        *,
        width: int = 1024,
        steps: int = 3000,
        lr: float = 5e-4,
        smooth: float = 0.0025,
        seed: int = 0,
        on_step: Callable[[int, float], None] | None = None,
    ) -> "RetainingHeads":
        """Train heads to tell how much the answer will want each token of its prompt.

        The model stays as it is. A step reads one example, in a random order that begins anew when
        all were read, and holds one layer's graph at a time.

        Args:
            dataset: prompts of at least 2 tokens, and answers.
            smooth: weight of the squared change of scores from one token to the next.
            on_step: called as on_step(step, loss).
        """
        if steps < 1 or not dataset:
            raise UsageError(
                f"{steps} steps on {len(dataset)} examples; at least one of both is needed"
            )
        heads = cls.untrained(model, width=width, seed=seed)
        optimizer = torch.optim.AdamW(heads.parameters(), lr=lr, betas=(0.9, 0.95))
        warm = math.ceil(2 * steps / 3)
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm + 1))
        )
        losses: list[Tensor] = []

        def lesson(number: int, q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> None:
            with torch.enable_grad():
                scores = heads.score(number, q, k, v)
                loss = F.smooth_l1_loss(scores, labels) / len(heads.layers)
                loss = loss + smooth * F.mse_loss(scores[..., 1:], scores[..., :-1])
                loss.backward()
            losses.append(loss.detach())

        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        visit = _visitor(model, max(len(a) + len(b) for a, b in dataset))
        for step in range(steps):
            order = order or torch.randperm(len(dataset), generator=generator).tolist()
            losses.clear()
            visit(dataset[order.pop()], lesson)
            nn.utils.clip_grad_value_(heads.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rate.step()
            if on_step is not None:
                on_step(step, float(sum(losses)))
        return heads.eval().requires_grad_(False)

    def score(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B,Hq,n,d), k (B,H,n,d), v (B,H,n,dv), un-rotated -> (B,H,n) fp32."""
        dtype = next(self.parameters()).dtype
        token = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], 2)
        return self.layers[layer](token.to(dtype)).transpose(1, 2).float()

    def agreement(
        self, model: PreTrainedModel, dataset: Sequence[Example], *, part: float = 0.1
    ) -> float:
        """Of the `part` of each prompt that its answer wants most, how much has the best scores.

        The mean over layers, heads and examples; random scores reach `part`.
        """
        found = []

        def compare(number: int, q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> None:
            keep = max(1, round(part * labels.shape[2]))
            chosen = torch.zeros_like(labels, dtype=torch.bool)
            chosen.scatter_(2, top_slots(self.score(number, q, k, v), keep), True)
            found.append(chosen.gather(2, top_slots(labels, keep)).float().mean())

        visit = _visitor(model, max(len(a) + len(b) for a, b in dataset))
        for example in dataset:
            visit(example, compare)
        return float(torch.stack(found).mean())

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `load` reads; replaced atomically."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        meta = json.dumps(asdict(self.sizes) | {"width": self.width})
        tensors = {name: t.contiguous() for name, t in self.state_dict().items()}
        write_tensors(partial, tensors, {"retaining_heads": meta})
        partial.replace(path)
        sync_directory(path.parent)

    @classmethod
    def load(cls, path: str | Path) -> "RetainingHeads":
        """Read a file that `save` wrote, on the CPU.

        Raises:
            UsageError: there is no such file, or it holds something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {})["retaining_heads"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError) as error:
            raise UsageError(
                f"{path} holds no retaining heads ({error}); give a file that "
                "RetainingHeads.save wrote"
            ) from error
        width = meta.pop("width")
        heads = cls(Sizes(**meta), width=width).to(next(iter(tensors.values())).dtype)
        heads.load_state_dict(tensors)
        return heads.eval().requires_grad_(False)

    def digest(self) -> str:
        """What tells heads apart."""
        weights = hashlib.sha256()
        for tensor in self.state_dict().values():
            weights.update(tensor.detach().float().cpu().numpy().tobytes())
        return weights.hexdigest()[:16]


class Locret(CachePolicy):
    """Keep the entries that trained heads score highest, beside the most recent.

    Args:
        heads: of the same model, or the file that they were saved to.
        stabilizers: last entries that always stay while a text is read; by default 5 of 12 of
            those that stay.
    """

    fields = {"score": True}
    per_head = True

    def __init__(self, *, heads: RetainingHeads | str | Path, stabilizers: int | None = None):
        if stabilizers is not None and stabilizers < 0:
            raise UsageError(f"stabilizers={stabilizers} is negative; use 0 for none")
        self.heads = heads if isinstance(heads, RetainingHeads) else RetainingHeads.load(heads)
        self.stabilizers = stabilizers

    def identity(self) -> str:
        # Scores of other heads cannot be compared with those in a saved cache.
        return f"{super().identity()} with heads {self.heads.digest()}"

    def bind(self, cache: "BoundedCache") -> None:
        mine, found = self.heads.sizes, Sizes.of(cache.shape, self.heads.sizes.activation)
        if mine != found:
            raise UsageError(
                f"these heads were made for {mine}, the model has {found}; "
                "train heads of its own with RetainingHeads.fit"
            )
        self.heads.to(cache._device)

    def check(self, capacity: int, chunk: int) -> None:
        beta = self.stay(capacity, chunk)
        if not 0 <= (self.stabilizers or 0) < beta:
            raise UsageError(
                f"{self.stabilizers} stabilizers leave none of the {beta} entries that stay of "
                f"{capacity}, beside chunks of {chunk}, to the heads; use fewer, smaller chunks, "
                f"or {self.least(chunk)} entries"
            )

    def least(self, chunk: int) -> int:
        beta = (self.stabilizers or 0) + 1
        capacity = beta + chunk
        while self.stay(capacity, chunk) < beta:
            capacity += 1
        return capacity

    def attend(self, layer: "BoundedLayer", q: Tensor, new: "New", scaling: float) -> Tensor:
        k, v = layer.just_stored(new)
        number = next(i for i, one in enumerate(layer.cache.bounded) if one is layer)
        layer.put("score", new, self.heads.score(number, q, k, v))
        return super().attend(layer, q, new, scaling)

    def score(self, layer: "BoundedLayer") -> Tensor:
        scores = layer.field("score").to(layer.device, copy=True)
        recent = self.stabilizers
        if recent is None:
            recent = int(SHARE * self.stay(layer.cache.capacity, layer.cache.chunk))
        slots = torch.arange(layer.length, device=layer.device)
        counts = torch.tensor(layer.counts, device=layer.device).view(-1, 1, 1)
        return scores.masked_fill_(slots >= counts - recent, torch.inf)

    def turn(self, cache: "BoundedCache") -> None:
        # A text has ended: its last entries must earn their places too.
        keep = self.stay(cache.capacity, cache.chunk)
        for layer in cache.bounded:
            if layer.length > keep:
                scores = layer.field("score").to(layer.device)
                counts = [min(count, keep) for count in layer.counts]
                layer.keep(top_slots(scores, keep, layer.filled()), counts)

    def scratch(self, shape: CacheShape, capacity: int) -> int:
        return shape.batch * shape.heads * capacity * (SELECT_BYTES + 4)


def labels_of(q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """The largest scaled score, before any softmax, that queries give to each key.

    q (B,Hq,a,d), k (B,H,p,d), rotated -> (B,H,p) fp32: over all queries of a key head's group.
    """
    q = q.float().reshape(k.shape[0], k.shape[1], -1, k.shape[3])
    return (q @ k.float().mT).amax(2) * scaling


# Called with a layer's number, q, k, v of a prompt, un-rotated, and its labels (B,H,p).
Visit = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]


class _Watch(CachePolicy):
    """Keep all of one example and show what heads see of its prompt, as caches see it later."""

    drops = False
    prompt = 0
    visit: Visit

    def least(self, chunk: int) -> int:
        return chunk

    def attend(self, layer: "BoundedLayer", q: Tensor, new: "New", scaling: float) -> Tensor:
        number = next(i for i, one in enumerate(layer.cache.bounded) if one is layer)
        at = slice(0, self.prompt)
        looking = layer.at_slots(q, new)[:, :, self.prompt - 1 :]
        labels = labels_of(looking, layer.rotated_keys(at), scaling)
        k, v = layer.stored_keys(at), layer.stored_values(at)
        self.visit(number, q[:, :, at], k, v, labels)
        return super().attend(layer, q, new, scaling)


def _visitor(model: PreTrainedModel, longest: int) -> Callable[[Example, Visit], None]:
    """What reads examples of up to so many tokens and calls a function in every layer."""
    from holdfast.context.cache.bounded import BoundedCache
    from holdfast.context.stream import prefill_chunks

    policy = _Watch()
    with interface.use(model, NAME):
        cache = BoundedCache.for_model(model, policy, tokens=longest, batch=1, chunk=longest)

    def read(example: Example, visit: Visit) -> None:
        prompt, answer = example
        if len(prompt) < 2 or not len(answer):
            raise UsageError(
                f"a prompt of {len(prompt)} tokens and an answer of {len(answer)} teach nothing; "
                "give at least 2 and 1"
            )
        policy.prompt, policy.visit = len(prompt), visit
        training = model.training
        cache.reset()
        try:
            with interface.use(model, NAME):
                ids = torch.cat([prompt, answer])[None].to(model.device)
                prefill_chunks(model.eval(), ids, cache)
        finally:
            model.train(training)

    return read
