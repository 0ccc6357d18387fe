"""LoRS (063): LoRA for a pruned model that keeps its zeros and does not pay for the mask.

Keeps    per linear (m, n) A (r, n) and B (m, r), trained. For backward x alone: which weights are
         zero, and the weight with the adapter in it, are worked out again in tiles of `TILE`
         elements. With `pattern`, the places that may be nonzero.
Form     A and B in the dtype of the weight, or `dtype`; places one bit each.
Bytes    r * (m + n) trained elements; t * n activations for t tokens, shared with whatever else
         keeps x; m * ceil(n / 8) bytes of places with `pattern`, else none.
Source   Hu, Zhang, Hu, Zhang, Chen, Chen, Huang, LoRS: efficient low-rank adaptation for sparse
         large language model, 2025; what the authors' code does, from a description of it.
Departs  gradients keep the factor alpha / sqrt(rank), which the authors leave to the learning rate.
         The randomised SVD of the mean gradient is worked out by passes over the batches, so that
         no dense gradient exists. A merged weight that would round to zero keeps the smallest
         normal number, so that a pruned model never gains zeros. Packed weights are refused:
         rounding makes zeros that no one pruned.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from holdfast.errors import UsageError
from holdfast.forms.bits import pack, packed_nbytes, unpack
from holdfast.forms.packed import Packed
from holdfast.plan.method import Method
from holdfast.training.adapters.base import Adapter, attach, attached, layers

TILE = 1 << 22
# Of the randomised SVD: columns for each wanted one, and rounds that sharpen them.
OVERSAMPLE, ROUNDS = 4, 4
Pattern = tuple[int, int]


def _spans(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


class _Sparse:
    """The weight (m, n) with the adapter in it, a tile at a time: (W + scale B A) where W is."""

    def __init__(self, layer: "LoRS", weight: Tensor, a: Tensor, b: Tensor):
        self.w = weight.mT if layer.transposed else weight
        self.a, self.b = a.to(weight.dtype), b.to(weight.dtype)
        self.transposed, self.scale, self.places = layer.transposed, layer.scale, layer.places

    def rows(self) -> Iterator[slice]:
        # Products of 64 rows and more come out bit for bit as those of the whole weight.
        return _spans(self.w.shape[0], max(1, TILE // self.w.shape[1] // 64) * 64)

    def columns(self) -> Iterator[slice]:
        # Packed places start on a byte.
        return _spans(self.w.shape[1], max(1, TILE // self.w.shape[0] // 8) * 8)

    def tile(self, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        a, b = self.a[:, columns], self.b[rows]
        if self.transposed:  # stored as the weight is, so that a product takes the same path
            tile = torch.addmm(self.w[rows, columns].mT, a.mT, b.mT, alpha=self.scale).mT
        else:
            tile = torch.addmm(self.w[rows, columns], b, a, alpha=self.scale)
        return self.drop_(tile, rows, columns)

    def drop_(
        self, tile: Tensor, rows: slice = slice(None), columns: slice = slice(None)
    ) -> Tensor:
        """Zero what is not among the places of a tile, in place."""
        if self.places is None:
            return tile.masked_fill_(self.w[rows, columns] == 0, 0)
        width = tile.shape[1]
        first = (columns.start or 0) // 8
        part = self.places[rows, first : first + packed_nbytes(width, 1)]
        return tile.masked_fill_(unpack(part, 1, width) == 0, 0)


class _SparseLinear(torch.autograd.Function):
    """x (t, n), W as stored, A (r, n), B (m, r), bias (m,) or None -> (t, m); keeps x."""

    @staticmethod
    def forward(ctx, x, weight, a, b, bias, layer):
        ctx.layer = layer
        ctx.save_for_backward(x, weight, a, b)
        sparse = _Sparse(layer, weight, a, b)
        parts = list(sparse.rows())
        if len(parts) == 1:
            return F.linear(x, sparse.tile().to(x.dtype), bias)
        y = x.new_empty(len(x), len(b))
        for rows in parts:
            part = None if bias is None else bias[rows]
            y[:, rows] = F.linear(x, sparse.tile(rows).to(x.dtype), part)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, a, b = ctx.saved_tensors
        layer = ctx.layer
        if layer.watch is not None:
            layer.watch(x, g)
        sparse = _Sparse(layer, weight, a, b)
        gx: Any = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        needs_adapter = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        ga: Any = None
        gb: Any = None
        if needs_adapter and layer.exact_grad:
            ga, gb = torch.empty_like(a), torch.zeros_like(b)
        for columns in sparse.columns():
            if gx is not None:
                torch.mm(g, sparse.tile(columns=columns).to(g.dtype), out=gx[:, columns])
            if ga is not None:
                gw = sparse.drop_((g.mT @ x[:, columns]).to(a.dtype), columns=columns)
                ga[:, columns] = layer.scale * (b.mT @ gw)
                gb.addmm_(gw, a[:, columns].mT, alpha=layer.scale)
        if needs_adapter and not layer.exact_grad:
            # Without the mask the gradient of W is gT x, which these products never form.
            ga = ((g @ b.to(g.dtype)).mT @ x).to(a.dtype).mul_(layer.scale)
            gb = (g.mT @ (x @ a.to(x.dtype).mT)).to(b.dtype).mul_(layer.scale)
        gbias = g.sum(0) if ctx.needs_input_grad[4] else None
        return gx, None, ga, gb, gbias, None


class LoRS(Adapter):
    """y = ((W + alpha / sqrt(rank) B A) where W is not zero) x + b; B starts at zero.

    A starts as in `nn.Linear` (global generator); `gradient_init` gives it a better start. The
    gradients of A and B are those of an adapter without the mask, unless `exact_grad`. In a file,
    adapter_config.json has `peft_type` "LORS", so that no program takes it for a plain LoRA, whose
    merge would fill the zeros; `places` says which weights the merge may change.

    Args:
        rank: rows of A.
        alpha: scale times sqrt(rank); None is a scale of 1.
        pattern: (N, M) for weights with at most N nonzeros in every M neighbours of a row: their N
            places are kept as bits. Without it, a place is where W is not zero.
        exact_grad: mask the gradient of W before it goes to A and B; needs (m, n) products.
        dtype: of A and B; None is the weight's.

    Raises:
        UsageError: rank below 1, a packed weight, a pattern that the weight does not have.
    """

    key = "lors"
    trainable = ("lora_A", "lora_B")
    places: Tensor | None

    def __init__(
        self,
        linear: nn.Module,
        *,
        rank: int = 8,
        alpha: float | None = None,
        pattern: Pattern | None = None,
        exact_grad: bool = False,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(linear)
        if rank < 1:
            raise UsageError(f"rank={rank} trains nothing; use 1 or more, for example 8")
        _check(linear, "this linear")
        self.rank, self.exact_grad = rank, exact_grad
        self.scale = 1.0 if alpha is None else alpha / math.sqrt(rank)
        self.watch: Any = None
        like: dict[str, Any] = {"device": self.weight.device, "dtype": dtype or self.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        weight = self.weight.detach()
        places = places_of(weight.mT if self.transposed else weight, pattern) if pattern else None
        # W tells them again, so they are no part of a checkpoint.
        self.register_buffer("places", places, persistent=False)

    @classmethod
    def shared(cls, model: nn.Module, linears: Mapping[str, nn.Module], **knobs: Any) -> dict:
        for name, linear in linears.items():
            _check(linear, name)
        weights = {name: linear.get_parameter("weight") for name, linear in linears.items()}
        if dense := [n for n, w in weights.items() if _has_values(w) and bool((w != 0).all())]:
            warnings.warn(
                f"{', '.join(dense[:3])} ({len(dense)} in all) have no zeros to keep; "
                "prune the model first, or use 'lora', which is faster on dense weights",
                stacklevel=3,
            )
        return {}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> (..., m).

        Raises:
            UsageError: the weight asks for a gradient.
        """
        if self.weight.requires_grad and torch.is_grad_enabled():
            raise UsageError(
                f"the weight ({self.out_features}, {self.in_features}) under LoRS requires a "
                "gradient, which LoRS does not compute; weight.requires_grad_(False), or merge "
                "and train the model whole"
            )
        kind = x.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        flat = x.reshape(-1, self.in_features)
        flat = flat.to(torch.get_autocast_dtype(kind)) if autocast else flat
        bias = self.bias.to(flat.dtype) if self.bias is not None else None
        y = _SparseLinear.apply(flat, self.weight, self.lora_A, self.lora_B, bias, self)
        return y.view(*x.shape[:-1], self.out_features)

    def delta(self) -> Tensor:
        update = self.scale * (self.lora_B.detach().float() @ self.lora_A.detach().float())
        return _Sparse(self, self.weight.detach(), self.lora_A, self.lora_B).drop_(update)

    def merged(self) -> nn.Module:
        was_zero = self.weight.detach() == 0
        linear = super().merged()
        if self.places is None:
            weight = linear.get_parameter("weight").detach()
            gone = (weight == 0) & ~was_zero
            weight.masked_fill_(gone, torch.finfo(weight.dtype).tiny)
        return linear

    @classmethod
    def to_file(cls, knobs: Mapping[str, Any]) -> dict[str, Any]:
        pattern = knobs["pattern"]
        return {
            "peft_type": "LORS",
            "r": knobs["rank"],
            "lora_alpha": math.sqrt(knobs["rank"]) if knobs["alpha"] is None else knobs["alpha"],
            "use_rslora": True,
            "places": "nonzero" if pattern is None else f"{pattern[0]}:{pattern[1]}",
            "exact_grad": knobs["exact_grad"],
        }

    @classmethod
    def from_file(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        places = config["places"]
        kept, of = (0, 0) if places == "nonzero" else map(int, places.split(":"))
        return {
            "rank": config["r"],
            "alpha": config["lora_alpha"],
            "pattern": (kept, of) if of else None,
            "exact_grad": config["exact_grad"],
        }


def places_of(weight: Tensor, pattern: Pattern) -> Tensor:
    """The places of an N:M pattern, one bit each: weight (m, n) -> (m, ceil(n / 8)) uint8.

    Where fewer than N of M neighbours are nonzero, the first zeros fill the count: which of them
    was kept and then rounded to zero cannot be told.

    Raises:
        UsageError: M does not divide n, or some M neighbours have more than N nonzeros.
    """
    kept, of = pattern
    if not 0 < kept <= of or weight.shape[1] % of:
        raise UsageError(
            f"pattern={pattern} of a weight with {weight.shape[1]} inputs; expected (N, M) with "
            "N of M nonzero, for example (2, 4), and M a divisor of the inputs"
        )
    groups = (weight != 0).unflatten(1, (-1, of))
    if _has_values(weight) and int(most := groups.sum(2).max()) > kept:
        raise UsageError(
            f"pattern={pattern}, but some {of} neighbours have {int(most)} nonzeros; prune to the "
            "pattern first, or leave the pattern out"
        )
    # A stable sort puts nonzeros first and leaves the rest in reading order.
    order = groups.to(torch.uint8).argsort(dim=2, descending=True, stable=True)
    places = torch.zeros_like(groups, dtype=torch.uint8)
    return pack(places.scatter_(2, order[..., :kept], 1).flatten(1), 1)


def gradient_init(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> nn.Module:
    """Start every A at the top right singular vectors of the mean gradient of its weight, in place.

    Takes `2 * ROUNDS + 2` passes over the batches and holds per linear a matrix of
    `OVERSAMPLE * rank` times the larger side. Runs in evaluation mode, so that the passes agree.

    Args:
        model: has the adapter `lors`, with B at zero.
        batches: keyword arguments of the model, which returns a loss.
        seed: of the first random matrices.

    Raises:
        UsageError: another adapter, no batches, or an adapter that has trained already.
    """
    from holdfast.plan.models import loss_of

    adapted: dict[str, Any] = layers(model)
    key = attached(model).cls.key
    if key != "lors" or not batches:
        raise UsageError(
            f"gradient_init got the adapter {key!r} and {len(batches)} batches; it needs "
            "attach(model, 'lors') and at least one batch"
        )
    if any(bool(layer.lora_B.any()) for layer in adapted.values()):
        raise UsageError("the adapter has trained already: B is not zero; start from a fresh one")
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    current: dict[str, Tensor] = {}
    for name, layer in adapted.items():
        size = min(OVERSAMPLE * layer.rank, layer.in_features, layer.out_features)
        drawn = torch.randn(layer.in_features, size, generator=generator)
        current[name] = drawn.to(layer.lora_A.device)
    was_training = model.training
    model.eval()
    try:
        for step in range(2 * ROUNDS + 2):
            found: dict[str, Tensor] = {}
            for name, layer in adapted.items():
                rows = layer.in_features if step % 2 else layer.out_features
                found[name] = current[name].new_zeros(rows, current[name].shape[1])
                layer.watch = _Product(current[name], found[name], transposed=step % 2 == 1)
            for batch in batches:
                loss = loss_of(model(**batch))
                # Not backward(): an optimizer may step in hooks of the parameters.
                torch.autograd.grad(loss, trained, allow_unused=True)
            if step < 2 * ROUNDS + 1:
                current = {name: torch.linalg.qr(y).Q for name, y in found.items()}
    finally:
        model.train(was_training)
        for layer in adapted.values():
            layer.watch = None
    with torch.no_grad():
        for name, layer in adapted.items():
            right = torch.linalg.svd(found[name], full_matrices=False).U.mT[: layer.rank]
            layer.lora_A[: len(right)] = right
    return model


class _Product:
    """Adds up G q, or G^T q, over calls of a linear; G = g^T x is the gradient of its weight."""

    def __init__(self, q: Tensor, total: Tensor, transposed: bool):
        self.q, self.total, self.transposed = q, total, transposed

    def __call__(self, x: Tensor, g: Tensor) -> None:
        left, right = (x, g) if self.transposed else (g, x)
        self.total.addmm_(left.float().mT, right.float() @ self.q)


def _has_values(tensor: Tensor) -> bool:
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def _check(linear: nn.Module, name: str) -> None:
    if isinstance(linear._parameters["weight"], Packed):
        raise UsageError(
            f"the weight of {name} is {linear.weight.form}: rounding makes zeros that no one "
            "pruned; attach LoRS to the dense pruned model"
        )


ADAPTER = LoRS


def _apply(model: nn.Module, *, rank: int, init: str) -> nn.Module:
    return attach(model, "lors", rank=rank)


def _calibrate(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], *, rank: int, init: str
) -> None:
    if init == "gradient":
        gradient_init(model, batches)


METHOD = Method(
    key="lors",
    slot="adapter",
    writes={("parameters", "extent"): "all; two thin matrices a linear train, zeros stay"},
    apply=_apply,
    calibrate=_calibrate,
    knobs={"rank": (8, 16, 32, 64), "init": ("gradient", "kaiming")},
    automatic=False,
)
