"""Cross-entropy over a large vocabulary in chunks of tokens: the logits never exist at once.

Keeps    the gradient of the hidden states and, where the head trains, of its weight.
Form     the dtype of the hidden states; logits of one chunk in fp32.
Bytes    instead of tokens x vocabulary logits, their fp32 copy and their gradient:
         chunk x vocabulary, three times, and the two gradients.
Source   the gradient of softmax cross-entropy is known as soon as a chunk's logits are, so
         it is formed in the forward pass and no logit is computed twice.
Departs  nothing is approximated; sums run in another order than in one piece.
"""

from typing import Any

import torch
from torch import Tensor, nn

from holdfast import attach
from holdfast.errors import HoldfastError

IGNORE = -100


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk, softcap):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        counted = (targets != IGNORE).sum().clamp(min=1)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        for start in range(0, hidden.shape[0], chunk):
            part, target = hidden[start : start + chunk], targets[start : start + chunk]
            kept = target != IGNORE
            at = target.clamp(min=0).unsqueeze(1)
            logits = nn.functional.linear(part, weight, bias)
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            logits = logits.float()
            # Not logsumexp, which holds a second tensor of this size where no one sees it.
            top, chosen = logits.amax(1, keepdim=True), logits.gather(1, at)
            slope = None
            if softcap is not None and (need_hidden or need_weight or need_bias):
                slope = (logits / softcap).square_().neg_().add_(1)
            powers = logits.sub_(top).exp_()
            whole = powers.sum(1, keepdim=True)
            nats = (whole.log() + top - chosen).squeeze(1)
            total += nats.masked_fill_(~kept, 0).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            grad = powers.div_(whole)
            grad.scatter_add_(1, at, grad.new_full((1, 1), -1.0).expand_as(at))
            grad.mul_((kept.float() / counted).unsqueeze(1))
            if slope is not None:
                grad.mul_(slope)
            grad = grad.to(part.dtype)
            if need_hidden:
                torch.mm(grad, weight, out=grad_hidden[start : start + chunk])
            if need_weight:
                grad_weight.addmm_(grad.T, part)
            if need_bias:
                grad_bias += grad.sum(0)
            del logits, powers, grad
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total / counted

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        # In place: these are ours alone, and a second copy of the head is what we avoid.
        grads = [None if g is None else g.mul_(grad_output) for g in ctx.saved_tensors]
        return (*grads, None, None, None)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Mean cross-entropy of `linear(hidden, weight, bias)` against `targets`, a scalar in fp32.

    Args:
        hidden: (tokens, features).
        weight: (vocabulary, features); bias (vocabulary,).
        targets: (tokens,) int64; -100 is not counted.
        chunk: tokens whose logits exist at once.
        softcap: logits become `softcap * tanh(logits / softcap)` first, as in Gemma 2.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, chunk, softcap)


# A head with one of these set scales its logits in a way that is not handled here.
_UNHANDLED = ("logit_scale", "logits_scaling", "logits_scale", "lm_head_multiplier")


def can_chunk(model: nn.Module) -> str | None:
    """None where `causal_loss` may stand for the model's own loss, else one line why not."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    backbone = getattr(model, "base_model", model)
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return "only causal language models have a head that can be chunked"
    if not isinstance(head, nn.Linear) or backbone is model:
        return "the model has no separate linear head"
    for name in _UNHANDLED:
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            return f"the model scales its logits ({name})"
    if getattr(model.config, "num_experts", None) or getattr(
        model.config, "num_local_experts", None
    ):
        return "the model adds a router loss to the cross-entropy"
    return None


def causal_loss(model: nn.Module, batch: dict[str, Any], chunk: int) -> Tensor:
    """The next-token loss of a causal language model without its full logits.

    Args:
        batch: `input_ids` and `labels` (B,n), and what else the backbone takes.
        chunk: tokens whose logits exist at once.
    """
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    hidden = model.base_model(**inputs)[0]
    head = model.get_output_embeddings()
    labels = batch["labels"]
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE).reshape(-1)
    return chunked_cross_entropy(
        # Some backbones end in fp32 below a head in half precision.
        hidden.reshape(-1, hidden.shape[-1]).to(head.weight.dtype),
        head.weight,
        targets,
        chunk=chunk,
        bias=head.bias,
        softcap=getattr(model.config, "final_logit_softcapping", None),
    )


def chunk_loss_(model: nn.Module, chunk: int) -> attach.Handle:
    """Make `model(**batch).loss` the chunked loss, in place; calls without labels are unchanged."""
    return attach.wrap(model, _Chunked(model, chunk))


class _Chunked:
    def __init__(self, model: nn.Module, chunk: int):
        self.model, self.chunk = model, chunk

    def __call__(self, forward, *args, **kwargs):
        from transformers.modeling_outputs import CausalLMOutput

        if args or kwargs.get("labels") is None:
            return forward(*args, **kwargs)
        items = kwargs.pop("num_items_in_batch", None)
        loss = causal_loss(self.model, kwargs, self.chunk)
        if items is not None:
            # The Trainer divides by the tokens of all micro-batches, not of this one.
            counted = (kwargs["labels"][:, 1:] != IGNORE).sum()
            loss = loss * (counted / items)
        return CausalLMOutput(loss=loss)


@torch.no_grad()
def verify_chunked(model: nn.Module, batch: dict[str, Any]) -> None:
    """Compare the chunked loss with the model's own on a few tokens of a real batch.

    Raises:
        HoldfastError: they differ, so the model's head does more than its config says.
    """
    few = {k: v[:1, :16] for k, v in batch.items()}
    was_training = model.training
    model.eval()
    chunked, plain = model(**few).loss, model.forward.__wrapped__(**few).loss
    model.train(was_training)
    tolerance = 1e-4 if next(model.parameters()).dtype is torch.float32 else 2e-2
    if (plain - chunked).abs() > tolerance * plain.abs().clamp(min=1):
        raise HoldfastError(
            f"chunked loss {chunked:.6f} differs from the model's own {plain:.6f}; "
            "set loss_chunk: 0 in the plan"
        )
