import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from holdfast.errors import UsageError
from holdfast.training.reduction.prune import (
    WAYS,
    Forgetting,
    Subset,
    el2n,
    fit_logistic,
    grand,
    limits,
    loss,
    prune,
    uncertainty,
)


@pytest.mark.parametrize("n, keep, explore", [(1000, 0.1, 0.9), (977, 0.05, 0.5), (40, 0.3, 1.0)])
@pytest.mark.parametrize("seed", range(3))
def test_weights_sum_to_n_and_indices_are_distinct(n, keep, explore, seed):
    found = prune(torch.rand(n), keep, explore, seed=seed)
    assert len(found) == round(keep * n) == len(set(found.indices.tolist()))
    # Weights are fp32, their sum is exact but for their own rounding.
    assert found.weights.double().sum().item() == pytest.approx(n, rel=2**-24)
    assert (found.indices.diff() > 0).all()


def test_by_hand():
    scores = torch.arange(20.0)
    found = prune(scores, 0.5, 0.8)  # 2 by score, 8 at random of 18
    assert {18, 19} <= set(found.indices.tolist())
    top = found.indices >= 18
    assert found.weights[top].tolist() == [1, 1]
    assert found.weights[~top].tolist() == [18 / 8] * 8
    assert found.weights.sum() == 20
    assert prune(scores, 0.5, 0.0).indices.tolist() == list(range(10, 20))
    assert prune(scores, 0.5, 0.8, reweight=False).weights.tolist() == [1] * 10
    whole = prune(scores, 1.0)
    assert whole.indices.tolist() == list(range(20)) and whole.weights.tolist() == [1] * 20


def test_all_explored_is_random_pruning():
    scores = torch.randn(100)
    one, two = (prune(s, 0.2, 1.0, seed=4) for s in (scores, -scores))
    assert torch.equal(one.indices, two.indices) and one.weights.unique().tolist() == [5]
    other = prune(scores, 0.2, 1.0, seed=5)
    assert not torch.equal(one.indices, other.indices)


def test_the_weighted_loss_is_unbiased():
    scores = torch.linspace(0, 1, 50) ** 3
    losses = scores * 2 + 0.1
    sums = [
        (losses[s.indices] * s.weights).sum()
        for s in (prune(scores, 0.2, 0.6, seed=i) for i in range(3000))
    ]
    sums = torch.stack(sums)
    assert (sums.mean() - losses.sum()).abs() < 4 * sums.std() / 3000**0.5


def test_ties_are_broken_the_same_way_every_time():
    assert prune(torch.zeros(10), 0.3, 0.0).indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], 0), "keep=0 of 2 examples"),
        (([1.0, 2.0], 1.5), "keep=1.5"),
        (([1.0, 2.0], 0.1), "keep at least one"),
        (([1.0, math.nan, 2.0], 0.5), "1 of 3 scores are NaN"),
        (([1.0, 2.0], 0.5, 1.2), "explore=1.2"),
        ((torch.ones(2, 2), 0.5), "one per example"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(UsageError, match=message):
        prune(*arguments)


def test_a_subset_is_a_sampler_and_gives_weights():
    data = TensorDataset(torch.arange(10.0), torch.arange(10))
    subset = prune(torch.arange(10.0), 0.4, 0.5)
    epochs = [list(subset) for _ in range(3)]
    assert all(sorted(e) == subset.indices.tolist() for e in epochs)
    assert any(e != epochs[0] for e in epochs)
    drawn = [int(y) for _, y in DataLoader(data, sampler=subset, batch_size=None)]
    assert sorted(drawn) == subset.indices.tolist()
    pairs = [((x, y), w) for (x, y), w in DataLoader(subset.of(data), batch_size=2)]
    assert torch.cat([w for _, w in pairs]).tolist() == subset.weights.tolist()
    assert torch.cat([y for (_, y), _ in pairs]).tolist() == subset.indices.tolist()
    with pytest.raises(UsageError, match="one length"):
        Subset(torch.arange(3), torch.ones(2))


def test_bytes_are_examples_and_a_weight_each():
    x = torch.randn(200, 12)
    subset = prune(torch.rand(200), 0.1)
    kept, weights = x[subset.indices], subset.weights
    assert subset.nbytes(12 * 4) == kept.nbytes + weights.nbytes == 20 * (48 + 4)


def test_scores():
    logits = torch.tensor([[0.0, math.log(3)], [5.0, -5.0]])  # p = 1/4, 3/4
    labels = torch.tensor([0, 0])
    torch.testing.assert_close(el2n(logits, labels)[0], torch.tensor(0.75 * 2**0.5))
    torch.testing.assert_close(loss(logits, labels)[0], torch.tensor(math.log(4)))
    torch.testing.assert_close(uncertainty(logits)[0], torch.tensor(0.25))
    assert all(s.argmax() == 0 for s in (el2n(logits, labels), uncertainty(logits)))


def test_grand_is_the_norm_of_each_examples_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].bias.requires_grad_(False)
    x, y = torch.randn(7, 4), torch.randint(3, (7,))
    got = grand(model, F.cross_entropy, x, y, chunk=3)
    trained = [p for p in model.parameters() if p.requires_grad]
    for i in range(7):
        grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), trained)
        want = torch.cat([g.flatten() for g in grads]).norm()
        torch.testing.assert_close(got[i], want)


def test_forgetting_counts_falls():
    forgetting = Forgetting(3)
    for right in ([1, 1, 0], [0, 1, 0], [1, 1, 0], [0, 1, 0]):
        forgetting.update(torch.arange(3), torch.tensor(right, dtype=torch.bool))
    assert forgetting.scores.tolist() == [2, 0, math.inf]


def test_logistic_regression_is_stationary():
    torch.manual_seed(0)
    x, weights = torch.randn(50, 3, dtype=torch.float64), torch.rand(50) * 3
    y = (x[:, 0] + 0.5 * torch.randn(50) > 0).double()
    w = fit_logistic(x, y, weights).requires_grad_()
    scaled = weights.double() / weights.mean()
    nats = F.binary_cross_entropy_with_logits(x @ w, y, scaled, reduction="sum")
    (nats + 0.5 * 1e-3 * 50 * w @ w).backward()
    assert w.grad.norm() < 1e-5


def test_limits_tell_the_ways_apart():
    found = limits(4000, 0.05, ["random", "hardest", "calibrated 0.1"], seed=0)
    assert found["hardest"][0] < 0.3 < 0.7 < found["random"][0]
    assert abs(found["calibrated 0.1"][0] - found["random"][0]) < 0.05
    assert set(found) <= set(WAYS)
