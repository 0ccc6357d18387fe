"""Documents with evidence spread among stop words: their first words, as they are and shortened."""

import gzip
import random
import re
import statistics
from itertools import accumulate
from pathlib import Path
from typing import Any

from holdfast.checks import Result, check
from holdfast.training.reduction import classify
from holdfast.training.reduction.classify import Setting, Texts
from holdfast.training.reduction.shrink import Shrink, read_stopwords

CLASSES, WORDS, STOP, EVIDENCE = 4, 600, 0.6, 0.06
TRAIN, TEST, SEEDS = 1200, 800, 2
MANUAL = Path("/usr/share/man")


def _zipf(n: int) -> list[float]:
    return list(accumulate(1 / rank for rank in range(1, n + 1)))


def world(seed: int, documents: int) -> Texts:
    """Stop words, words of no class and a few of a class, each kind Zipf-distributed and mixed."""
    rng = random.Random(seed)
    stop = sorted(read_stopwords("en", True))
    common = [f"w{i}" for i in range(1000)]
    own = [[f"c{c}x{i}" for i in range(20)] for c in range(CLASSES)]
    weights = {len(kind): _zipf(len(kind)) for kind in (stop, common, own[0])}
    texts, labels = [], []
    for i in range(documents):
        label = i % CLASSES
        text = []
        for _ in range(WORDS):
            if rng.random() < STOP:
                kind = stop
            elif rng.random() < EVIDENCE:
                # Half of the evidence points anywhere.
                kind = own[label if rng.random() < 0.5 else rng.randrange(CLASSES)]
            else:
                kind = common
            text += rng.choices(kind, cum_weights=weights[len(kind)])
        texts.append(" ".join(text))
        labels.append(label)
    return Texts(texts, labels, tuple(f"class {c}" for c in range(CLASSES)))


def _shortened(texts: Texts) -> Texts:
    return Texts(Shrink("en").transform(texts.texts), texts.labels, texts.names)


def _compare(train: Texts, test: Texts, seed: int, epochs: int) -> dict[str, float]:
    short = _shortened(train), _shortened(test)
    plans = {
        "raw_128": (train, test, 128),
        "raw_256": (train, test, 256),
        "shrunk_128": (*short, 128),
    }
    return {
        name: classify.accuracy(a, b, Setting(length=length, epochs=epochs), seed)
        for name, (a, b, length) in plans.items()
    }


def _manual(per_section: int = 190) -> Texts | None:
    """Pages of this machine's manual by section, without their formatting requests."""
    texts, labels, names = [], [], []
    for section in "23578":
        pages = sorted(MANUAL.glob(f"man{section}/*.gz"))
        read = [
            gzip.decompress(p.read_bytes()).decode(errors="replace") for p in pages[:per_section]
        ]
        plain = [re.sub(r"(?m)^[.'].*$|\\f.|\\.", " ", page) for page in read]
        plain = [page for page in plain if len(page.split()) > 200]
        if len(plain) >= 50:
            texts += plain
            labels += [len(names)] * len(plain)
            names.append(f"section {section}")
    return Texts(texts, labels, tuple(names)) if len(names) > 1 else None


@check(
    "shrink",
    claim="without stop words, 128 tokens classify like 256 as they stand, with less than a third "
    "of the bytes of 512",
)
def run(seed: int, full: bool = False) -> Result:
    runs = []
    for s in range(seed, seed + SEEDS):
        texts = world(s, TRAIN + TEST)
        train, test = texts.part(range(TRAIN)), texts.part(range(TRAIN, TRAIN + TEST))
        runs.append(_compare(train, test, s, epochs=4))
    mean = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
    kept = {length: classify.batch_bytes(length, 8, CLASSES) for length in (128, 512)}
    measured: dict[str, Any] = {
        "accuracy_shrunk_128": mean["shrunk_128"],
        "words_seen_shrunk_128": 128 / (1 - STOP) / WORDS,
        "saved_bytes_128": kept[128],
    }
    baseline: dict[str, Any] = {
        "name": "the first words as they stand, at equal epochs",
        "accuracy_raw_128": mean["raw_128"],
        "accuracy_raw_256": mean["raw_256"],
        "words_seen_raw_128": 128 / WORDS,
        "words_seen_raw_256": 256 / WORDS,
        "saved_bytes_512": kept[512],
    }
    if full:
        manual = _manual()
        if manual is None:
            measured["manual_pages"] = f"none under {MANUAL}"
        else:
            found = _compare(*manual.split(0.3, seed), seed, epochs=8)
            measured["manual_shrunk_128"] = found.pop("shrunk_128")
            baseline |= {f"manual_{name}": value for name, value in found.items()}
    return Result(
        measured,
        baseline,
        threshold=f"mean over {SEEDS} seeds: accuracy shrunk at 128 >= raw at 128 + 0.03 and >= "
        "raw at 256 - 0.02; saved bytes at 128 <= 0.3 x those at 512",
        passed=mean["shrunk_128"] >= mean["raw_128"] + 0.03
        and mean["shrunk_128"] >= mean["raw_256"] - 0.02
        and kept[128] <= 0.3 * kept[512],
    )
