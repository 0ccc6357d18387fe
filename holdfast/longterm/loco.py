"""LoCo: retrieval of whole long documents: how it is scored, and how M2-BERT (097) is trained.

Form     a task is documents, queries and graded judgements, by id; on disk two JSON Lines files.
Bytes    training holds one document's activations at a time, however many negatives it has.
Source   Saad-Falcon, Fu, Arora, Guha, Ré, "Benchmarking and Building Long-Context Retrieval Models
         with LoCo and M2-BERT", ICML 2024.
Departs  the paper leaves the sum over negatives open. It is a sum: with their mean, vectors that
         are all at cos 0.5 lose 0.75, less than most good answers do, and training ends there.
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import UsageError, unknown
from holdfast.longterm.m2bert import M2Encoder
from holdfast.longterm.retrieval.vectors import Embedder

LOSSES = ("opl", "in_batch")
TEMPERATURE = 0.05  # of the in-batch softmax
DOCUMENTS, QUERIES = "documents.jsonl", "queries.jsonl"
Qrels = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Triple:
    """A query, the text that answers it, and texts that do not."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Documents and queries by id, and for each query the ids that answer it, with a grade >= 1."""

    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Qrels


def opl(query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
    """Orthogonal projection loss of one query: it has a gradient at batch size 1.

    Args:
        query, positive: (d) unit vectors.
        negatives: (k,d) unit vectors, k may be 0.

    Returns:
        (1 - cos(q,p)) + sum of cos(q,n)^2, a scalar.
    """
    return 1 - query @ positive + (negatives @ query).square().sum()


def in_batch(queries: Tensor, positives: Tensor) -> Tensor:
    """Softmax loss in which the other rows' positives are the negatives: (B,d), (B,d) -> scalar.

    With one row there are none: the loss is 0 and so is its gradient.
    """
    scores = queries @ positives.T / TEMPERATURE
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def train_retriever(
    encoder: M2Encoder,
    triples: Iterable[Triple],
    *,
    loss: str = "opl",
    batch: int = 1,
    lr: float = 1e-3,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the encoder in place, one pass over the triples; returns the loss of each step.

    With "opl" every text is read, differentiated and freed by itself; the gradients are those of
    the whole loss. "in_batch" holds all documents of a batch at once and ignores negatives.

    Args:
        triples: each is read once; may be a generator.
        loss: "opl" or "in_batch".
        batch: triples in one optimizer step.
        lr: the peak of one cycle of AdamW's rate where the triples can be counted, else constant.

    Raises:
        UsageError: an unknown loss, a batch below 1, or "in_batch" with a batch of 1, which cannot
            learn anything.
    """
    if loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    if batch < 1 or (loss == "in_batch" and batch == 1):
        raise UsageError(
            f"loss={loss!r} with batch={batch}: in-batch negatives need other rows, at batch 1 "
            "their gradient is exactly zero; give batch >= 2, or loss='opl' for any batch >= 1"
        )
    model = encoder.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = None
    if isinstance(triples, Sequence):
        steps = -(-len(triples) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(1, steps))
    was_training = model.training
    model.train()
    losses = []
    rest = iter(triples)
    while group := list(islice(rest, batch)):
        optimizer.zero_grad(set_to_none=True)
        value = _backward_in_batch(encoder, group) if loss == "in_batch" else 0.0
        if loss == "opl":
            value = sum(backward_opl(encoder, triple, 1 / len(group)) for triple in group)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(value)
        if on_step is not None:
            on_step(len(losses) - 1, value)
    model.train(was_training)
    return losses


def backward_opl(encoder: M2Encoder, triple: Triple, weight: float = 1.0) -> float:
    """Add the gradients of `weight` * opl to the model's, one text at a time; returns that loss."""
    query = _vector(encoder, triple.query)
    # Documents add to the gradient of this leaf; the query's own pass is differentiated last.
    leaf = query.detach().requires_grad_()
    total = 0.0
    for text in (triple.positive, *triple.negatives):
        vector = _vector(encoder, text)
        cosine = leaf @ vector
        part = 1 - cosine if text is triple.positive else cosine.square()
        (weight * part).backward()
        total += weight * part.item()
    query.backward(leaf.grad)
    return total


def _backward_in_batch(encoder: M2Encoder, group: Sequence[Triple]) -> float:
    queries = encoder.vectors([encoder.ids(triple.query) for triple in group])
    positives = encoder.vectors([encoder.ids(triple.positive) for triple in group])
    loss = in_batch(queries, positives)
    loss.backward()
    return loss.item()


def _vector(encoder: M2Encoder, text: str) -> Tensor:
    return encoder.vectors([encoder.ids(text)])[0]


def evaluate(
    encoder: Embedder,
    corpus: Mapping[str, str],
    queries: Mapping[str, str],
    qrels: Qrels,
    k: int = 10,
) -> dict[str, float]:
    """Mean nDCG@k and recall@k of exact cosine search, every document one vector.

    Returns:
        {"ndcg", "recall", "queries"}; queries without a judgement are not counted.

    Raises:
        UsageError: nothing to score, or a judgement names a document that is not there.
    """
    judged = [query for query in queries if any(g > 0 for g in qrels.get(query, {}).values())]
    if not judged or k < 1:
        raise UsageError(
            f"{len(judged)} of {len(queries)} queries have a judgement, k={k}; at least one query "
            "with a relevant document and k >= 1 are needed"
        )
    for query in judged:
        for document in qrels[query]:
            if document not in corpus:
                raise UsageError(f"query {query!r} is answered by {document!r}, not in the corpus")
    names = list(corpus)
    documents = encoder.encode([corpus[name] for name in names])
    vectors = np.stack([encoder.encode_query(queries[query]).vector for query in judged])
    order = np.argsort(-(vectors @ documents.T), axis=1, kind="stable")[:, :k]
    ndcg = recall = 0.0
    for query, row in zip(judged, order, strict=True):
        grades = qrels[query]
        found = [grades.get(names[place], 0) for place in row]
        ndcg += dcg(found) / dcg(sorted(grades.values(), reverse=True)[:k])
        recall += sum(g > 0 for g in found) / sum(g > 0 for g in grades.values())
    count = len(judged)
    return {"ndcg": ndcg / count, "recall": recall / count, "queries": count}


def dcg(grades: Sequence[int]) -> float:
    """Discounted cumulative gain of grades in the order in which they were found."""
    return sum((2**grade - 1) / math.log2(place + 2) for place, grade in enumerate(grades))


def load(folder: str | Path) -> Task:
    """A task from `documents.jsonl` (pid, passage) and `queries.jsonl` (qid, query, answer_pids).

    Raises:
        UsageError: a file is missing, or a line lacks a field; it is named.
    """
    documents = _lines(Path(folder) / DOCUMENTS, ("pid", "passage"))
    queries = _lines(Path(folder) / QUERIES, ("qid", "query", "answer_pids"))
    return Task(
        {str(row["pid"]): row["passage"] for row in documents},
        {str(row["qid"]): row["query"] for row in queries},
        {str(row["qid"]): {str(pid): 1 for pid in row["answer_pids"]} for row in queries},
    )


def _lines(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    if not path.exists():
        raise UsageError(f"{path} is missing; a task is a folder with {DOCUMENTS} and {QUERIES}")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            lacking = [name for name in fields if name not in row]
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: no JSON ({error})") from error
        if lacking:
            raise UsageError(f"{path}, line {number} lacks {', '.join(lacking)}")
        rows.append(row)
    return rows


def with_negatives(task: Task, count: int, seed: int = 0) -> list[Triple]:
    """One triple for each query and answer of a task, with random documents as negatives.

    Raises:
        UsageError: fewer than `count` documents are no answer to some query.
    """
    rng = random.Random(seed)
    names = list(task.corpus)
    triples = []
    for query, text in task.queries.items():
        wrong = [name for name in names if name not in task.qrels[query]]
        if len(wrong) < count:
            raise UsageError(
                f"{count} negatives for query {query!r}, but the corpus has {len(wrong)} documents "
                "that are no answer to it; give a lower count"
            )
        for answer in task.qrels[query]:
            negatives = tuple(task.corpus[name] for name in rng.sample(wrong, count))
            triples.append(Triple(text, task.corpus[answer], negatives))
    return triples
