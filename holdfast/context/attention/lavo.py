"""LAVO (047): causal attention over a local window and an orthogonal memory of fixed size.

Keeps    keys and values of the running window, the mean of its inputs, and for each head r
         coefficients: the mean, over all finished windows, of tokens in an orthonormal basis.
Form     window in the dtype of the inputs; means fp32; one basis for all heads, a parameter.
Bytes    state: 2*b*B*H*w*d + 4*B*H*(r + d), at any length. A sequence has B*H*n*(w + r) logits, of
         which none is kept.
Source   Zhang, Jiang, Feng, Zheng, Kong, "Linear Attention via Orthogonal Memory", 2023; no code
         was found. What a memory slot is, is chosen here: the mean coefficient times its basis row.
Departs  relative positions are one bias per head and distance inside a window. The running window
         is averaged before it is projected, which is the same and costs one projection per window;
         that mean is what the state holds beside the coefficients.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from holdfast.context.kernels import attention_with_lse, merge_lse
from holdfast.context.masks import Causal
from holdfast.errors import UsageError


@dataclass
class LavoState:
    """What a layer keeps of the past; `forward` updates it in place.

    keys, values: (B,H,w,d), of which the first `seen % w` are the running window's.
    running: (B,H*d) fp32, the mean of the running window's inputs.
    coefficients: (B,H,r) fp32, means over finished windows.
    seen: tokens read.
    """

    keys: Tensor
    values: Tensor
    running: Tensor
    coefficients: Tensor
    seen: int = 0

    def nbytes(self) -> int:
        held = (self.keys, self.values, self.running, self.coefficients)
        return sum(x.nbytes for x in held)


class _Orthonormal(nn.Module):
    """(r,d) -> orthonormal rows that span the same space, in fp32 or fp64."""

    def forward(self, weight: Tensor) -> Tensor:
        basis, upper = torch.linalg.qr(weight.mT.to(_wide(weight)))
        # QR leaves signs open; with a positive diagonal the basis is a smooth function.
        return (basis * upper.diagonal().sign()).mT

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class LavoAttention(nn.Module):
    """Attention of each token to its window so far and to r rows that hold all before the window.

    Args:
        embed_dim: E, width of inputs and outputs.
        num_heads: H; heads are d = E / H wide.
        memory: r, rows of the memory, at most d.
        window: w, tokens per window.

    Raises:
        UsageError: embed_dim that heads do not divide, memory outside 1 to d, window below 1.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, memory: int = 64, window: int = 128):
        super().__init__()
        if embed_dim % num_heads:
            raise UsageError(f"embed_dim={embed_dim} is no multiple of num_heads={num_heads}")
        size = embed_dim // num_heads
        if not 1 <= memory <= size:
            raise UsageError(
                f"memory={memory} rows cannot be orthogonal in heads of {size}; use 1 to {size}, "
                "or fewer heads"
            )
        if window < 1:
            raise UsageError(f"window={window} holds no token; use 1 or more")
        self.embed_dim, self.num_heads, self.window = embed_dim, num_heads, window
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.context = nn.Linear(embed_dim, embed_dim, bias=False)
        self.out = nn.Linear(embed_dim, embed_dim, bias=False)
        self.distances = nn.Parameter(torch.zeros(num_heads, window))
        self.basis = nn.Parameter(torch.empty(memory, size))
        nn.init.orthogonal_(self.basis)
        parametrize.register_parametrization(self, "basis", _Orthonormal(), unsafe=True)

    def forward(self, x: Tensor, state: LavoState | None = None) -> tuple[Tensor, LavoState]:
        """Read n more tokens: x (B,n,E) -> (B,n,E), and the state after them.

        Args:
            x: of any length n >= 1.
            state: of the tokens before; None is none. It is updated in place and returned; no
                gradient flows into it.

        Raises:
            UsageError: x of another width or, with a state, of another number of rows.
        """
        if x.dim() != 3 or x.shape[-1] != self.embed_dim or not x.shape[1]:
            raise UsageError(f"x is {tuple(x.shape)}; expected (B,n,{self.embed_dim}), n >= 1")
        state = self.new_state(x) if state is None else state
        if len(x) != len(state.keys):
            raise UsageError(
                f"x has {len(x)} rows and the state {len(state.keys)}; they must agree"
            )
        basis, w = self.basis, self.window
        room = -state.seen % w
        # Less than a window is read as its beginning, not padded to all of it.
        room = w if room == 0 and x.shape[1] < w else room
        parts = [self._read_running(x[:, :room], state, basis)] if room else []
        if x.shape[1] > room:
            parts.append(self._read_windows(x[:, room:], state, basis))
        return self.out(torch.cat(parts, 1)), state

    def new_state(self, x: Tensor) -> LavoState:
        """Of nothing read yet, for inputs like x (B,n,E)."""
        b, heads, size, wide = len(x), self.num_heads, self.embed_dim // self.num_heads, _wide(x)
        return LavoState(
            keys=x.new_zeros(b, heads, self.window, size),
            values=x.new_zeros(b, heads, self.window, size),
            running=x.new_zeros(b, self.embed_dim, dtype=wide),
            coefficients=x.new_zeros(b, heads, self.basis.shape[0], dtype=wide),
        )

    def compress(self, context: Tensor) -> Tensor:
        """The memory (B,H,r,d) of a whole context (B,m,E), for `cross`."""
        basis = self.basis
        means = context.mean(1, dtype=_wide(context))
        return memory_rows(self._project(means, basis), basis).to(context.dtype)

    def cross(self, x: Tensor, memory: Tensor) -> Tensor:
        """Attention of x (B,n,E) to a static memory, as `compress` gives it: (B,n,E)."""
        q = F.linear(x, self.qkv.weight[: self.embed_dim])
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.out(attention_with_lse(q, memory, memory)[0].transpose(1, 2).flatten(2))

    def _read_windows(self, x: Tensor, state: LavoState, basis: Tensor) -> Tensor:
        """Tokens from a window's start on, all windows side by side: (B,n,E)."""
        (b, n), w = x.shape[:2], self.window
        before, full = state.seen // w, n // w
        q, k, v = self._qkv(F.pad(x, (0, 0, 0, -n % w)))
        windows = q.shape[2] // w
        means = x[:, : full * w].unflatten(1, (full, w)).mean(2, dtype=_wide(x))
        # Sums of means, not of tokens, so that they stay small however long the text is.
        found = self._project(means, basis)  # (B,f,H,r)
        sums = torch.cat([state.coefficients[:, None] * before, found], 1).cumsum(1)
        finished = torch.arange(before, before + full + 1, device=x.device)
        averages = sums / finished.clamp(min=1)[:, None, None]
        rows = memory_rows(averages[:, :windows], basis).flatten(0, 1).to(x.dtype)
        exists = (finished[:windows] > 0).repeat(b).view(-1, 1, 1, 1)
        folded = (y.unflatten(2, (windows, w)).transpose(1, 2).flatten(0, 1) for y in (q, k, v))
        out = self._attend(*folded, rows, exists)
        with torch.no_grad():
            state.seen += n
            state.coefficients.copy_(averages[:, full])
            if rest := n - full * w:
                state.keys[:, :, :rest] = k[:, :, full * w : n]
                state.values[:, :, :rest] = v[:, :, full * w : n]
                state.running.copy_(x[:, full * w :].mean(1, dtype=_wide(x)))
        return out.unflatten(0, (b, windows)).transpose(2, 3).flatten(1, 2).flatten(2)[:, :n]

    def _read_running(self, x: Tensor, state: LavoState, basis: Tensor) -> Tensor:
        """Tokens of the running window, at most all that it lacks: (B,n,E)."""
        n, w, held, before = x.shape[1], self.window, state.seen % self.window, state.seen
        q, k, v = self._qkv(x)
        keys = torch.cat([state.keys[:, :, :held], k], 2)
        values = torch.cat([state.values[:, :, :held], v], 2)
        # Backward needs these coefficients, which are about to change.
        rows = memory_rows(state.coefficients.clone(), basis).to(x.dtype) if before >= w else None
        out = self._attend(q, keys, values, rows)
        with torch.no_grad():
            state.seen += n
            state.keys[:, :, held : held + n] = k
            state.values[:, :, held : held + n] = v
            state.running += (x.sum(1, dtype=_wide(x)) - n * state.running) / (held + n)
            if held + n == w:
                found = self._project(state.running, basis)
                state.coefficients += (found - state.coefficients) / (before // w + 1)
        return out.transpose(1, 2).flatten(2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, exists: Tensor | None = None
    ) -> Tensor:
        """One softmax over a window and the memory, whose rows are keys and values alike.

        q (N,H,n,d) are at the last places of k and v; rows (N,H,r,d), None without a memory;
        exists (N,1,1,1) bool, None where all have one.
        """
        n, m = q.shape[2], k.shape[2]
        i, j = torch.arange(m - n, m, device=q.device), torch.arange(m, device=q.device)
        bias = self.distances[:, (i[:, None] - j).clamp(min=0)].to(q.dtype)
        near = attention_with_lse(q, k, v, mask=Causal(m - n), bias=bias)
        if rows is None:
            return near[0]
        return merge_lse([near, attention_with_lse(q, rows, rows, mask=exists)])[0]

    def _qkv(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def _project(self, means: Tensor, basis: Tensor) -> Tensor:
        """Means of inputs (...,E) -> coefficients (...,H,r)."""
        tokens = F.linear(means, self.context.weight.to(means.dtype))
        return tokens.unflatten(-1, (self.num_heads, -1)) @ basis.mT


def memory_rows(coefficients: Tensor, basis: Tensor) -> Tensor:
    """(...,r) and an orthonormal basis (r,d) -> (...,r,d): rows orthogonal to each other."""
    return coefficients[..., None] * basis


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def lavo_ref(attention: LavoAttention, x: Tensor) -> Tensor:
    """`attention(x)` token by token, from all tokens before and without a state."""
    w, (b, n) = attention.window, x.shape[:2]
    q, k, v = attention._qkv(x)
    tokens = attention.context(x).unflatten(-1, (attention.num_heads, -1))
    coefficients = tokens.to(_wide(x)) @ attention.basis.mT
    out = torch.empty(b, n, attention.num_heads, q.shape[-1], dtype=x.dtype, device=x.device)
    for t in range(n):
        start = t // w * w
        keys, values = k[:, :, start : t + 1], v[:, :, start : t + 1]
        bias = attention.distances[:, : t - start + 1].flip(1)
        if start:
            memory = memory_rows(coefficients[:, :start].mean(1), attention.basis).to(x.dtype)
            keys, values = torch.cat([keys, memory], 2), torch.cat([values, memory], 2)
            bias = F.pad(bias, (0, memory.shape[2]))
        scores = (keys @ q[:, :, t, :, None])[..., 0] * q.shape[-1] ** -0.5 + bias
        out[:, t] = (scores.softmax(-1)[:, :, None] @ values)[:, :, 0]
    return attention.out(out.flatten(2))
