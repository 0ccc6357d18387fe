"""M2-BERT (097): one vector for a whole long document, from an encoder without attention.

Keeps    one vector for each document of up to `length` tokens; no chunks.
Form     f32 of unit norm: the mean of the last layer's states over the document's tokens.
Bytes    4*d a document; 4*M2Config.parameters() of fp32 weights, whose MLPs are 1/blocks of dense
         ones. Saved for backward grow as L*d: a long convolution keeps its input, no spectrum.
Source   Saad-Falcon, Fu, Arora, Guha, Ré, "Benchmarking and Building Long-Context Retrieval Models
         with LoCo and M2-BERT", ICML 2024; Fu et al., "Monarch Mixer: A Simple Sub-Quadratic
         GEMM-Based Architecture", NeurIPS 2023.
Departs  layers are normalised before the mixer and before the MLP, words and last states not at
         all, and new layers add zero: an untrained model's vector is the mean of its words. Where
         the paper is silent: the mean is pooled; a longer model starts from the same filters
         stretched over its length and from repeated places. The mixer's departures: `longconv`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from holdfast.errors import UsageError
from holdfast.longterm.longconv import LongMixer, mixer_parameters
from holdfast.longterm.retrieval.vectors import InContext, Query, encode_windows

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
TOKENS = 16_384  # padded tokens in one forward pass of `encode`


@dataclass(frozen=True)
class M2Config:
    """Sizes; the defaults are the published base model of 2,048 tokens (80 M parameters).

    Args:
        vocabulary: rows of the token embedding.
        width: d, of the states and of the vectors.
        inner: width inside the MLPs.
        blocks: block-diagonal blocks of the MLPs' weights; must divide `width` and `inner`.
        length: the most tokens of a document.
        filter_width: of the small networks that write the filters.
    """

    vocabulary: int = 30_522
    width: int = 768
    layers: int = 12
    inner: int = 3_072
    blocks: int = 4
    length: int = 2_048
    filter_width: int = 128

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value < 1:
                raise UsageError(f"{name}={value} must be at least 1")
        if self.width % self.blocks or self.inner % self.blocks:
            raise UsageError(
                f"blocks={self.blocks} does not divide width={self.width} and inner={self.inner}; "
                "choose sizes that are multiples of it"
            )

    def parameters(self) -> int:
        """How many numbers the weights are."""
        d = self.width
        mixer = mixer_parameters(d, self.filter_width)
        mlp = (2 * self.inner * d + self.inner * d) // self.blocks + 2 * self.inner + d
        norms = 2 * 2 * d
        embedding = (self.vocabulary + self.length) * d
        return embedding + self.layers * (mixer + mlp + norms)


class BlockLinear(nn.Module):
    """A linear layer whose weight is block-diagonal: (blocks, out/blocks, in/blocks)."""

    def __init__(self, inputs: int, outputs: int, blocks: int):
        super().__init__()
        bound = (inputs // blocks) ** -0.5
        shape = (blocks, outputs // blocks, inputs // blocks)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(...,in) -> (...,out)."""
        parts = x.unflatten(-1, (len(self.weight), -1))
        return torch.einsum("...bi,boi->...bo", parts, self.weight).flatten(-2) + self.bias


class Layer(nn.Module):
    """Mixer and gated MLP, each added to what it read."""

    def __init__(self, config: M2Config):
        super().__init__()
        d = config.width
        self.before_mixer, self.before_mlp = nn.LayerNorm(d), nn.LayerNorm(d)
        self.mixer = LongMixer(d, config.length, config.filter_width)
        self.gate_and_value = BlockLinear(d, 2 * config.inner, config.blocks)
        self.out = BlockLinear(config.inner, d, config.blocks)
        # A new model's vector is the mean of its words; layers learn what to add to it.
        for last in (self.mixer.leave, self.out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        x = x + self.mixer(self.before_mixer(x), valid)
        gate, value = self.gate_and_value(self.before_mlp(x)).chunk(2, -1)
        return x + self.out(F.gelu(gate) * value)


class M2Bert(nn.Module):
    """The encoder: token ids to states."""

    def __init__(self, config: M2Config):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocabulary, config.width)
        self.places = nn.Embedding(config.length, config.width)
        # Large beside an optimizer's step: Adam moves rare words as far as frequent ones, and all
        # words of a document the same way, which would make smaller ones alike.
        nn.init.normal_(self.words.weight, std=0.3)
        nn.init.zeros_(self.places.weight)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """ids (B,L) int64, valid (B,L) bool, False for padding at the end -> (B,L,d).

        Raises:
            UsageError: L is more than `config.length`.
        """
        if ids.shape[1] > self.config.length:
            raise UsageError(_too_long(ids.shape[1], self.config.length))
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, valid)
        return x

    def pool(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """One unit vector for each row: arguments as `forward` -> (B,d) fp32."""
        states = self(ids, valid).float()
        if valid is None:
            return F.normalize(states.mean(1), dim=-1)
        # The norm takes out the count that would make the sum a mean.
        return F.normalize((states * valid[..., None]).sum(1), dim=-1)

    def extended(self, length: int) -> "M2Bert":
        """A copy for longer documents, to be trained further: filters stretched, places repeated.

        Raises:
            UsageError: it would be shorter.
        """
        known = self.config.length
        if length < known:
            raise UsageError(f"length={length} is shorter than the model's {known}; give more")
        state = self.state_dict()
        repeated = torch.arange(length, device=self.places.weight.device) % known
        state["places.weight"] = self.places.weight.detach()[repeated]
        longer = M2Bert(replace(self.config, length=length)).to(self.places.weight)
        longer.load_state_dict(state)
        return longer


def _too_long(given: int, most: int) -> str:
    return (
        f"a document of {given:,} tokens is longer than the model's {most:,}; cut it, or extend "
        f"the model: M2Bert.extended({given}), then train it further"
    )


class M2Encoder:
    """M2-BERT as an embedder: every text is one vector, read as a whole.

    Args:
        model: reads ids of `tokenizer`; trained by `loco.train_retriever`.
        tokenizer: of at most the model's vocabulary.

    Raises:
        UsageError: the tokenizer has more tokens than the model.
    """

    def __init__(self, model: M2Bert, tokenizer: Tokenizer):
        if tokenizer.get_vocab_size() > model.config.vocabulary:
            raise UsageError(
                f"the tokenizer has {tokenizer.get_vocab_size():,} tokens, the model "
                f"{model.config.vocabulary:,}; give M2Config(vocabulary=...) at least as many"
            )
        self.model, self.tokenizer = model, tokenizer
        self.dim = model.config.width
        self._known: tuple[tuple[int, ...], str] | None = None

    @property
    def id(self) -> str:
        """Names the weights and the tokenizer: training makes it another embedder."""
        state = self.model.state_dict()
        versions = tuple(tensor._version for tensor in state.values())
        if self._known is None or self._known[0] != versions:
            digest = hashlib.sha256(self.tokenizer.to_str().encode())
            for name, tensor in state.items():
                digest.update(name.encode())
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
            self._known = versions, f"m2bert-{digest.hexdigest()[:12]}"
        return self._known[1]

    def ids(self, text: str) -> list[int]:
        """A text's tokens; one of an empty text.

        Raises:
            UsageError: more than the model reads; nothing is cut silently.
        """
        found = self.tokenizer.encode(text).ids or [0]
        if len(found) > self.model.config.length:
            raise UsageError(_too_long(len(found), self.model.config.length))
        return found

    def vectors(self, rows: Sequence[list[int]]) -> Tensor:
        """Unit vectors of rows of ids in one pass, with a gradient where torch records one."""
        device = self.model.places.weight.device
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
        counts = torch.tensor([len(row) for row in rows], device=device)
        same = all(len(row) == longest for row in rows)
        valid = None if same else torch.arange(longest, device=device) < counts[:, None]
        return self.model.pool(ids, valid)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = [self.ids(text) for text in texts]
        out = np.empty((len(rows), self.dim), np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        was_training = self.model.training
        self.model.eval()
        with torch.inference_mode():
            while order:
                count = 1
                while count < len(order) and len(rows[order[count]]) * (count + 1) <= TOKENS:
                    count += 1
                batch, order = order[:count], order[count:]
                out[batch] = self.vectors([rows[i] for i in batch]).cpu().numpy()
        self.model.train(was_training)
        return out

    def encode_query(self, text: str) -> Query:
        return Query(text, self.encode([text])[0])

    def encode_in_context(self, texts: Sequence[str], at: Sequence[int]) -> list[InContext]:
        return encode_windows(self, texts, at)

    def save(self, folder: str | Path) -> None:
        """Write weights, sizes and tokenizer into a folder that `load` opens."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.model.state_dict(), folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(asdict(self.model.config), indent=2) + "\n")
        self.tokenizer.save(str(folder / TOKENIZER))

    @classmethod
    def load(cls, folder: str | Path) -> "M2Encoder":
        """Open what `save` wrote.

        Raises:
            UsageError: a file is missing, or the sizes are not an M2Config's.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (WEIGHTS, CONFIG, TOKENIZER):
            if not (folder / name).exists():
                raise UsageError(f"{folder / name} is missing; M2Encoder.save writes such a folder")
        sizes = json.loads((folder / CONFIG).read_text())
        try:
            config = M2Config(**sizes)
        except TypeError as error:
            raise UsageError(
                f"{folder / CONFIG} holds no sizes of an M2-BERT: {error}; expected "
                f"{', '.join(asdict(M2Config()))}"
            ) from error
        model = M2Bert(config)
        model.load_state_dict(load_file(folder / WEIGHTS))
        return cls(model.eval(), Tokenizer.from_file(str(folder / TOKENIZER)))
