"""Drawing tokens: shares, nucleus, seeds."""

import pytest
import torch

from holdfast.context.sampling import Sampler
from holdfast.errors import UsageError

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[torch.tensor([2, 0, 3, 1])]


def shares(sampler, draws=4000):
    ids = torch.stack([sampler(LOGITS.expand(8, -1)) for _ in range(draws // 8)])
    return torch.bincount(ids.flatten(), minlength=4) / draws


def test_shares_follow_the_distribution_and_the_temperature():
    assert torch.allclose(shares(Sampler(seed=0)), LOGITS.exp(), atol=0.03)
    cold = (LOGITS / 0.5).softmax(-1)
    assert torch.allclose(shares(Sampler(0.5, seed=0)), cold, atol=0.03)


def test_top_p_draws_from_the_fewest_tokens_that_hold_as_much():
    got = shares(Sampler(top_p=0.6, seed=0))
    assert (got > 0).tolist() == [False, True, False, True]
    assert torch.allclose(got[[1, 3]], torch.tensor([0.625, 0.375]), atol=0.03)
    assert shares(Sampler(top_p=1e-6, seed=0), 80)[1] == 1


def test_zero_temperature_is_greedy_and_seeds_repeat():
    assert Sampler(0)(LOGITS[None]).tolist() == [1]
    a, b, c = (
        [int(sampler(LOGITS[None])) for _ in range(40)]
        for sampler in (Sampler(seed=3), Sampler(seed=3), Sampler(seed=4))
    )
    assert a == b != c


@pytest.mark.parametrize("given", [{"temperature": -1}, {"temperature": 3}, {"top_p": 0}])
def test_values_outside_their_range_are_refused(given):
    with pytest.raises(UsageError, match="is outside"):
        Sampler(**given)
