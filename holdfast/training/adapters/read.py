"""READ (085): a small recurrent net over depth corrects a frozen backbone's last states.

Keeps    for backward, per stack: the normalised output of each of L blocks and the net's L states;
         nothing inside the backbone, which runs without gradients. Trained: the net, and the head
         where its weight is its own.
Form     the dtype of the backbone.
Bytes    L*N*(d + h) + N*h elements for N tokens, and N*d for a head that trains. Parameters per
         stack: GRU 3h(d + h) + 6h, output (h + 1)*d, norm d, whatever the depth.
Source   Nguyen, Wang, Malik, Chen, Chen, Tan, Lin and others, "READ: Recurrent Adaptation of Large
         Transformers", 2023.
Departs  the correction joins behind the stack's own final norm, so that no norm is differentiated.
         In an encoder-decoder the decoder reads uncorrected encoder states; the encoder's net has
         no output, its mean state over the source is where the decoder's net starts. The gates are
         computed again in backward instead of kept.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from holdfast import attach
from holdfast.errors import HoldfastError, UsageError
from holdfast.files import write_tensors
from holdfast.plan.method import Method, Quality

FILE = "read.safetensors"
# Shorter spans would leave a processor idle.
LEAST_SPAN = 256


def _cell(x, before, norm, w_ih, w_hh, b_ih, b_hh) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of a GRU on x * norm: (reset, update, candidate, W_hn h + b_hn), each (N,h)."""
    given = F.linear(x, w_ih * norm, b_ih).chunk(3, 1)
    held = F.linear(before, w_hh, b_hh).chunk(3, 1)
    reset = torch.sigmoid(given[0] + held[0])
    update = torch.sigmoid(given[1] + held[1])
    return reset, update, torch.tanh(given[2] + reset * held[2]), held[2]


class _OverDepth(torch.autograd.Function):
    """x (L,N,d), start (B,h), norm (d,), GRU weights -> the mean of the L states, (N,h).

    Keeps x, the states and `start`; each of B sequences has N/B tokens that start alike.
    """

    @staticmethod
    def forward(ctx, x, start, *weights):
        states = x.new_empty(*x.shape[:2], weights[2].shape[1])
        for span, sequence in _spans(x, start):
            before = start[sequence]
            for layer, state in zip(x[:, span], states[:, span], strict=True):
                _, update, candidate, _ = _cell(layer, before, *weights)
                before = torch.lerp(candidate, before, update, out=state)
        ctx.save_for_backward(x, start, states, *weights)
        return states.mean(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, start, states, *weights = ctx.saved_tensors
        norm, w_ih, w_hh = weights[:3]
        g_start, g_in, g_hh = (torch.zeros_like(t) for t in (start, w_ih, w_hh))
        g_given, g_held = (torch.zeros_like(b) for b in weights[3:])
        for span, sequence in _spans(x, start):
            per_state = g[span] / len(x)
            carried = torch.zeros_like(per_state)
            for i in range(len(x) - 1, -1, -1):
                before = states[i - 1, span] if i else start[sequence]
                reset, update, candidate, held = _cell(x[i, span], before, *weights)
                gh = carried.add_(per_state)
                g_candidate = gh * (1 - update) * (1 - candidate.square())
                g_update = gh * (before - candidate) * update * (1 - update)
                g_reset = g_candidate * held * reset * (1 - reset)
                to_given = torch.cat([g_reset, g_update, g_candidate], 1)
                to_held = torch.cat([g_reset, g_update, g_candidate * reset], 1)
                g_in.addmm_(to_given.mT, x[i, span])
                g_hh.addmm_(to_held.mT, before)
                g_given += to_given.sum(0)
                g_held += to_held.sum(0)
                carried = torch.addmm(gh.mul_(update), to_held, w_hh)
            g_start.index_add_(0, sequence, carried)
        return None, g_start, (g_in * w_ih).sum(0), g_in * norm, g_hh, g_given, g_held


def _spans(x: Tensor, start: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of tokens, and which sequence each belongs to: gates exist for an eighth at once."""
    tokens = x.shape[1]
    step = max(LEAST_SPAN, -(-tokens // 8))
    for first in range(0, tokens, step):
        end = min(first + step, tokens)
        index = torch.arange(first, end, device=x.device)
        yield slice(first, end), index // (tokens // len(start))


class SideNet(nn.Module):
    """RMS norm, a GRU over depth, the mean of its states, and a linear that starts at zero.

    Args:
        width: d of the backbone.
        hidden: h.
        output: without it, the mean state is the answer.
        like: a tensor whose dtype and device the parameters take.
    """

    def __init__(self, width: int, hidden: int, output: bool, like: Tensor):
        super().__init__()
        place: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.norm = nn.Parameter(torch.ones(width, **place))
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden, width, **place))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden, hidden, **place))
        self.bias_ih = nn.Parameter(torch.empty(3 * hidden, **place))
        self.bias_hh = nn.Parameter(torch.empty(3 * hidden, **place))
        for parameter in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh):
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)
        self.hidden = hidden
        self.output = nn.Linear(hidden, width, **place) if output else None
        if self.output is not None:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def mean_state(self, x: Tensor, start: Tensor | None = None) -> Tensor:
        """Normalised states x (L,B,T,d), start (B,h) or zero -> (B,T,h)."""
        start = x.new_zeros(x.shape[1], self.hidden) if start is None else start
        weights = (self.norm, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return _OverDepth.apply(x.flatten(1, 2), start, *weights).view(*x.shape[1:3], -1)


class _Stack:
    """Runs a stack without gradients, collects what its blocks put out, and corrects the last."""

    def __init__(self, net: SideNet, count: int, is_encoder: bool, has_encoder: bool):
        self.net, self.count = net, count
        self.is_encoder, self.has_encoder = is_encoder, has_encoder
        self.states: Tensor | None = None

    def see(self, position: int, output: Any) -> None:
        x = (output[0] if isinstance(output, tuple) else output).detach()
        if self.states is None:
            self.states = x.new_empty(self.count, *x.shape)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        torch.div(x, length.clamp(min=1e-6), out=self.states[position])

    def __call__(self, forward, *args, **kwargs):
        with torch.no_grad():
            out = forward(*args, **kwargs)
        # Taken, not kept: the net's graph alone decides how long they live.
        states, self.states = self.states, None
        last = out if isinstance(out, Tensor) else out[0]
        if states is None or not isinstance(last, Tensor) or last.shape != states.shape[1:]:
            raise UsageError(
                "the module that holds the blocks must put out the corrected states as its first "
                f"result, in the shape of a block's output; it gave {type(last).__name__} "
                f"{tuple(getattr(last, 'shape', ()))}"
            )
        if self.is_encoder:
            # On the tensor itself: it reaches the decoder whichever way the model passes it on.
            source = _source_mean(self.net.mean_state(states), kwargs)
            last.read_start = source  # type: ignore[attr-defined]
            return out
        assert self.net.output is not None
        start = self._start(kwargs) if self.has_encoder else None
        corrected = last + self.net.output(self.net.mean_state(states, start))
        if isinstance(out, Tensor):
            return corrected
        if isinstance(out, tuple):
            return (corrected, *out[1:])
        out.last_hidden_state = corrected
        return out

    def _start(self, kwargs: dict[str, Any]) -> Tensor:
        start = getattr(kwargs.get("encoder_hidden_states"), "read_start", None)
        if start is None:
            raise UsageError(
                "the decoder was given encoder states that did not come from this model's encoder, "
                "as they are (beam search copies them); READ starts its net from these"
            )
        return start


def _source_mean(states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """(B,T,h) -> (B,h), over the tokens that a mask (B,T) among `kwargs` does not pad."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return states.mean(1)
    weight = mask.to(states.dtype)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
    return (weight[:, None] @ states).squeeze(1)


class _See:
    """A block's forward hook."""

    def __init__(self, stack: _Stack, position: int):
        self.stack, self.position = stack, position

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.see(self.position, output)


class READ(nn.Module):
    """Freezes `model` and attaches a side net to each of its stacks, in place, as `model.read`.

    The model is called as before. Only the nets train, and the head unless it shares its weight
    with the embeddings.

    Args:
        model: with one stack of blocks, or an encoder-decoder of Hugging Face.
        hidden: h of the recurrent nets.
        layers: which blocks of each stack the net reads, ascending; None is all.

    Raises:
        UsageError: no such stacks, `hidden` below 1, unknown layers, or an adapter is there.
    """

    def __init__(self, model: nn.Module, hidden: int = 256, layers: Iterable[int] | None = None):
        super().__init__()
        if "_holdfast_adapter" in model.__dict__ or hasattr(model, "read"):
            raise UsageError(f"{type(model).__name__} has an adapter already; detach it first")
        if hidden < 1:
            raise UsageError(f"hidden={hidden} has no state; use 1 or more, for example 256")
        self.hidden, self.layers = hidden, None if layers is None else sorted(set(layers))
        stacks = attach.blocks(model)
        paired = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        if len(stacks) != 1 + paired:
            raise UsageError(
                f"{type(model).__name__} has {len(stacks)} stacks of blocks; READ corrects one, or "
                "the two of an encoder-decoder"
            )
        encoder = model.get_encoder() if paired else None  # type: ignore[operator]
        self.nets = nn.ModuleDict()
        self._handle = attach.Handle()
        for path, stack in stacks:
            owner = model.get_submodule(path.rpartition(".")[0])
            reads = self._reads(path, len(stack))
            width = attach.features(next(iter(attach.linears(stack[0]).values())))[0]
            like = next(p for p in stack.parameters() if p.is_floating_point())
            net = SideNet(width, hidden, owner is not encoder, like)
            self.nets[path.replace(".", "_")] = net
            run = _Stack(net, len(reads), owner is encoder, paired)
            for position, index in enumerate(reads):
                self._handle += attach.hook([stack[index]], _See(run, position))
            self._handle += attach.wrap(owner, run)
        own_heads = _own_heads(model)
        self._was_trainable = [p for p in model.parameters() if p.requires_grad]
        for parameter in self._was_trainable:
            if id(parameter) not in own_heads:
                parameter.requires_grad_(False)
                parameter.grad = None
        self._model = (model,)
        self._handle += attach.add(model, "read", self)

    def _reads(self, path: str, depth: int) -> list[int]:
        reads = list(range(depth)) if self.layers is None else self.layers
        if not reads or not 0 <= reads[0] <= reads[-1] < depth:
            raise UsageError(f"layers={reads} are not among the {depth} blocks of {path}, from 0")
        return reads

    def detach(self) -> nn.Module:
        """Take the nets off; the model computes and trains as before."""
        self._handle.remove()
        for parameter in self._was_trainable:
            parameter.requires_grad_(True)
        return self._model[0]

    def _trained(self) -> dict[str, Tensor]:
        (model,) = self._model
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    def save(self, directory: str | os.PathLike) -> Path:
        """Write what trains, the head too, to `read.safetensors` in `directory`; returns its path.

        The file appears whole or not at all; `hidden` and `layers` are in its header.
        """
        path = Path(directory) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{FILE}.part")
        config = json.dumps({"hidden": self.hidden, "layers": self.layers})
        write_tensors(part, self._trained(), {"format": "pt", "read": config})
        os.replace(part, path)
        return path


@torch.no_grad()
def load(model: nn.Module, directory: str | os.PathLike) -> READ:
    """Attach the READ that `save` wrote to a copy of the model that it was trained on.

    Raises:
        UsageError: no such file, or its tensors are not those that would train in this model; the
            model is as before then.
    """
    path = Path(directory) / FILE
    try:
        with safe_open(str(path), "pt") as file:
            config = json.loads((file.metadata() or {})["read"])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError) as error:
        raise UsageError(f"{path} cannot be read as a READ: {error}") from error
    read = READ(model, config["hidden"], config["layers"])
    own = read._trained()
    shapes = {name: tuple(t.shape) for name, t in own.items()}
    found = {name: tuple(t.shape) for name, t in stored.items()}
    if shapes != found:
        apart = sorted(name for name, _ in shapes.items() ^ found.items())[0]
        read.detach()
        raise UsageError(f"{path} and {type(model).__name__} differ in {apart}; use the same model")
    for name, parameter in own.items():
        parameter.copy_(stored[name])
    return read


def _own_heads(model: nn.Module) -> set[int]:
    """Parameters of the model's heads that no other module uses."""
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    heads = [model.get_submodule(name) for name in attach.head(model)]
    return {id(p) for head in heads for p in head.parameters() if users[id(p)] == 1}


def _depth(config: Any) -> int | None:
    depth = getattr(config, "num_hidden_layers", None)
    if depth and getattr(config, "is_encoder_decoder", False):
        return depth + (getattr(config, "num_decoder_layers", None) or config.decoder_layers)
    return depth


def _applies(model: nn.Module, hidden: int = 256) -> str | None:
    if _depth(getattr(model, "config", None)) is None:
        return "the side net spans the whole depth, and the model has no config that states it"
    stacks = attach.blocks(model)
    paired = bool(getattr(model.config, "is_encoder_decoder", False))
    if len(stacks) != 1 + paired:
        return f"the model has {len(stacks)} stacks of blocks, not one or an encoder and a decoder"
    return None


def _apply(model: nn.Module, *, hidden: int) -> nn.Module:
    present, depth = sum(len(stack) for _, stack in attach.blocks(model)), _depth(model.config)
    if present != depth:
        # A trace of few blocks, which is extended to all, cannot see a net that reads them all.
        raise HoldfastError(f"READ spans {depth} blocks, of which {present} are here")
    READ(model, hidden)
    return model


METHOD = Method(
    key="read",
    slot="adapter",
    writes={("parameters", "extent"): "all; a net over depth and the head train"},
    apply=_apply,
    knobs={"hidden": (256, 128, 64)},
    quality=lambda hidden=256: Quality("lossy", 0.05, "holdfast check read"),
    applies=_applies,
    automatic=False,
)
