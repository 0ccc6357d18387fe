"""RCMHA (089): attention on convolved queries, keys and values, with relative scores.

Keeps    while decoding: keys and values, and the last kappa-1 rows of q, k, v before convolution.
Form     in the dtype of the inputs; softmax sums fp32.
Bytes    parameters: 3*E*kappa for the kernels, E*E + 2*E for relative positions, beside those of
         nn.MultiheadAttention. Decode state: b*B*(2*m*E + 3*(kappa-1)*E) after m tokens. Scores
         B*H*n*m as attention without a fused kernel has them, and B*H*n*(m+1) of relative ones,
         which backward does not keep; nothing of n*n*d.
Source   Sugiharto, Aradea, Mubarok, "RCMHA: Relative Convolutional Multi-Head Attention for Natural
         Language Modelling", 2023; the convolutions are of So, Manke, Liu, Dai, Shazeer, Le,
         "Primer: Searching for Efficient Transformers for Language Modeling", 2021, the scores of
         Dai, Yang, Yang, Carbonell, Le, Salakhutdinov, "Transformer-XL: Attentive Language Models
         beyond a Fixed-Length Context", 2019. No code was read.
Departs  padding is zero before it is convolved, as what lies before the first token is. Kernels
         start at random: from the identity, small byte models did not gain by them.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import UsageError


@dataclass
class RCMHAState:
    """What a causal module keeps between calls; updated in place by `forward`.

    keys, values: (B,H,m,d), convolved. rows: (B,kappa-1,3*E), the last ones before convolution.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    rows: Tensor | None = None

    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.keys, self.values, self.rows) if x is not None)


class RCMHA(nn.Module):
    """Self-attention with the parameters of `nn.MultiheadAttention(batch_first=True)` and more.

    Args:
        embed_dim: E, width of inputs and output.
        num_heads: H.
        kernel_size: kappa, rows that one convolved row is made of.
        causal: rows see none that come later, neither by convolution nor by attention; otherwise
            kernels are centred.
        bias: of the projections.

    Raises:
        UsageError: embed_dim that heads do not divide or that is odd, a kernel below 1, or one of
            even size that would be centred.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int = 3,
        *,
        causal: bool = True,
        bias: bool = True,
    ):
        super().__init__()
        if embed_dim % num_heads or embed_dim % 2:
            raise UsageError(
                f"embed_dim={embed_dim} must be even and a multiple of num_heads={num_heads}"
            )
        if kernel_size < 1:
            raise UsageError(f"kernel_size={kernel_size} reads no row; use 1 or more")
        if not causal and kernel_size % 2 == 0:
            raise UsageError(
                f"kernel_size={kernel_size} has no centre; without causal it must be odd"
            )
        self.embed_dim, self.num_heads, self.causal = embed_dim, num_heads, causal
        self.kernel_size = kernel_size
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.kernels = nn.Parameter(torch.empty(3 * embed_dim, 1, kernel_size))
        self.relative = nn.Linear(embed_dim, embed_dim, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(num_heads, embed_dim // num_heads))
        self.position_bias = nn.Parameter(torch.zeros(num_heads, embed_dim // num_heads))
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.relative.weight)
        nn.init.uniform_(self.kernels, -(kernel_size**-0.5), kernel_size**-0.5)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        state: RCMHAState | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`, for one sequence.

        Args:
            query, key, value: (B,n,E), rows of the same positions; mostly the same tensor.
            key_padding_mask: (B,m) bool, True for padding.
            need_weights: whether to return the weights.
            attn_mask: (n,m) or (B*H,n,m); bool, True where a query does not see a key, or floating,
                added to the scores.
            average_attn_weights: over heads.
            is_causal: accepted for the signature's sake; the module is causal by itself or not.
            state: of earlier calls; the n rows follow the m-n that it holds.

        Returns:
            (B,n,E), and the weights (B,n,m), or (B,H,n,m) of each head, or None.

        Raises:
            UsageError: shapes that do not go together; a state or is_causal without `causal`.
        """
        self._check(query, key, value, key_padding_mask, is_causal, state)
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if query is key is value:
            rows = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        else:
            given = zip((query, key, value), weights, biases, strict=True)
            rows = torch.cat([F.linear(*one) for one in given], -1)
        n = query.shape[1]
        if key_padding_mask is not None:
            rows = rows.masked_fill(key_padding_mask[:, -n:, None], 0)
        rows = self._convolve(rows, state)
        q, k, v = rows.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if state is not None:
            if state.keys is not None:
                k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
            # Slices would keep alive all that the projection made.
            state.keys, state.values = k.contiguous(), v.contiguous()
        p = self._weights(q, k, attn_mask, key_padding_mask)
        out = self.out_proj((p @ v).transpose(1, 2).flatten(2))
        if not need_weights:
            return out, None
        return out, p.mean(1) if average_attn_weights else p

    def _convolve(self, rows: Tensor, state: RCMHAState | None) -> Tensor:
        """(B,n,3*E): each channel with its own kernel along time."""
        before = self.kernel_size - 1 if self.causal else self.kernel_size // 2
        if state is not None and state.rows is not None:
            rows = torch.cat([state.rows, rows], 1)
        else:
            rows = F.pad(rows, (0, 0, before, 0 if self.causal else before))
        if state is not None:
            state.rows = rows[:, rows.shape[1] - before :].clone()
        return F.conv1d(rows.mT, self.kernels, groups=rows.shape[-1]).mT

    def _weights(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None
    ) -> Tensor:
        """Probabilities (B,H,n,m)."""
        n, m = q.shape[2], k.shape[2]
        # Causal rows meet distances m-1 to 0, others also negative ones.
        last = -1 if self.causal else -n
        distances = torch.arange(m - 1, last - 1, -1, device=q.device)
        places = sinusoids(distances, self.embed_dim).to(q.dtype)
        matrix = self.relative.weight.unflatten(0, (self.num_heads, -1))  # (H,d,E)
        scale = q.shape[-1] ** -0.5
        moved = (q + self.position_bias[:, None]) * scale
        if n * self.num_heads < self.embed_dim:
            # For few queries it is less work to project them than all distances.
            relative = (moved @ matrix) @ places.T
        else:
            relative = moved @ (matrix @ places.T)
        scores = ((q + self.content_bias[:, None]) * scale) @ k.mT
        scores += relative_shift(relative, m)
        if attn_mask is not None and attn_mask.is_floating_point():
            scores += self._by_head(attn_mask, q)
        hidden = None
        if self.causal and n > 1:
            hidden = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
        if attn_mask is not None and not attn_mask.is_floating_point():
            more = self._by_head(attn_mask, q)
            hidden = more if hidden is None else hidden | more
        if padding is not None:
            hidden = padding[:, None, None] if hidden is None else hidden | padding[:, None, None]
        if hidden is None:
            return scores.softmax(-1)
        # A row of padding may see nothing: its weights are 0, not NaN.
        p = scores.masked_fill_(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        return p if padding is None else p.masked_fill(hidden, 0)

    def _by_head(self, mask: Tensor, q: Tensor) -> Tensor:
        return mask.view(*q.shape[:2], *mask.shape[1:]) if mask.dim() == 3 else mask

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, is_causal: bool,
        state: RCMHAState | None,
    ) -> None:  # fmt: skip
        if query.dim() != 3 or query.shape[-1] != self.embed_dim:
            raise UsageError(f"query is {tuple(query.shape)}; expected (B,n,{self.embed_dim})")
        if not query.shape == key.shape == value.shape:
            raise UsageError(
                f"query {tuple(query.shape)}, key {tuple(key.shape)} and value "
                f"{tuple(value.shape)} differ; distances are between rows of one sequence"
            )
        if not self.causal and (state is not None or is_causal):
            raise UsageError("a state and is_causal need RCMHA(..., causal=True)")
        held = 0 if state is None or state.keys is None else state.keys.shape[2]
        if padding is not None and padding.shape != (len(query), held + query.shape[1]):
            raise UsageError(
                f"key_padding_mask is {tuple(padding.shape)}; expected "
                f"{(len(query), held + query.shape[1])}, with what the state holds"
            )


def sinusoids(distances: Tensor, width: int) -> Tensor:
    """(P,) integers -> (P,width) fp32: sines, then cosines."""
    rates = torch.arange(0, width, 2, device=distances.device) * (-math.log(1e4) / width)
    angles = distances[:, None] * rates.exp()
    return torch.cat([angles.sin(), angles.cos()], 1)


def relative_shift(scores: Tensor, m: int) -> Tensor:
    """Scores by distance to scores by key, without a copy.

    Args:
        scores: (B,H,n,P); column c is for distance m-1-c between the last query and a key. P is
            n+m, or m+1 where keys after a query, of which the result says nothing, do not count.
        m: keys; the last query is at the last key's place.

    Returns:
        (B,H,n,m).
    """
    n, p = scores.shape[2:]
    # Query i is n-1-i places before the last one, so its row starts that much further right.
    flat = scores.flatten(2)[..., n - 1 : n - 1 + n * (p - 1)]
    return flat.unflatten(2, (n, p - 1))[..., :m]


def relative_scores_ref(
    q: Tensor, k: Tensor, relative: Tensor, content_bias: Tensor, position_bias: Tensor
) -> Tensor:
    """Scores (B,H,n,m) before scaling, pair by pair.

    Args:
        q, k: (B,H,n,d) and (B,H,m,d).
        relative: (H,n+m,d), for distances m-1 to -n.
        content_bias, position_bias: (H,d).
    """
    n, m = q.shape[2], k.shape[2]
    scores = q.new_empty(*q.shape[:3], m)
    for i in range(n):
        for j in range(m):
            distance = m - n + i - j
            r = relative[:, m - 1 - distance]
            scores[:, :, i, j] = ((q[:, :, i] + content_bias) * k[:, :, j]).sum(-1)
            scores[:, :, i, j] += ((q[:, :, i] + position_bias) * r).sum(-1)
    return scores
