"""CausalMARGE (147): a language model whose context is its own recent tokens and a whole data set.

Keeps    every chunk of the training set and of its own past, with the chunk that followed.
Form     a pair of chunks is token ids; its key is an f32 vector of unit norm, of the first chunk.
Bytes    n pairs of chunks of c tokens: n*(4d + 16c + 16), ids and places in int64.
Source   Komatsuzaki, "Current Limitations of Language Models: What You Need is Retrieval", 2020;
         Lewis et al., "Pre-training via Paraphrasing", NeurIPS 2020.
Departs  the paper has no code. A chunk asks with the chunk before it, never with itself; a pair is
         found by its first chunk and read with what followed. Found tokens share one softmax with
         the window, with beta*(r - 1) added: one parameter more than a model without retrieval.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import UsageError

ROWS = 4096  # chunk pairs encoded in one pass


@dataclass(frozen=True)
class MargeConfig:
    """Sizes.

    Args:
        layers: all of them; the first `encoder` ones also read chunks, and are f.
        window: tokens that a layer sees, its own included.
        chunk: c, tokens that are found together.
        found: M, chunk pairs that each chunk attends to; 0 is a model without retrieval.
    """

    vocabulary: int
    width: int = 64
    layers: int = 3
    encoder: int = 1
    heads: int = 4
    window: int = 32
    chunk: int = 8
    found: int = 2

    def __post_init__(self):
        if self.width % (4 * self.heads):
            raise UsageError(
                f"width={self.width} is no multiple of 4*heads={4 * self.heads}; rotary positions "
                "turn pairs of channels in half of each head"
            )
        if not 0 < self.encoder < self.layers:
            raise UsageError(
                f"encoder={self.encoder} of layers={self.layers}: at least one layer reads chunks "
                "and at least one after it attends to what was found"
            )


@dataclass(frozen=True)
class Index:
    """What can be found: `tokens` (N,2c) int64, `vectors` (N,d) f32 unit rows, and where a pair is
    from: `document` and `place`, the number of its first chunk, both (N) int64."""

    tokens: Tensor
    vectors: Tensor
    document: Tensor
    place: Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.tokens, self.vectors, self.document, self.place))


@dataclass(frozen=True)
class Found:
    """What the chunks of a batch attend to: `states` (B,C,K,d), `bias` (B,C,K), -inf for nothing,
    and `positions` (C,K), as if each pair's first chunk were the chunk before."""

    states: Tensor
    bias: Tensor
    positions: Tensor


def allowed(index: Index, document: Tensor, chunks: int) -> Tensor:
    """Which pairs a chunk may see: other documents', and its own document's that have ended.

    Args:
        document: (B) int64, the document of each row, which begins with the row.

    Returns:
        (B,chunks,N) bool.
    """
    other = index.document != document[:, None]
    ended = index.place + 1 < torch.arange(chunks, device=document.device)[:, None]
    return other[:, None] | ended


class Block(nn.Module):
    """Attention to a window and to what was found, and an MLP, each added to what it read."""

    def __init__(self, config: MargeConfig):
        super().__init__()
        d = config.width
        self.heads, self.window = config.heads, config.window
        self.before, self.middle = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))
        # In every other head a key tells of the token before it, and all begin by comparing tokens
        # and copying what they find: what follows a repeated token is found by one layer from the
        # first step on, which small models otherwise learn late.
        self.blend = nn.Parameter(torch.tensor([-4.0, 4.0]).repeat(config.heads)[: config.heads])
        with torch.no_grad():
            self.k.weight.copy_(self.q.weight)
            self.out.weight.copy_(self.v.weight.T)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor, found: Found | None = None) -> Tensor:
        """x (B,n,d) -> (B,n,d)."""
        x = x + self.out(self._attend(self.before(x), found))
        return x + self.mlp(self.middle(x))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def _keys(self, x: Tensor, positions: Tensor) -> Tensor:
        """(...,n,d) -> (...,H,n,d/H), turned by their positions."""
        keys = self._split(self.k(x))
        previous = F.pad(keys, (0, 0, 1, 0))[..., :-1, :]
        return rotate(torch.lerp(keys, previous, self.blend.sigmoid()[:, None, None]), positions)

    def _attend(self, x: Tensor, found: Found | None) -> Tensor:
        n = x.shape[1]
        at = torch.arange(n, device=x.device)
        lag = at[:, None] - at
        mask = (lag >= 0) & (lag < self.window)
        q = rotate(self._split(self.q(x)), at)
        k, v = self._keys(x, at), self._split(self.v(x))
        if found is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return out.transpose(1, 2).flatten(2)
        chunks = found.bias.shape[1]
        near = (q @ k.mT).masked_fill(~mask, -math.inf)
        states = self.before(found.states)
        # Tokens of different pairs are no neighbours: keys are made pair by pair.
        pairs = states.unflatten(2, (-1, 2 * (n // chunks)))
        places = found.positions.unflatten(1, (-1, 2 * (n // chunks)))
        keys = self._keys(pairs, places[..., None, :]).transpose(2, 3).flatten(3, 4)
        values = self._split(self.v(states))  # (B,C,H,K,d/H), as keys
        asked = q.unflatten(2, (chunks, -1)).transpose(1, 2)  # (B,C,H,c,d/H)
        far = asked @ keys.mT
        scale = q.shape[-1] ** -0.5
        far = (far * scale + found.bias[:, :, None, None]).transpose(1, 2).flatten(2, 3)
        weights = torch.cat([near * scale, far], -1).softmax(-1)
        read = weights[..., n:].unflatten(2, (chunks, -1)).transpose(1, 2) @ values
        out = weights[..., :n] @ v + read.transpose(1, 2).flatten(2, 3)
        return out.transpose(1, 2).flatten(2)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions in half of the channels: x (...,n,d), positions broadcastable to (...,n).

    The other half compares tokens at any distance.
    """
    turned = x.shape[-1] // 4
    rate = 1000.0 ** (-torch.arange(turned, device=x.device, dtype=torch.float32) / turned)
    angle = positions[..., None] * rate
    a, b, rest = x.split([turned, turned, x.shape[-1] - 2 * turned], -1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


class CausalMARGE(nn.Module):
    """A decoder that reads the `found` chunk pairs nearest to the chunk before.

    Relevance r = cos(f(x), f(z)) enters the attention logits as beta*(r - 1), so that f learns what
    is worth finding, and what is just alike counts as much as the window's own tokens.
    """

    def __init__(self, config: MargeConfig):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.words.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.leave = nn.LayerNorm(config.width)
        self.beta = nn.Parameter(torch.tensor(10.0)) if config.found else None

    def forward(
        self, x: Tensor, state: Index | None = None, document: Tensor | None = None
    ) -> Tensor:
        """Logits of the next token: x (B,n) int64 -> (B,n,V).

        Args:
            x: rows that begin a document; n a multiple of the chunk where there is a state.
            state: what can be found; None reads the window alone.
            document: (B) int64, which of the state's documents the rows are; -1, the default, for
                documents that it does not hold.

        Raises:
            UsageError: a length that is no multiple of the chunk, or a state for a model without
                retrieval.
        """
        found = None
        if state is not None:
            if x.shape[1] % self.config.chunk or not self.config.found:
                raise UsageError(
                    f"rows of {x.shape[1]} tokens with chunk={self.config.chunk} and "
                    f"found={self.config.found}: retrieval needs found >= 1 and rows of a multiple "
                    "of the chunk; pad the end, which changes nothing before it"
                )
            if document is None:
                document = x.new_full((len(x),), -1)
            found = self._find(x, state, document)
        states = self.words(x)
        for i, block in enumerate(self.blocks):
            states = block(states, found if i >= self.config.encoder else None)
        return self.leave(states) @ self.words.weight.T

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Chunks or pairs of them, each read alone: (N,c or 2c) -> f (N,d) unit, states (N,.,d)."""
        states = self.words(tokens)
        for block in self.blocks[: self.config.encoder]:
            states = block(states)
        # Causal layers: what the first chunk is does not depend on the second.
        return F.normalize(states[:, : self.config.chunk].mean(1), dim=-1), states

    @torch.no_grad()
    def index(self, documents: Tensor, numbers: Tensor | None = None) -> Index:
        """All pairs of neighbouring chunks of documents (D,n), which may overlap.

        Args:
            numbers: (D) int64, what to call the documents; by default 0 to D-1.
        """
        c = self.config.chunk
        pairs = documents.unfold(1, 2 * c, c)  # (D,n/c-1,2c)
        if numbers is None:
            numbers = torch.arange(len(documents), device=documents.device)
        place = torch.arange(pairs.shape[1], device=documents.device).repeat(len(documents))
        tokens = pairs.flatten(0, 1).contiguous()
        return Index(tokens, self._keys(tokens), numbers.repeat_interleave(pairs.shape[1]), place)

    @torch.no_grad()
    def refreshed(self, index: Index) -> Index:
        """The same pairs under the keys of the present weights."""
        return Index(index.tokens, self._keys(index.tokens), index.document, index.place)

    def _keys(self, tokens: Tensor) -> Tensor:
        first = tokens[:, : self.config.chunk]
        return torch.cat([self.encode(rows)[0].float() for rows in first.split(ROWS)])

    def _find(self, x: Tensor, state: Index, document: Tensor) -> Found:
        b, (m, c) = len(x), (self.config.found, self.config.chunk)
        chunks = x.shape[1] // c
        asked = self.encode(x.reshape(-1, c))[0].unflatten(0, (b, chunks))
        # Chunk i asks with chunk i-1; nothing comes before the first.
        asked = asked.roll(1, 1)
        with torch.no_grad():
            scores = asked.float() @ state.vectors.T
            scores.masked_fill_(~allowed(state, document, chunks), -math.inf)
            scores[:, 0] = -math.inf
            best, nearest = scores.topk(min(m, len(state.vectors)), -1)
        keys, states = self.encode(state.tokens[nearest.flatten()])
        relevance = (asked[:, :, None] * keys.view(*nearest.shape, -1)).sum(-1)
        bias = (self.beta * (relevance - 1)).masked_fill(best == -math.inf, -math.inf)
        first = (torch.arange(chunks, device=x.device) - 1) * c
        positions = first[:, None] + torch.arange(2 * c, device=x.device).repeat(nearest.shape[-1])
        states = states.view(b, chunks, -1, states.shape[-1])
        return Found(states, bias.repeat_interleave(2 * c, -1), positions)


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    lr: float,
    index: Index | None = None,
    refresh: int = 50,
    weight: Tensor | None = None,
) -> list[float]:
    """Train in place by next-token loss, the rate in one cycle; returns the losses in nats.

    Args:
        batches: of rows (B,n) int64 and their documents (B) int64.
        index: what a CausalMARGE may find; its keys are renewed every `refresh` steps.
        weight: (n-1), of each position's loss, with a mean of 1; by default all alike.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses = []
    for step, (rows, document) in zip(range(steps), batches, strict=False):
        if index is not None and step % refresh == 0:
            index = model.refreshed(index)
        logits = model(rows) if index is None else model(rows, index, document)
        nats = F.cross_entropy(logits[:, :-1].mT, rows[:, 1:], reduction="none")
        loss = (nats if weight is None else nats * weight).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        losses.append(loss.item())
    return losses
