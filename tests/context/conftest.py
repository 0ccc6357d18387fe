"""A dense oracle: attention where every pair of tokens has a distance of its own."""

import math

import pytest
import torch

from holdfast.context.interface import register, use
from holdfast.context.rope import Rope

_distance = {}


def _attend(module, q, k, v, visible, *, scaling, dropout=0.0, position_ids=None, **_):
    rope, distance = _distance["rope"], _distance["matrix"]
    q, k = (rope.unrotate(x, position_ids[:, None]).double() for x in (q, k))
    v, k = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (v, k))
    scores = torch.full((*q.shape[:3], k.shape[2]), -math.inf, dtype=torch.float64)
    for value in distance[distance >= 0].unique().tolist():
        at = torch.full((1, 1, 1), value)
        turned = rope.rotate(q.float(), at).double() @ k.mT
        scores = torch.where(distance == value, turned * scaling, scores)
    return (scores.softmax(-1) @ v).to(torch.float32).transpose(1, 2), None


register("test_distances", _attend)


@pytest.fixture
def by_distance():
    """(model, ids, matrix) -> logits; matrix (n,n) int64 of distances, negative where hidden."""

    def run(model, ids, matrix):
        _distance.update(rope=Rope.from_model(model), matrix=matrix)
        with use(model, "test_distances"), torch.no_grad():
            return model(ids).logits

    return run
