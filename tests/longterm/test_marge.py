import math

import pytest
import torch

from holdfast.errors import UsageError
from holdfast.longterm import marge
from holdfast.longterm.marge import CausalMARGE, Index, MargeConfig, allowed, train

TINY = MargeConfig(vocabulary=16, width=32, layers=2, encoder=1, heads=2, window=8, chunk=4)


def made(config: MargeConfig = TINY, seed: int = 0) -> CausalMARGE:
    torch.manual_seed(seed)
    return CausalMARGE(config)


def random_rows(count: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(16, (count, length), generator=torch.Generator().manual_seed(seed))


def test_what_may_be_seen_by_hand():
    index = Index(
        tokens=torch.zeros(4, 8, dtype=torch.long),
        vectors=torch.zeros(4, 2),
        document=torch.tensor([7, 7, 7, 9]),
        place=torch.tensor([0, 1, 2, 0]),
    )
    mine, unknown = allowed(index, torch.tensor([7, -1]), 4).tolist()
    # Pair 0 is chunks 0 and 1: chunk 2 is the first that comes after both.
    assert mine == [
        [False, False, False, True],
        [False, False, False, True],
        [True, False, False, True],
        [True, True, False, True],
    ]
    assert unknown == [[True] * 4] * 4


@torch.no_grad()
@pytest.mark.parametrize("position", [1, 6, 7, 8, 15, 23])
def test_no_future_token_changes_an_output(position):
    model = made()
    documents = random_rows(6, 24, seed=1)
    index = model.index(documents)
    rows, number = documents[:1], torch.arange(1)
    before = model(rows, index, number)
    changed = rows.clone()
    changed[:, position:] = (changed[:, position:] + 5) % 16
    # The index holds the changed document as well, as it would while a document is written.
    later = model.index(torch.cat([changed, documents[1:]]))
    after = model(changed, later, number)
    torch.testing.assert_close(before[:, :position], after[:, :position], atol=1e-5, rtol=0)
    assert (before[:, position] - after[:, position]).abs().max() > 1e-3


def leaking(index, document, chunks):
    return torch.ones(len(document), chunks, len(index.place), dtype=torch.bool)


@pytest.mark.parametrize("leak", [False, True])
def test_random_tokens_cannot_be_guessed_from_an_index_that_holds_them(leak, monkeypatch):
    """Every batch is new and indexed before it is read: without exclusion it is read off."""
    if leak:
        monkeypatch.setattr(marge, "allowed", leaking)
    model = made()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    late = []
    for step in range(80):
        rows, number = random_rows(8, 24, seed=step), torch.arange(8)
        logits = model(rows, model.index(rows), number)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        late.append(loss.item())
    mean = sum(late[-20:]) / 20
    if leak:
        assert mean < math.log(16) - 0.5
    else:
        assert mean >= math.log(16) - 0.01


def test_first_chunk_and_empty_past_find_nothing():
    model = made()
    documents = random_rows(1, 16, seed=2)
    # Alone in the index, a document finds its own past: nothing before the third chunk.
    found = model._find(documents, model.index(documents), torch.tensor([0]))
    finite = found.bias.isfinite().any(-1)[0].tolist()
    assert finite == [False, False, True, True]
    torch.testing.assert_close(
        model(documents, model.index(documents), torch.tensor([0]))[:, :8],
        model(documents)[:, :8],
        atol=1e-5,
        rtol=0,
    )


def test_own_past_that_repeats_is_found():
    model = made()
    chunk = torch.tensor([1, 2, 3, 4])
    other = torch.tensor([5, 6, 7, 8])
    row = torch.cat([chunk, other, other + 4, chunk, other])[None]
    index = model.index(row, torch.tensor([3]))
    found = model._find(row, index, torch.tensor([3]))
    # The last chunk asks with [1 2 3 4], which is the pair at place 0: relevance 1.
    assert found.bias[0, 4].max().item() == pytest.approx(0, abs=1e-4)
    assert found.bias[0, 4].min().item() < -0.1
    assert found.positions[4].tolist() == [12, 13, 14, 15, 16, 17, 18, 19] * 2


def test_gradient_flows_through_relevance():
    model = made()
    documents = random_rows(4, 16, seed=3)
    index = model.index(documents)
    assert not index.vectors.requires_grad
    model(documents, index).square().sum().backward()
    assert model.beta.grad.abs() > 0
    found = model._find(documents, index, torch.full((4,), -1))
    kept = found.bias[found.bias.isfinite()]
    (gradient,) = torch.autograd.grad(kept.sum(), model.blocks[0].mlp[0].weight)
    assert gradient.abs().max() > 0


def test_without_a_state_it_is_a_language_model_of_its_window():
    model = made(MargeConfig(vocabulary=16, width=32, layers=3, heads=2, window=3, found=0))
    rows = random_rows(1, 20, seed=4)
    changed = rows.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 16
    moved = (model(rows) - model(changed)).abs().amax((0, 2))
    reach = 3 * 2 + 1 + 3  # layers * (window - 1) + 1, and each layer's keys know one token more
    assert moved[0] > 0 and moved[reach:].max() == 0


def test_index_bytes_and_refresh():
    model = made()
    documents = random_rows(5, 24, seed=5)
    index = model.index(documents)
    pairs = 5 * (24 // 4 - 1)
    assert index.nbytes == pairs * (4 * 32 + 16 * 4 + 16)
    assert index.tokens[1].tolist() == documents[0, 4:12].tolist()
    assert index.place[:6].tolist() == [0, 1, 2, 3, 4, 0]
    with torch.no_grad():
        model.words.weight.mul_(torch.linspace(0, 2, 32))
    new = model.refreshed(index)
    assert torch.equal(new.tokens, index.tokens) and not torch.equal(new.vectors, index.vectors)
    torch.testing.assert_close(new.vectors, model.index(documents).vectors)


def test_training_lowers_the_loss():
    rows = random_rows(2, 24, seed=6)
    model = made()
    batches = iter([(rows, torch.full((2,), -1))] * 40)
    losses = train(model, batches, 40, 5e-3, model.index(rows), refresh=10)
    assert len(losses) == 40 and losses[-1] < 0.5 * losses[0]


def test_errors():
    with pytest.raises(UsageError, match=r"width=30 is no multiple of 4\*heads=16"):
        MargeConfig(vocabulary=16, width=30)
    with pytest.raises(UsageError, match="encoder=3 of layers=3"):
        MargeConfig(vocabulary=16, encoder=3)
    model = made()
    index = model.index(random_rows(2, 16, seed=0))
    with pytest.raises(UsageError, match=r"rows of 15 tokens with chunk=4.*pad the end"):
        model(random_rows(1, 15, seed=0), index)
    plain = made(MargeConfig(vocabulary=16, width=32, layers=2, heads=2, found=0, chunk=4))
    with pytest.raises(UsageError, match="found=0: retrieval needs found >= 1"):
        plain(random_rows(1, 16, seed=0), index)
