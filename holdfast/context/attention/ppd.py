"""PPD, parallel prompt decoding (030): several tokens per forward pass from a few trained vectors.

Keeps    P*E prompt embeddings beside a frozen model, and how often their guesses are right.
Form     one vector of the hidden size each, in the model's dtype; accuracies fp32.
Bytes    P*E*D*b embeddings and 4*P*RANKS accuracies; a step of T inputs adds 2*L*H*T*d*b of keys
         and values, a mask of T*(n+T)*(b+2) and T*V logits. Rows of rejected inputs are dropped
         after each step.
Source   Chen et al., "Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of
         LLM Inference", 2024. No code was read.
Departs  how many inputs are candidates and how many are prompt tokens is found by policy iteration;
         accuracies are measured on the model's own text, at places where steps begin, each given
         that those before were right, else a plan promises 2 to 13 % too much; in typical mode the
         token after the accepted ones is drawn from those that would be accepted.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from holdfast.context.attention.ppd_trees import Inputs, Plan, Tree, accept, begins, fastest, plan
from holdfast.errors import UsageError, unknown

RANKS = 10  # guesses per depth
SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # inputs of a step that are tried
MODES = ("greedy", "typical")
_TRIED = 16  # inputs, per copy, of the steps at whose places accuracies are measured
_FADE = 0.8  # weight of a prompt token's loss relative to that of the one before


class PPD(nn.Module):
    """Prompt tokens for one model: token i, standing i+1 places after the last known token, guesses
    the token behind it.

    Args:
        embeddings: (P,E,D), E copies of each of P prompt tokens, whose logits are averaged.

    Attributes:
        accuracy: (P,RANKS) fp32, share of tokens that are the r-th guess of prompt token i, where
            those before were among the guesses.
    """

    accuracy: Tensor

    def __init__(self, embeddings: Tensor):
        if embeddings.dim() != 3 or 0 in embeddings.shape:
            raise UsageError(
                f"embeddings of shape {tuple(embeddings.shape)}; expected (prompts, copies, hidden "
                "size), all at least 1"
            )
        super().__init__()
        self.embeddings = nn.Parameter(embeddings)
        self.register_buffer("accuracy", torch.zeros(embeddings.shape[0], RANKS))
        self.latency: dict[int, float] = {}

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel,
        dataset: Iterable[Tensor],
        *,
        prompts: int = 3,
        copies: int = 1,
        lr: float = 0.01,
        cuts: int = 8,
        seed: int = 0,
    ) -> "PPD":
        """Train prompt tokens so that they say what the frozen model will say later.

        Args:
            dataset: batches of ids (B,n) int64, one optimizer step each; the last one is held out
                to measure accuracies, and with no other the embeddings stay untrained.
            prompts, copies: P and E.
            lr: of Adam.
            cuts: random places per row at which a batch is interrupted by prompt tokens.
            seed: of the first embeddings, drawn among those of tokens, and of the places.

        Raises:
            UsageError: no prompt token, an empty dataset, or rows too short for the prompt tokens.
        """
        if prompts < 1 or copies < 1:
            raise UsageError(f"prompts={prompts}, copies={copies}: PPD needs at least 1 of each")
        table = _table(model).weight
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(table), (prompts, copies), generator=generator)
        # Steps of Adam would be lost in 16 bits.
        found = cls(table.detach()[rows.to(table.device)].float())
        held_out = None
        with _frozen(model):
            optimizer = torch.optim.Adam(found.parameters(), lr)
            for ids in dataset:
                if held_out is not None:
                    optimizer.zero_grad()
                    found._loss(model, held_out, cuts, generator).backward()
                    optimizer.step()
                held_out = ids
            if held_out is None:
                raise UsageError("the dataset is empty; give batches of ids (B,n)")
            found.embeddings.data = found.embeddings.data.to(table.dtype)
            found.calibrate(model, held_out)
        return found

    @property
    def nbytes(self) -> int:
        return self.embeddings.nbytes + self.accuracy.nbytes

    @torch.no_grad()
    def calibrate(self, model: PreTrainedModel, ids: Tensor) -> None:
        """Measure accuracies against the model's own greedy continuation of the first half of ids.

        Args:
            ids: (B,n) int64.
        """
        start = ids.shape[1] // 2
        new = ids.shape[1] - start
        text: Tensor = model.generate(  # type: ignore[operator]
            ids[:, :start],
            attention_mask=torch.ones_like(ids[:, :start]),
            do_sample=False,
            use_cache=True,
            min_new_tokens=new,
            max_new_tokens=new,
        )
        prompts = len(self.embeddings)
        places = torch.arange(start, text.shape[1] - prompts, device=ids.device)
        if not len(places):
            raise UsageError(
                f"rows of {ids.shape[1]} tokens leave no room to try {prompts} prompt tokens; "
                f"give at least {2 * prompts + 2}"
            )
        _, guesses = self._guess(model, text, places.expand(len(text), -1))
        targets = text[:, places[:, None] + 1 + torch.arange(prompts, device=ids.device)]
        hits = guesses.topk(RANKS).indices == targets[..., None]
        ranks = torch.where(hits.any(-1), hits.long().argmax(-1), RANKS).cpu()  # (B,places,P)
        self.accuracy.copy_(_shares(ranks.flatten(0, 1)))
        # Steps begin where a guess was wrong, and that is where text is harder to guess.
        tried = self.plan(_TRIED * self.embeddings.shape[1])
        begun = [row[begins(tried, row.tolist())] for row in ranks]
        self.accuracy.copy_(_shares(torch.cat(begun)))

    def _loss(
        self, model: PreTrainedModel, ids: Tensor, cuts: int, generator: torch.Generator
    ) -> Tensor:
        """Divergence of what prompt tokens say from what the model says; later ones weigh less."""
        prompts = len(self.embeddings)
        if ids.dim() != 2 or ids.shape[1] < prompts + 2:
            raise UsageError(
                f"a batch of shape {tuple(ids.shape)}; expected (B,n) with n of at least "
                f"{prompts + 2} for {prompts} prompt tokens"
            )
        last = ids.shape[1] - prompts
        places = torch.randint(1, last + 1, (len(ids), cuts), generator=generator).to(ids.device)
        teacher, student = self._guess(model, ids, places)
        at = places[..., None] + torch.arange(prompts, device=ids.device)  # (B,cuts,P)
        rows = torch.arange(len(ids), device=ids.device).view(-1, 1, 1)
        want = teacher[rows, at].float().log_softmax(-1)
        said = student.float().log_softmax(-1)
        apart = F.kl_div(said, want, log_target=True, reduction="none").sum(-1).mean((0, 1))
        fade = _FADE ** torch.arange(prompts, device=ids.device)
        return (fade * apart).mean()

    def _guess(self, model: PreTrainedModel, ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the model (B,n,V), and of prompt tokens that interrupt it (B,cuts,P,V).

        Args:
            ids: (B,n).
            places: (B,cuts): how many tokens a chain of prompt tokens sees.
        """
        # Tokens see no prompt token, so they need no gradient and run once for all chains.
        cache = _new_cache(model)
        with torch.no_grad():
            teacher = model(ids, past_key_values=cache, use_cache=True).logits
        batch, cuts = places.shape
        prompts, copies, _ = self.embeddings.shape
        chain = Inputs.of(Tree(((),), (prompts,)), copies, ids.device)
        own = chain.sees[1:, 1:].repeat(cuts, cuts)
        group = torch.arange(cuts, device=ids.device).repeat_interleave(prompts * copies)
        own &= group[:, None] == group
        before = torch.arange(ids.shape[1], device=ids.device) < places[..., None]
        before = before.repeat_interleave(prompts * copies, 1)
        mask = torch.cat([before, own.expand(batch, -1, -1)], -1)[:, None]
        depth = chain.depth[1:] - 1
        logits = _run(
            model,
            self.embeddings.flatten(0, 1).to(teacher.dtype).repeat(cuts, 1).expand(batch, -1, -1),
            (places[..., None] + depth).flatten(1),
            mask,
            cache,
        )
        return teacher, logits.unflatten(1, (cuts, prompts, copies)).mean(3)

    @torch.no_grad()
    def tune(self, model: PreTrainedModel, length: int, *, rounds: int = 5) -> dict[int, float]:
        """Measure seconds of forward passes on this device; `ppd_generate(tree="auto")` uses them.

        Args:
            length: tokens in the cache while it is measured.
            rounds: passes of each size in `SIZES`, in turn.
        """
        device = self.embeddings.device
        cache = _new_cache(model)
        if length:
            model(torch.zeros(1, length, dtype=torch.long, device=device),
                  past_key_values=cache, use_cache=True, logits_to_keep=1)  # fmt: skip
        # The fastest pass counts: what other processes add is no property of a size.
        self.latency = dict.fromkeys(SIZES, math.inf)
        for _, size in itertools.product(range(rounds), SIZES):
            embedded = self.embeddings[0, :1].expand(1, size, -1)
            at = torch.full((1, size), length, device=device)
            mask = torch.ones(1, 1, size, length + size, dtype=torch.bool, device=device)
            start = time.perf_counter()
            # What a step does with logits waits for the device, as this does.
            _run(model, embedded, at, mask, cache).argmax(-1).tolist()
            self.latency[size] = min(self.latency[size], time.perf_counter() - start)
            keep_rows(cache, length, torch.arange(0, device=device))
        return self.latency

    def plan(self, size: int | None = None) -> Plan:
        """The best trees of at most `size` inputs; without a size, the fastest as measured."""
        accuracy = tuple(map(tuple, self.accuracy.tolist()))
        copies = self.embeddings.shape[1]
        if size is not None:
            if size < 1:
                raise UsageError(f"tree={size}: a step has at least 1 input, the last token")
            return plan(accuracy, size, copies)
        if not self.latency:
            raise UsageError("latency was not measured; call tune(model, length) or give a size")
        return fastest(accuracy, self.latency, copies)


def _shares(ranks: Tensor) -> Tensor:
    """(P,RANKS), from ranks (N,P) of what came, in the guesses for it; RANKS is none of them."""
    shares, right = [], torch.ones(len(ranks), dtype=torch.bool)
    for depth in ranks.mT:
        counts = torch.bincount(depth[right], minlength=RANKS + 1)
        shares.append(counts[:RANKS] / counts.sum().clamp(min=1))
        right &= depth < RANKS
    return torch.stack(shares)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter of the model asks for a gradient, and dropout is off."""
    training, asked = model.training, [p for p in model.parameters() if p.requires_grad]
    try:
        for p in asked:
            p.requires_grad_(False)
        model.eval()
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)
        model.train(training)


def _table(model: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, model.get_input_embeddings())


def _new_cache(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    other = next((layer for layer in cache.layers if type(layer) is not DynamicLayer), None)
    if other is not None:
        raise UsageError(
            f"{type(model).__name__} has layers with a {type(other).__name__}, from which rejected "
            "guesses cannot be taken back; PPD needs full attention in all layers"
        )
    return cache


def keep_rows(cache: DynamicCache, start: int, rows: Tensor) -> None:
    """Of the entries from `start` on, keep `rows`, in that order; the others are gone.

    Args:
        cache: of full-attention layers, whose entries are all there.
        rows: (r,) int64, relative to `start`, ascending.
    """
    for layer in cache.layers:
        for name in ("keys", "values"):
            held = getattr(layer, name)
            end = start + len(rows)
            held[:, :, start:end] = held[:, :, start:].index_select(2, rows)
            setattr(layer, name, held[:, :, :end])


@dataclass(frozen=True)
class Generated:
    """What `ppd_generate` returns.

    Args:
        ids: (1,n + new) int64, the prompt in front.
        accepted: tokens of each step, before the last one is cut to what was asked for.
        plan: trees that were used.
    """

    ids: Tensor
    accepted: tuple[int, ...]
    plan: Plan


@torch.no_grad()
def ppd_generate(
    model: PreTrainedModel,
    prompts: PPD,
    ids: Tensor,
    *,
    max_new_tokens: int = 64,
    tree: int | Literal["auto"] = "auto",
    mode: str = "greedy",
    seed: int = 0,
) -> Generated:
    """Continue one sequence; in greedy mode with the tokens of plain greedy `model.generate()`.

    Args:
        ids: (1,n) int64, without padding.
        tree: most inputs per step, or "auto" for the fastest by latencies of `prompts.tune`, which
            is called where it was not.
        mode: "greedy", or "typical": guesses are accepted that the model gives more than
            min(0.3, 0.09 exp(-entropy)).
        seed: of typical mode.

    Raises:
        UsageError: several or no sequences, an unknown mode, a model with a sliding window.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if ids.dim() != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        raise UsageError(
            f"ids of shape {tuple(ids.shape)}; PPD continues one sequence at a time: (1,n), n >= 1"
        )
    cache = _new_cache(model)
    if tree == "auto" and not prompts.latency:
        prompts.tune(model, ids.shape[1])
    planned = prompts.plan(None if tree == "auto" else tree)
    copies = prompts.embeddings.shape[1]
    states = [Inputs.of(one, copies, ids.device) for one in planned.trees]
    generator = torch.Generator(ids.device).manual_seed(seed) if mode == "typical" else None
    if ids.shape[1] > 1:
        model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    ends = _ends(model)
    text: list[int] = []
    accepted: list[int] = []
    root, guesses = int(ids[0, -1]), ids.new_zeros(0, RANKS)
    while len(text) < max_new_tokens and not ends.intersection(text):
        inputs = states[len(guesses)]
        known = guesses.tolist()
        tokens = [known[len(path) - 1][path[-1]] if path else root for path in inputs.tree.nodes]
        logits = _step(model, prompts, inputs, tokens, cache)
        path, root = accept(inputs, tokens, logits, generator)
        start = cache.get_seq_length() - len(inputs.depth)
        keep_rows(cache, start, torch.tensor(path, device=ids.device))
        chain = inputs.chain[path[-1]]
        said = logits[chain.start : chain.stop].unflatten(0, (-1, copies)).mean(1)
        guesses = said.topk(RANKS).indices
        new = [*(tokens[node] for node in path[1:]), root]
        accepted.append(len(new))
        # An end inside the accepted tokens ends the text, whatever came after it.
        stop = next((i for i, token in enumerate(new, 1) if token in ends), len(new))
        text += new[:stop]
    out = torch.tensor([text[:max_new_tokens]], dtype=ids.dtype, device=ids.device)
    return Generated(torch.cat([ids, out], 1), tuple(accepted), planned)


def _step(
    model: PreTrainedModel, prompts: PPD, inputs: Inputs, tokens: list[int], cache: DynamicCache
) -> Tensor:
    """Logits (T,V) of a tree's nodes and prompt tokens, whose entries are then in the cache."""
    past = cache.get_seq_length()
    words = _table(model)(torch.tensor(tokens, device=inputs.depth.device))
    embedded = torch.cat([words, prompts.embeddings.flatten(0, 1)[inputs.prompt].to(words.dtype)])
    mask = F.pad(inputs.sees, (past, 0), value=True)[None, None]
    return _run(model, embedded[None], (past + inputs.depth)[None], mask, cache)[0]


def _run(
    model: PreTrainedModel, embedded: Tensor, at: Tensor, mask: Tensor, cache: DynamicCache
) -> Tensor:
    """Logits (B,T,V) of embeddings (B,T,D) at places (B,T) that see (B,1,T,n+T) bool."""
    # Every attention of transformers adds a mask of numbers; not all take a bool one.
    hidden = torch.finfo(embedded.dtype).min
    added = torch.zeros_like(mask, dtype=embedded.dtype).masked_fill_(~mask, hidden)
    return model(
        inputs_embeds=embedded, position_ids=at, attention_mask=added, past_key_values=cache,
        use_cache=True,
    ).logits  # fmt: skip


def _ends(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}
