import pytest
import torch

from holdfast.checks import bytelm, recall, tinylm
from holdfast.errors import UsageError


def same(one: recall.Episode, other: recall.Episode) -> bool:
    pairs = ((one.document, other.document), (one.question, other.question))
    return all(torch.equal(*pair) for pair in pairs) and one.needle == other.needle


@pytest.mark.parametrize(("length", "facts"), [(3, 1), (65, 32), (256, 5), (2048, 1)])
def test_episode_holds_its_facts_once(length, facts):
    for episode in recall.episodes(8, length, seed=1, facts=facts):
        document = episode.document.tolist()
        assert len(document) == length and document[0] == recall.BEGIN
        keys = [token for token in document if token in recall.KEYS]
        values = [token for token in document if token in recall.VALUES]
        assert len(set(keys)) == len(keys) == len(values) == facts
        assert sum(token in recall.FILLER for token in document) == length - 1 - 2 * facts
        for key in keys:
            assert document[document.index(key) + 1] in recall.VALUES


def test_question_is_about_the_needle():
    for episode in recall.episodes(20, 100, seed=2, facts=7):
        key, value = episode.document[episode.needle].tolist()
        assert episode.question.tolist() == [recall.ASK, key]
        assert episode.answer.tolist() == [value]


def test_needles_lie_everywhere():
    starts = {episode.needle.start for episode in recall.episodes(400, 20, seed=3)}
    assert starts == set(range(1, 19))


def test_episodes_follow_the_seed():
    one, again = recall.episodes(3, 50, seed=4, facts=3), recall.episodes(3, 50, seed=4, facts=3)
    assert all(map(same, one, again))
    assert not any(map(same, one, recall.episodes(3, 50, seed=5, facts=3)))


@pytest.mark.parametrize(("length", "facts"), [(10, 0), (10, 5), (200, 33)])
def test_facts_that_do_not_go_in(length, facts):
    with pytest.raises(UsageError, match=f"{facts} facts do not go into {length} tokens"):
        recall.episodes(1, length, seed=0, facts=facts)


def test_filler_has_low_entropy():
    text = recall.filler(50_000, torch.Generator().manual_seed(0)) - recall.FILLER[0]
    counts = torch.zeros(len(recall.FILLER), len(recall.FILLER))
    counts.index_put_((text[:-1], text[1:]), torch.ones(len(text) - 1), accumulate=True)
    assert (counts > 0).sum(1).max() == 3
    chances = counts / counts.sum(1, keepdim=True).clamp_min(1)
    nats = -(torch.special.xlogy(chances, chances).sum(1) * counts.sum(1)).sum() / counts.sum()
    assert nats.item() == pytest.approx(0.898, abs=0.01)  # -0.6 ln 0.6 - 0.3 ln 0.3 - 0.1 ln 0.1


def test_training_texts_mark_what_answers():
    generator = torch.Generator().manual_seed(0)
    batch = recall._batch(recall.filler(5000, generator), 64, 80, 9, generator)
    rows = torch.arange(64)[:, None]
    found = batch.ids[rows, batch.value_at]
    known = batch.answerable
    assert 0.8 < known.float().mean() < 1
    assert torch.equal(found[known], batch.ids[rows, batch.key_at + 1][known])
    assert (batch.ids[rows, batch.key_at - 1] == recall.ASK).all()
    assert (batch.value_at < batch.key_at).all()
    asked = batch.ids[rows, batch.key_at]
    told = batch.ids[rows, batch.value_at - 1]
    assert torch.equal(told[known], asked[known])
    # The key of an unanswerable question is nowhere else.
    assert ((batch.ids[:, None] == asked[:, :, None]).sum(2) == 1 + known).all()


def test_recall_counts_right_answers():
    episodes = recall.episodes(4, 30, seed=6)
    wrong = torch.tensor([recall.BEGIN])
    assert recall.recall(lambda episode: episode.answer, episodes) == 1
    assert recall.recall(lambda episode: wrong, episodes) == 0
    first = episodes[0].answer
    assert recall.recall(lambda episode: first, episodes[:1]) == 1


def test_plain_answers_like_one_forward_pass():
    model, episode = recall.model(seed=1).eval(), recall.episodes(1, 40, seed=7)[0]
    ids = torch.cat([episode.document, episode.question])[None]
    want = model(input_ids=ids).logits[0, -1].argmax()
    assert recall.plain(model)(episode).tolist() == [want.item()]


def test_recall_training_lowers_the_loss():
    untrained = recall.model()
    before = untrained.config._attn_implementation
    losses = recall.train(untrained, lessons=((6, 16, 64, 1),))
    assert losses[-1] < losses[0] - 0.2
    assert untrained.config._attn_implementation == before


def test_bytelm_windows_begin_alike():
    windows = bytelm.validation(300, 3)
    assert windows.shape == (3, 300) and windows.dtype == torch.int64
    assert (windows[:, 0] == bytelm.BEGIN).all() and (windows[:, 1:] != bytelm.BEGIN).all()
    held_out = tinylm.corpus()[1]
    assert torch.equal(windows[0, 1:], held_out[1:300])
    assert torch.equal(windows[-1, 1:], held_out[-299:])
    with pytest.raises(UsageError, match="length=0"):
        bytelm.validation(0, 1)


def test_bytelm_training_lowers_the_loss():
    losses = bytelm.train(bytelm.model(), steps=3)
    assert losses[-1] < losses[0]
