"""A byte LM on held-out text: what reaches the last rows from mid-context, and what it costs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.checks import Result, bytelm, check, recall
from holdfast.context.attention.attention_transition import (
    AttentionTransition,
    attach,
    attend,
)
from holdfast.context.interface import Visible, register, use

TEXTS, BATCH, EPISODES = 64, 8, 100
OFF = AttentionTransition(threshold=0.0)


@torch.no_grad()
def rollout(model: nn.Module, ids: Tensor, options: AttentionTransition) -> Tensor:
    """(B,n,n): how much of each row's last state comes from each token, through all layers.

    Heads are averaged, and half of what a layer passes on is its input.
    """
    relay = torch.eye(ids.shape[1]).expand(len(ids), -1, -1)

    def record(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Visible, *, scaling: float, **_
    ) -> tuple[Tensor, None]:
        nonlocal relay
        # With the identity for values, the output is the weights.
        eye = torch.eye(k.shape[2]).expand(*k.shape[:3], -1)
        weights, _ = attend(module, q, k, eye, visible, scaling=scaling, options=options)
        relay = (weights.mean(2) + torch.eye(k.shape[2])) / 2 @ relay
        return attend(module, q, k, v, visible, scaling=scaling, options=options)

    register("attention_transition-recorded", record)
    with use(model, "attention_transition-recorded"):
        model(ids)
    return relay


def mid_context(model: nn.Module, ids: Tensor, options: AttentionTransition) -> float:
    """Mass that the tail's rows get from the tokens between the beginning and the tail."""
    tail, first = AttentionTransition().tail, AttentionTransition().begin + 3
    each = [rollout(model, some, options)[:, -tail:, first:-tail] for some in ids.split(BATCH)]
    return torch.cat(each).sum(-1).mean().item()


@torch.no_grad()
def nats(model: nn.Module, ids: Tensor) -> Tensor:
    """Loss of each byte but the first, (texts,n-1)."""
    losses = []
    for some in ids.split(BATCH):
        logits = model(input_ids=some).logits[:, :-1]
        losses.append(F.cross_entropy(logits.mT, some[:, 1:], reduction="none"))
    return torch.cat(losses)


@check(
    "attention_transition",
    claim="more reaches the last rows from mid-context, and held-out perplexity rises by at most "
    "2 %",
)
def run(seed: int) -> Result:
    model, ids = bytelm.trained(seed), bytelm.validation(bytelm.TRAINED, TEXTS)
    ours, base = (mid_context(model, ids, o) for o in (AttentionTransition(), OFF))
    plain = nats(model, ids)
    with attach(model):
        edited = nats(model, ids)
    reader, episodes = recall.trained(seed), recall.episodes(EPISODES, 200, seed)
    plain_recall = recall.recall(recall.plain(reader), episodes)
    with attach(reader):
        edited_recall = recall.recall(recall.plain(reader), episodes)
    before, after = plain.mean().exp().item(), edited.mean().exp().item()
    tail = (edited - plain)[:, -AttentionTransition().tail :].mean().exp().item()
    return Result(
        measured={
            "mid_context_mass": ours,
            "perplexity": after,
            "perplexity_ratio": after / before,
            "perplexity_ratio_of_tail": tail,
            "recall": edited_recall,
        },
        baseline={
            "name": "plain attention",
            "mid_context_mass": base,
            "perplexity": before,
            "recall": plain_recall,
        },
        threshold="mid_context_mass > baseline, perplexity <= 1.02 x baseline; no claim on recall",
        passed=ours > base and after <= 1.02 * before,
    )
