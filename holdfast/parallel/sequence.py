"""Ring Self-Attention (082): sequence parallelism in which no rank holds the whole sequence.

Keeps    on each of N ranks the activations of n = L/N tokens, all weights, and the whole batch's
         token ids and mask. Attention saves, in the form "rsa", q, k, v and the probabilities of
         its own queries over all L keys; "online", q, k, v, the output and a log-sum-exp per query:
         nothing of size L^2.
Form     that of the model; log-sum-exp and travelling gradients of keys and values fp32 (or fp64).
Bytes    saved per attention: `saved_nbytes`; sent per attention and rank: `ring_nbytes`. With B
         rows, Z query heads, H key heads of size A, b bytes per element:
         rsa    b*(B*Z*n*A + 2*B*H*n*A + B*Z*n*L)
         online b*(2*B*Z*n*A + 2*B*H*n*A) + 4*B*Z*n
         sent   forward 2*(N-1)*b*B*H*n*A, backward that plus 2*(N-1)*4*B*H*n*A.
Source   Li, Xue, Baranwal, Li, You, "Sequence Parallelism: Long Sequence Training from System
         Perspective", ACL 2023. "online" is the ring attention of Liu, Zaharia, Abbeel, "Ring
         Attention with Blockwise Transformers for Near-Infinite Context", 2023. No code was read.
Departs  gradients of keys and values are summed on the way round the ring to their owners, 2 (N-1)
         blocks, where the paper's two all-reduces send 4 (N-1). Chunks in zig-zag order, which
         balance a causal mask, are not of the paper. Torch's own context parallelism is not used:
         it is causal alone and experimental.
"""

import inspect
import types
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from holdfast import attach
from holdfast.errors import UsageError, unknown
from holdfast.parallel.ring import Traffic, place_in
from holdfast.parallel.ring_attention import ATTENTION, Layout, Pattern, ring_attention

NAME = "holdfast_sequence"
LAYOUTS = ("contiguous", "zigzag")
_WHOLE = ("past_key_values", "logits_to_keep", "encoder_hidden_states", "shift_labels")
_UNKNOWN_TERMS = ("softcap", "position_bias", "s_aux")
_batch: ContextVar[Pattern | None] = ContextVar("batch", default=None)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **terms: Any,
) -> tuple[Tensor, None]:
    """The attention function that models call: (B,Z,n,A), (B,H,n,A) twice -> (B,n,Z,A)."""
    if not isinstance(attention_mask, Pattern):
        raise UsageError(
            f"{type(module).__name__} asks for attention outside of its model's forward pass; "
            "call the model that sequence_parallel was given"
        )
    present = [name for name in _UNKNOWN_TERMS if terms.get(name) is not None]
    if present or query.shape[2] != key.shape[2]:
        what = ", ".join(present) or "a cache or an encoder"
        raise UsageError(
            f"{type(module).__name__} attends with {what}, which sequence parallelism cannot do; "
            "train this model without it"
        )
    layer = getattr(module, "layer_idx", None) or 0
    out = ring_attention(
        query, key, value, attention_mask, scale=scaling, dropout=dropout, layer=layer
    )
    return out.transpose(1, 2).contiguous(), None


def _mask(*, mask_function: Callable, use_vmap: bool = False, **_: Any) -> Pattern:
    """The mask function that models call: this batch's pattern, with the mask that they ask for."""
    pattern = _batch.get()
    if pattern is None:
        raise UsageError(
            "a part of a sequence-parallel model was called alone; "
            "call the model that sequence_parallel was given, or remove() it first"
        )
    if use_vmap or _holds_tensor(mask_function):
        raise UsageError(
            "the model's mask depends on more than the distance of two tokens, for example on "
            "images or chunks; sequence parallelism takes full, causal and sliding-window masks"
        )
    return replace(pattern, sees=mask_function)


def _holds_tensor(value: Any) -> bool:
    """Whether a mask function closes over tensors, which would be of this rank's tokens alone."""
    if isinstance(value, tuple):
        return any(map(_holds_tensor, value))
    if isinstance(value, types.FunctionType):
        return any(_holds_tensor(cell.cell_contents) for cell in value.__closure__ or ())
    return isinstance(value, Tensor)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)


class SequenceParallel:
    """A model whose sequences are spread over ranks; `sequence_parallel` makes it.

    Every rank calls the model on the same whole batch, forward and backward, and gets the outputs
    of its own tokens (`gather` joins them), the loss of the whole batch, and the gradients of the
    whole batch in its weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        group: dist.ProcessGroup | None,
        attention: str,
        layout: str,
        pad: bool,
    ):
        self.rank, self.ranks = place_in(group)
        self.model, self.group, self.attention = model, group, attention
        self.zigzag, self.pad = layout == "zigzag", pad
        self.traffic = Traffic()
        self._layout, self._length = Layout(0, self.ranks, self.zigzag), 0
        self._hooks = WeakIdKeyDictionary()
        self._before = model.config._attn_implementation
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise UsageError(
                f"{type(model).__name__} does not let its attention be replaced; it needs a "
                "transformers model that uses AttentionInterface"
            )
        first = 0 if group is None else dist.get_global_rank(group, 0)
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.data, first, group=group)
        self._first = first
        self._handle = attach.wrap(model, self._call)
        model.__dict__["_holdfast_sequence"] = self

    def remove(self) -> None:
        """Make the model what it was."""
        self._handle.remove()
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self.model.set_attn_implementation(self._before)
        del self.model.__dict__["_holdfast_sequence"]

    def scatter(self, x: Tensor, fill: float | int | bool = 0) -> Tensor:
        """This rank's tokens (B,n,...) of x (B,L,...); what pads L is `fill`.

        Raises:
            UsageError: pad=False, and L is no multiple of the ranks (in zig-zag, of twice them).
        """
        layout = self._plan(x.shape[1])
        missing = layout.length - x.shape[1]
        if missing:
            x = torch.cat([x, x.new_full((x.shape[0], missing, *x.shape[2:]), fill)], 1)
        return layout.split(x, self.rank)

    @torch.no_grad()
    def gather(self, x: Tensor) -> Tensor:
        """All tokens (B,L,...) of the last batch, from each rank's (B,n,...); without gradient."""
        if x.shape[1] * self.ranks != self._layout.length:
            raise UsageError(
                f"x of shape {tuple(x.shape)} is not of the last batch's tokens; "
                "gather what the model returned from its last forward pass"
            )
        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.ranks)
        ]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return self._layout.join(parts)[:, : self._length]

    def _plan(self, length: int) -> Layout:
        parts = self.ranks * (2 if self.zigzag else 1)
        missing = -length % parts
        if missing and not self.pad:
            raise UsageError(
                f"{length} tokens cannot be split into {parts} equal parts; "
                f"use {length + missing} tokens, or pad=True"
            )
        return Layout(length + missing, self.ranks, self.zigzag)

    def _call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        names = list(inspect.signature(forward).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        given = {name: value for name, value in given.items() if value is not None}
        self._refuse(given, names)
        tokens = given["input_ids"] if "input_ids" in given else given["inputs_embeds"]
        self._length = tokens.shape[1]
        self._layout = self._plan(self._length)
        valid = self._valid(given.pop("attention_mask", None), tokens)
        labels, items = given.pop("labels", None), given.pop("num_items_in_batch", None)
        given |= self._tokens(given, tokens)
        if "use_cache" in names:
            given["use_cache"] = False
        seed = self._seed(tokens.device) if self.model.training else 0
        pattern = Pattern(
            self._layout, self.rank, self.group, self.traffic, self.attention, valid, seed
        )
        if torch.is_grad_enabled():
            self._reduce_gradients()
        with ExitStack() as stack:
            if self.model.training:
                # Equal seeds would drop the same features of different tokens on every rank.
                devices = [tokens.device] if tokens.is_cuda else []
                stack.enter_context(torch.random.fork_rng(devices))
                torch.manual_seed(seed + self.rank)
            token = _batch.set(pattern)
            try:
                outputs = forward(**given)
            finally:
                _batch.reset(token)
        if labels is not None:
            outputs["loss"] = self._loss(outputs.logits, labels, items)
        return outputs

    def _refuse(self, given: dict[str, Any], names: list[str]) -> None:
        known = type(self.model).__name__
        for name in _WHOLE:
            if name in given and not (isinstance(given[name], int) and given[name] == 0):
                raise UsageError(
                    f"{name} was given, but a sequence-parallel {known} trains on whole sequences; "
                    "call remove() before generation"
                )
        if given.pop("return_dict", True) is False:
            raise UsageError("return_dict=False was given; the loss goes into an output object")
        if "position_ids" not in names:
            raise UsageError(
                f"{known} computes positions itself, from the tokens of one rank; "
                "sequence parallelism needs a model that takes position_ids"
            )
        if ("input_ids" in given) == ("inputs_embeds" in given):
            raise UsageError("give the model one of input_ids and inputs_embeds")

    def _valid(self, mask: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Which of all tokens are no padding, (B,length) bool; None is all of them."""
        if mask is not None and mask.shape != tokens.shape[:2]:
            raise UsageError(
                f"attention_mask has shape {tuple(mask.shape)}; "
                f"expected {tuple(tokens.shape[:2])}, 1 for tokens and 0 for padding"
            )
        missing = self._layout.length - self._length
        if not missing and (mask is None or bool(mask.all())):
            return None
        valid = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        return nn.functional.pad(valid, (0, missing))

    def _tokens(self, given: dict[str, Any], tokens: Tensor) -> dict[str, Tensor]:
        """What the model is given for this rank's tokens in place of those of the batch."""
        batch, length = tokens.shape[:2]
        positions = given.pop("position_ids", None)
        if positions is None:
            positions = torch.arange(length, device=tokens.device)[None]
        elif bool((positions.diff(dim=1) < 0).any()):
            raise UsageError(
                "position_ids start again within a row: packed sequences cannot be split; "
                "give each sequence its own row, padded"
            )
        # Repeating the last one stays within a table of learned positions.
        last = positions[:, -1:].expand(-1, self._layout.length - length)
        local = {"position_ids": self._layout.split(torch.cat([positions, last], 1), self.rank)}
        for name, value in given.items():
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == (batch, length):
                local[name] = self.scatter(value)
        # Without a mask models take jumps in positions for the start of another sequence.
        n = self._layout.length // self.ranks
        local["attention_mask"] = tokens.new_ones((1, 1), dtype=torch.bool).expand(batch, n)
        return local

    def _seed(self, device: torch.device) -> int:
        drawn = torch.randint(2**48, (1,)).to(device)
        dist.broadcast(drawn, self._first, group=self.group)
        return int(drawn)

    def _loss(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        """The mean over the tokens of all ranks; its gradient is that of this rank's share."""
        name = type(self.model).__name__
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        elif not name.endswith("ForMaskedLM"):
            raise UsageError(
                f"the loss of {name} is not a mean over tokens; call it without labels, and take "
                "the loss of its outputs and of scatter(labels)"
            )
        items = (labels != -100).sum() if items is None else items
        ours = self.scatter(labels, -100)
        share = self.model.loss_function(
            logits, ours, vocab_size=logits.shape[-1], num_items_in_batch=items, shift_labels=ours
        )
        total = share.detach().clone()
        dist.all_reduce(total, group=self.group)
        return share + (total - share.detach())

    def _reduce_gradients(self) -> None:
        """Sum over ranks what a backward pass adds to each gradient, before it is added."""
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter not in self._hooks:
                self._hooks[parameter] = parameter.register_hook(self._sum)

    def _sum(self, gradient: Tensor) -> Tensor:
        # The engine may share this tensor with other nodes, so it is not summed in place.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total


def sequence_parallel(
    model: PreTrainedModel,
    mesh_or_group: DeviceMesh | dist.ProcessGroup | None = None,
    attention: str = "online",
    layout: str = "zigzag",
    pad: bool = True,
) -> SequenceParallel:
    """Spread the tokens of each batch over ranks; every rank calls this on its copy of the model.

    Weights become those of the first rank. Call the model with whole batches, as before.

    Args:
        model: a transformers model with full, causal or sliding-window attention, whose forward
            takes position_ids: LLaMA, Mistral, Qwen, GPT-2, BERT and their kin.
        mesh_or_group: the ranks, as a mesh of one dimension or a group; None is all.
        attention: "rsa" keeps probabilities over the whole sequence for backward, "online" none.
        layout: "contiguous", or "zigzag", by which causal attention costs every rank the same.
        pad: lengthen a batch until it can be split; what is added is masked and has no loss.

    Raises:
        UsageError: an unknown name, a mesh of several dimensions, a model that cannot be split.
    """
    for what, name, known in (("attention", attention, ATTENTION), ("layout", layout, LAYOUTS)):
        if name not in known:
            raise unknown(what, name, known)
    if "_holdfast_sequence" in model.__dict__:
        raise UsageError(f"{type(model).__name__} is sequence-parallel already; remove() it first")
    if isinstance(mesh_or_group, DeviceMesh):
        if mesh_or_group.ndim != 1:
            raise UsageError(
                f"the mesh has dimensions {mesh_or_group.mesh_dim_names or mesh_or_group.ndim}; "
                'pass one of them, for example mesh["sequence"]'
            )
        mesh_or_group = mesh_or_group.get_group()
    return SequenceParallel(model, mesh_or_group, attention, layout, pad)
