import json
import math
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from holdfast.errors import UsageError
from holdfast.longterm import loco
from holdfast.longterm.loco import Task, Triple
from holdfast.longterm.m2bert import M2Bert, M2Config, M2Encoder
from holdfast.longterm.retrieval.vectors import Query
from holdfast.meter import Meter

WORDS = [f"w{i}" for i in range(200)]


def encoder(seed: int = 0, length: int = 256) -> M2Encoder:
    torch.manual_seed(seed)
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return M2Encoder(M2Bert(M2Config(200, 32, 1, 32, 4, length, 8)), made)


def text(*places: int) -> str:
    return " ".join(WORDS[i] for i in places)


def gradients(made: M2Encoder) -> list[torch.Tensor]:
    return [p.grad for p in made.model.parameters()]


def test_in_batch_negatives_learn_nothing_at_batch_1_and_opl_does():
    made = encoder()
    query, positive = (made.vectors([made.ids(t)]) for t in (text(1, 2), text(3, 4)))
    loss = loco.in_batch(query, positive)
    loss.backward()
    assert loss.item() == 0
    assert all(g is None or not g.any() for g in gradients(made))
    made.model.zero_grad()
    loco.backward_opl(made, Triple(text(1, 2), text(3, 4)))
    assert made.model.words.weight.grad.norm() > 1e-3


def test_in_batch_negatives_learn_at_batch_2():
    made = encoder()
    queries = made.vectors([made.ids(text(1)), made.ids(text(2))])
    positives = made.vectors([made.ids(text(3)), made.ids(text(4))])
    loco.in_batch(queries, positives).backward()
    assert made.model.words.weight.grad.norm() > 1e-3


@pytest.mark.parametrize("negatives", [(), (text(5, 6),), (text(5, 6), text(7), text(8, 9, 10))])
def test_streamed_gradients_are_those_of_the_whole_loss(negatives):
    made = encoder()
    triple = Triple(text(1, 2), text(3, 4), negatives)
    value = loco.backward_opl(made, triple, 0.5)
    streamed = [g.clone() for g in gradients(made)]
    made.model.zero_grad()
    rows = [made.vectors([made.ids(t)])[0] for t in (triple.query, triple.positive, *negatives)]
    whole = 0.5 * loco.opl(rows[0], rows[1], torch.stack(rows)[2:])
    whole.backward()
    assert value == pytest.approx(whole.item(), abs=1e-6)
    for a, b in zip(streamed, gradients(made), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_opl_by_hand():
    query, positive = torch.tensor([1.0, 0]), torch.tensor([0.6, 0.8])
    negatives = torch.tensor([[0.0, 1], [-1, 0]])
    assert loco.opl(query, positive, negatives).item() == pytest.approx(0.4 + 1)
    assert loco.opl(query, positive, negatives[:0]).item() == pytest.approx(0.4)


def test_more_negatives_hold_no_more_bytes():
    made, peaks = encoder(), []
    rng = random.Random(0)
    long = [text(*rng.choices(range(200), k=256)) for _ in range(8)]
    for count in (1, 1, 7):  # the first run warms kernels up
        made.model.zero_grad(set_to_none=True)
        with Meter(made.model) as meter:
            loco.backward_opl(made, Triple(text(1), long[0], tuple(long[1 : 1 + count])))
        peaks.append(meter.peak - meter.base)
    assert peaks[2] <= 1.05 * peaks[1]


@pytest.mark.parametrize(("loss", "batch", "count"), [("opl", 2, 120), ("in_batch", 8, 160)])
def test_training_finds_what_comes_late(loss, batch, count):
    """A document is 20 words of noise, then its topic's words; a query is other words of it."""
    rng = random.Random(0)
    noise, topics = range(100), [range(100 + 10 * i, 110 + 10 * i) for i in range(5)]

    def document(topic):
        return text(*rng.choices(noise, k=20), *rng.choices(topics[topic][:5], k=8))

    def query(topic):
        return text(*rng.choices(topics[topic][5:], k=4))

    triples = []
    for _ in range(count):
        right, *wrong = rng.sample(range(5), 3)
        triples.append(Triple(query(right), document(right), tuple(map(document, wrong))))
    corpus = {str(i): document(i) for i in range(5)}
    queries = {f"q{i}": query(i % 5) for i in range(20)}
    qrels = {f"q{i}": {str(i % 5): 1} for i in range(20)}
    made = encoder()
    before = loco.evaluate(made, corpus, queries, qrels, k=1)
    losses = loco.train_retriever(made, triples, loss=loss, batch=batch, lr=1e-2)
    after = loco.evaluate(made, corpus, queries, qrels, k=1)
    assert len(losses) == count / batch
    assert before["ndcg"] <= 0.5 < 0.8 <= after["ndcg"], (before, after)


def test_training_takes_a_generator_and_tells_of_steps():
    made, seen = encoder(), []
    triples = (Triple(text(i), text(i + 1), (text(i + 2),)) for i in range(5))
    losses = loco.train_retriever(made, triples, batch=2, on_step=lambda *s: seen.append(s))
    assert seen == list(enumerate(losses)) and len(losses) == 3


class Fixed:
    """Vectors by name, to score by hand."""

    id, dim = "fixed", 2

    def __init__(self, angles):
        self.angles = angles

    def encode(self, texts):
        turned = [self.angles[t] for t in texts]
        return np.array([[math.cos(a), math.sin(a)] for a in turned], np.float32)

    def encode_query(self, text):
        return Query(text, self.encode([text])[0])


def test_ndcg_by_hand():
    made = Fixed({"q": 0.0, "a": 0.1, "b": 0.2, "c": 0.3, "d": 3.0})
    corpus = {name: name for name in "abcd"}
    got = loco.evaluate(made, corpus, {"x": "q"}, {"x": {"b": 2, "d": 1}}, k=3)
    # b is second: 3/log2(3); best is b then d: 3 + 1/log2(3).
    assert got["ndcg"] == pytest.approx(3 / math.log2(3) / (3 + 1 / math.log2(3)))
    assert got == {"ndcg": got["ndcg"], "recall": 0.5, "queries": 1}
    both = {"x": {"a": 1}, "y": {"d": 0}}
    assert loco.evaluate(made, corpus, {"x": "q", "y": "q"}, both)["queries"] == 1


def test_a_task_is_two_files(tmp_path):
    documents = [{"pid": "p1", "passage": "one"}, {"pid": 2, "passage": "two"}]
    queries = [{"qid": "q", "query": "which", "answer_pids": [2]}]
    for name, rows in ((loco.DOCUMENTS, documents), (loco.QUERIES, queries)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = loco.load(tmp_path)
    assert task == Task({"p1": "one", "2": "two"}, {"q": "which"}, {"q": {"2": 1}})
    assert loco.with_negatives(task, 1) == [Triple("which", "two", ("one",))]
    with pytest.raises(UsageError, match=r"3 negatives.*1 documents that are no answer"):
        loco.with_negatives(task, 3)
    (tmp_path / loco.QUERIES).write_text('{"qid": 1}\n')
    with pytest.raises(UsageError, match="line 1 lacks query, answer_pids"):
        loco.load(tmp_path)
    (tmp_path / loco.QUERIES).write_text("nothing\n")
    with pytest.raises(UsageError, match="line 1: no JSON"):
        loco.load(tmp_path)
    (tmp_path / loco.QUERIES).unlink()
    with pytest.raises(UsageError, match=r"queries\.jsonl is missing"):
        loco.load(tmp_path)


def test_errors():
    made = encoder()
    with pytest.raises(UsageError, match=r"at batch 1 their gradient is exactly zero.*loss='opl'"):
        loco.train_retriever(made, [], loss="in_batch")
    with pytest.raises(UsageError, match="batch=0"):
        loco.train_retriever(made, [], batch=0)
    with pytest.raises(UsageError, match=r"opl"):
        loco.train_retriever(made, [], loss="op")
    with pytest.raises(UsageError, match="0 of 1 queries have a judgement"):
        loco.evaluate(made, {"a": "w1"}, {"q": "w1"}, {})
    with pytest.raises(UsageError, match="'q' is answered by 'b', not in the corpus"):
        loco.evaluate(made, {"a": "w1"}, {"q": "w1"}, {"q": {"b": 1}})
