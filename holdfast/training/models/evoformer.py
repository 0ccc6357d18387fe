"""A small Evoformer, AlphaFold 2's trunk: the model whose logits grow with the cube of its input.

Keeps    the MSA representation (N_s x N_r x c_m) and the pair representation (N_r^2 x c_z) between
         blocks; triangle attention holds heads x N_r^3 logits, and with `chunk` rows at a time
         heads x chunk x N_r^2.
Form     the dtype of its parameters.
Bytes    b*(N_s*N_r*c_m + N_r^2*c_z) per block where blocks are recomputed.
Source   Jumper et al., Highly accurate protein structure prediction with AlphaFold, Nature 2021,
         supplementary algorithms 4, 6-15.
Departs  no dropout, no extra-MSA stack, templates, recycling or structure module; residues are
         their own target features. Trained on its two auxiliary losses: masked MSA and distogram.
"""

import torch
from torch import Tensor, nn

from holdfast.training.chunked import chunked

# 20 amino acids, unknown, gap, mask; distances in 64 bins; relative positions clipped at 32.
TOKENS, BINS, CLIP = 23, 64, 32


class GatedAttention(nn.Module):
    """Multi-head self-attention over the second-last dimension, with a gate and an optional bias.

    Logits are formed explicitly, as the algorithms do.
    """

    def __init__(self, width: int, heads: int, head_size: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * heads * head_size, bias=False)
        self.gate = nn.Linear(width, heads * head_size)
        self.out = nn.Linear(heads * head_size, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (B,R,n,c), bias (B,H,n,n) for all rows R -> (B,R,n,c)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # (B,R,n,H,d)
        q = q * q.shape[-1] ** -0.5
        logits = torch.einsum("brihd,brjhd->brhij", q, k)
        if bias is not None:
            logits = logits + bias.unsqueeze(1)
        mixed = torch.einsum("brhij,brjhd->brihd", logits.softmax(-1), v)
        return self.out(self.gate(x).sigmoid() * mixed.flatten(-2))


class RowAttention(nn.Module):
    """Algorithm 7: attention along the residues of each sequence, biased by the pairs."""

    def __init__(self, c_m: int, c_z: int, heads: int, head_size: int):
        super().__init__()
        self.norm, self.norm_pair = nn.LayerNorm(c_m), nn.LayerNorm(c_z)
        self.bias = nn.Linear(c_z, heads, bias=False)
        self.attention = GatedAttention(c_m, heads, head_size)

    def forward(self, msa: Tensor, pair: Tensor) -> Tensor:
        bias = self.bias(self.norm_pair(pair)).permute(0, 3, 1, 2)
        return self.attention(self.norm(msa), bias)


class ColumnAttention(nn.Module):
    """Algorithm 8: attention along the sequences at each residue."""

    def __init__(self, c_m: int, heads: int, head_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(c_m)
        self.attention = GatedAttention(c_m, heads, head_size)

    def forward(self, msa: Tensor) -> Tensor:
        return self.attention(self.norm(msa).transpose(1, 2)).transpose(1, 2)


class Transition(nn.Sequential):
    """Algorithms 9 and 15: two layers, four times as wide inside."""

    def __init__(self, width: int):
        super().__init__(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )


class OuterProductMean(nn.Module):
    """Algorithm 10: what two residues' columns share, averaged over sequences, updates the pair."""

    def __init__(self, c_m: int, c_z: int, inner: int):
        super().__init__()
        self.norm = nn.LayerNorm(c_m)
        self.sides = nn.Linear(c_m, 2 * inner)
        self.out = nn.Linear(inner * inner, c_z)

    def forward(self, msa: Tensor) -> Tensor:
        left, right = self.sides(self.norm(msa)).chunk(2, -1)
        outer = torch.einsum("bsic,bsjd->bijcd", left / msa.shape[1], right)
        return self.out(outer.flatten(-2))


class TriangleMultiplication(nn.Module):
    """Algorithms 11 (outgoing edges) and 12 (incoming edges)."""

    def __init__(self, c_z: int, inner: int, *, outgoing: bool):
        super().__init__()
        self.outgoing = outgoing
        self.norm, self.norm_out = nn.LayerNorm(c_z), nn.LayerNorm(inner)
        self.sides, self.gates = nn.Linear(c_z, 2 * inner), nn.Linear(c_z, 2 * inner)
        self.gate, self.out = nn.Linear(c_z, c_z), nn.Linear(inner, c_z)

    def forward(self, pair: Tensor) -> Tensor:
        pair = self.norm(pair)
        left, right = (self.gates(pair).sigmoid() * self.sides(pair)).chunk(2, -1)
        pattern = "bikc,bjkc->bijc" if self.outgoing else "bkic,bkjc->bijc"
        return self.gate(pair).sigmoid() * self.out(
            self.norm_out(torch.einsum(pattern, left, right))
        )


class TriangleAttention(nn.Module):
    """Algorithms 13 (around the starting node) and 14 (around the ending node).

    `chunk`: rows whose logits exist at once, in both passes; None for all.
    """

    def __init__(self, c_z: int, heads: int, head_size: int, *, starting: bool):
        super().__init__()
        self.starting, self.chunk = starting, None
        self.norm = nn.LayerNorm(c_z)
        self.bias = nn.Linear(c_z, heads, bias=False)
        self.attention = GatedAttention(c_z, heads, head_size)

    def forward(self, pair: Tensor) -> Tensor:
        # The ending node's attention is the starting node's on the transposed pairs.
        pair = self.norm(pair if self.starting else pair.transpose(1, 2))
        bias = self.bias(pair).permute(0, 3, 1, 2)
        attend = self.attention
        if self.chunk is not None:
            attend = chunked(attend, 1, self.chunk, recompute=True)
        update = attend(pair, bias)
        return update if self.starting else update.transpose(1, 2)


class EvoformerBlock(nn.Module):
    """Algorithm 6, one iteration: msa (B,N_s,N_r,c_m), pair (B,N_r,N_r,c_z) -> the same."""

    def __init__(self, c_m: int, c_z: int, heads: int, pair_heads: int, head_size: int):
        super().__init__()
        self.row = RowAttention(c_m, c_z, heads, head_size)
        self.column = ColumnAttention(c_m, heads, head_size)
        self.msa_transition = Transition(c_m)
        self.outer = OuterProductMean(c_m, c_z, head_size)
        self.outgoing = TriangleMultiplication(c_z, c_z, outgoing=True)
        self.incoming = TriangleMultiplication(c_z, c_z, outgoing=False)
        self.start = TriangleAttention(c_z, pair_heads, head_size, starting=True)
        self.end = TriangleAttention(c_z, pair_heads, head_size, starting=False)
        self.pair_transition = Transition(c_z)

    def forward(self, msa: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
        msa = msa + self.row(msa, pair)
        msa = msa + self.column(msa)
        msa = msa + self.msa_transition(msa)
        pair = pair + self.outer(msa)
        for update in (self.outgoing, self.incoming, self.start, self.end, self.pair_transition):
            pair = pair + update(pair)
        return msa, pair


class Evoformer(nn.Module):
    """Embedding, a stack of blocks, and the masked-MSA and distogram losses.

    Args:
        sequences: N_s of `example_inputs`; N_r is its `sequence`.
    """

    def __init__(
        self,
        *,
        c_m: int = 32,
        c_z: int = 16,
        heads: int = 4,
        pair_heads: int = 4,
        head_size: int = 8,
        depth: int = 4,
        sequences: int = 8,
    ):
        super().__init__()
        self.sequences = sequences
        self.embed = nn.Embedding(TOKENS, c_m)
        self.sides = nn.Embedding(TOKENS, 2 * c_z)
        self.positions = nn.Embedding(2 * CLIP + 1, c_z)
        self.blocks = nn.ModuleList(
            EvoformerBlock(c_m, c_z, heads, pair_heads, head_size) for _ in range(depth)
        )
        self.tokens, self.bins = nn.Linear(c_m, TOKENS), nn.Linear(c_z, BINS)

    def forward(self, msa: Tensor, tokens: Tensor, bins: Tensor) -> Tensor:
        """Loss of one step, a scalar; the first sequence of an MSA is the target.

        Args:
            msa: (B,N_s,N_r) int64 with masked entries.
            tokens: the same without masks; -100 is not counted.
            bins: (B,N_r,N_r) int64 distance bins.
        """
        left, right = self.sides(msa[:, 0]).chunk(2, -1)
        place = torch.arange(msa.shape[2], device=msa.device)
        apart = (place[:, None] - place).clamp(-CLIP, CLIP) + CLIP
        pair = left.unsqueeze(2) + right.unsqueeze(1) + self.positions(apart)
        rows = self.embed(msa)
        for block in self.blocks:
            rows, pair = block(rows, pair)
        masked = nn.functional.cross_entropy(self.tokens(rows).flatten(0, 2), tokens.flatten())
        # Distances have no direction.
        symmetric = self.bins(pair + pair.transpose(1, 2))
        return masked + nn.functional.cross_entropy(symmetric.flatten(0, 2), bins.flatten())

    def example_inputs(
        self, batch: int, sequence: int, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """`batch` MSAs of `sequences` x `sequence` residues."""
        count = torch.arange(batch * self.sequences * sequence, device=device)
        tokens = (count * 7 % 20).view(batch, self.sequences, sequence)
        msa = torch.where(tokens % 7 == 0, TOKENS - 1, tokens)
        pairs = torch.arange(batch * sequence * sequence, device=device)
        return {"msa": msa, "tokens": tokens, "bins": pairs.view(batch, sequence, -1) % BINS}


def chunk_(model: nn.Module, size: int) -> nn.Module:
    """Give every triangle attention of `model` at most `size` rows of logits at once, in place."""
    for module in model.modules():
        if isinstance(module, TriangleAttention):
            module.chunk = size
    return model


def small() -> Evoformer:
    """Four narrow blocks: `holdfast plan train holdfast.training.models.evoformer:small`."""
    return Evoformer()


def full() -> Evoformer:
    """AlphaFold 2's sizes: 48 blocks, c_m 256, c_z 128, 128 clustered sequences."""
    return Evoformer(c_m=256, c_z=128, heads=8, pair_heads=4, head_size=32, depth=48, sequences=128)
