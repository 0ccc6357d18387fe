import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdfast.errors import UsageError
from holdfast.longterm.marge import CausalMARGE, MargeConfig
from holdfast.longterm.retrieval_need import (
    KINDS,
    LONGER,
    Experts,
    bands,
    continued,
    gains,
    near_duplicates,
    octaves,
    position_losses,
    read_documents,
)

TINY = MargeConfig(vocabulary=16, width=32, layers=2, heads=2, window=4, chunk=4)


class Period(nn.Module):
    """Predicts the token `period` before the next with probability 3/4, else any of 4."""

    def __init__(self, period: int):
        super().__init__()
        self.period = period

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, 4)
        for t in range(self.period - 1, ids.shape[1]):
            logits[:, t] += F.one_hot(ids[:, t + 1 - self.period], 4) * math.log(9)
        return logits


def test_position_losses_of_a_known_model():
    rows = torch.tensor([0, 1, 2, 3, 3]).repeat(4, 5)  # period 5: 25 tokens
    losses = position_losses(Period(5), rows, batch=3)
    assert losses.shape == (24,)
    torch.testing.assert_close(losses[:4], torch.full((4,), math.log(4)))
    torch.testing.assert_close(losses[4:], torch.full((20,), math.log(4 / 3)))


@pytest.mark.parametrize("window", [4, 5, 7, 23, 24])
def test_a_window_hides_what_lies_before_it(window):
    rows = torch.tensor([0, 1, 2, 3, 3]).repeat(2, 5)
    losses = position_losses(Period(5), rows, window=window)
    assert losses.shape == (24,)
    # Period 5 needs 5 tokens, and a window moves by a quarter.
    known = math.log(4 / 3) if window - max(1, window // 4) + 1 >= 5 else math.log(4)
    torch.testing.assert_close(losses[window:], torch.full((24 - window,), known))
    torch.testing.assert_close(losses[:window], position_losses(Period(5), rows)[:window])


def test_bands_and_gains_by_hand():
    short = torch.tensor([4.0] * 3 + [3] * 5 + [2] * 8)  # window 4 of documents of 17
    assert bands(short, 4) == {"early": 4, "middle": 3, "late": 2}
    better = short - torch.tensor([0.0] * 8 + [0.5] * 8)
    assert gains({"short": short, "long": better}, 4)["long"] == pytest.approx(
        {"early": 0, "middle": 0, "late": 0.5}
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_begins_as_the_trained_model(kind):
    torch.manual_seed(0)
    trained = CausalMARGE(TINY)
    model = continued(kind, trained)
    rows = torch.randint(16, (3, 40))
    before, after = trained(rows), model(rows)
    if kind == "long":
        # The window alone differs, so nothing does before it is full.
        assert model.config.window == LONGER * TINY.window
        torch.testing.assert_close(before[:, :4], after[:, :4], atol=1e-5, rtol=0)
        assert (before - after)[:, 8:].abs().max() > 1e-3
    else:
        torch.testing.assert_close(before, after, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_causal_and_trains(kind):
    torch.manual_seed(0)
    model = continued(kind, CausalMARGE(TINY))
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn_like(parameter))
    rows = torch.randint(16, (3, 18))  # no multiple of the segment
    changed = rows.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % 16
    out = model(rows)
    torch.testing.assert_close(out[:, :11], model(changed)[:, :11], atol=1e-5, rtol=0)
    F.cross_entropy(out[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    assert silent == (["beta"] if kind == "retrieval" else [])


@torch.no_grad()
def test_recurrence_reaches_beyond_the_windows_and_not_into_the_first_segment():
    torch.manual_seed(0)
    model = continued("recurrent", CausalMARGE(TINY))
    for block in model.blocks:
        nn.init.normal_(block.write.weight)
    rows = torch.randint(16, (1, 40))
    changed = rows.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 16
    moved = (model(rows) - model(changed)).abs().amax((0, 2))
    assert moved[-1] > 1e-4


def test_experts_send_each_token_to_one():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    experts = Experts(mlp, 8, 3)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(experts(x), mlp(x), atol=1e-6, rtol=0)
    with torch.no_grad():
        for number, layer in enumerate(experts.layers):
            layer[2].weight.zero_()
            layer[2].bias.fill_(number)
    chosen = experts.router(x).argmax(-1)
    assert len(chosen.unique()) > 1
    torch.testing.assert_close(experts(x)[..., 0], chosen.float())
    experts(x).square().sum().backward()
    assert experts.router.weight.grad.abs().max() > 0


def test_near_duplicates():
    row = torch.arange(40)
    other = torch.arange(100, 140)
    half = torch.cat([row[:30], other[:10]])
    little = torch.cat([row[:15], other[:25]])
    among = torch.stack([row, other, half, little])
    assert near_duplicates(row[None], among).tolist() == [True, False, True, False]
    assert near_duplicates(row[None], among, share=0.2).tolist() == [True, False, True, True]


def test_octaves_cover_every_position_once():
    assert octaves(9) == [(1, 2), (2, 4), (4, 8), (8, 9)]
    for length in (2, 3, 8, 10, 512):
        positions = [p for a, b in octaves(length) for p in range(a, b)]
        assert positions == list(range(1, length))


def test_documents_are_files_that_are_long_enough(tmp_path):
    from holdfast.training.tokenizers import byte_tokenizer

    (tmp_path / "a.txt").write_text("a" * 50)
    (tmp_path / "b.txt").write_text("b" * 5)
    (tmp_path / "c.txt").write_text("c" * 20)
    rows = read_documents(byte_tokenizer(), tmp_path, 20, 10)
    assert rows.tolist() == [[ord("a")] * 20, [ord("c")] * 20]
    assert read_documents(byte_tokenizer(), tmp_path / "c.txt", 4, 1).tolist() == [[99] * 4]
    assert read_documents(byte_tokenizer(), None, 16, 3).shape == (3, 16)
    with pytest.raises(UsageError, match=r"none of 3 file\(s\).*has 60 tokens"):
        read_documents(byte_tokenizer(), tmp_path, 60, 10)


def test_errors():
    rows = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(UsageError, match=r"window=8 and documents of 8 tokens.*from 1 to 7"):
        position_losses(Period(2), rows, window=8)
    with pytest.raises(UsageError, match="at least 2"):
        position_losses(Period(2), rows[:, :1])
    with pytest.raises(UsageError, match="window=9 and documents of 8 tokens"):
        bands(torch.zeros(7), 9)
    with pytest.raises(UsageError, match=r"beyond 8 tokens nothing is left.*at most 3"):
        bands(torch.zeros(7), 4)
    with pytest.raises(UsageError, match="no curve is called 'short'"):
        gains({"long": torch.zeros(9)}, 2)
    with pytest.raises(UsageError, match="recurrent"):
        continued("recurent", CausalMARGE(TINY))
