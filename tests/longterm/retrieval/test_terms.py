import sqlite3
import string
import sysconfig
from pathlib import Path

import pytest

from holdfast.longterm.evaluation.locomo import load, path
from holdfast.longterm.retrieval import terms

LIBRARY = ("argparse", "difflib", "inspect", "smtplib", "textwrap", "turtle", "typing")
FOREIGN = [
    "Ünïcödé naïve ΣΊΣΥΦΟΣ ß İstanbul ſecond ẞ",
    "東京タワー 한국어 हिन्दी العربية עִבְרִית Пример Ёлка привет й",
    "a\u0301b \u0301c x² ½ Ⅷ O’Reilly don’t e-mail_addr foo_bar 3.14 C++",
    "ǘ ệ ṩ é ﬁne ﬀ",
    "a" * 61 + "ing " + "b" * 62 + "ing",
]


def by_fts5(texts: list[str]) -> list[list[str]]:
    base = sqlite3.connect(":memory:")
    base.execute("CREATE VIRTUAL TABLE t USING fts5(x, tokenize='porter unicode61')")
    base.executemany("INSERT INTO t(rowid, x) VALUES (?, ?)", enumerate(texts))
    base.execute("CREATE VIRTUAL TABLE v USING fts5vocab(t, instance)")
    found: list[list[str]] = [[] for _ in texts]
    for term, doc in base.execute("SELECT term, doc FROM v ORDER BY doc, offset"):
        found[doc].append(term)
    return found


def library() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    return [(folder / f"{name}.py").read_text() for name in LIBRARY]


def suffixed() -> str:
    """Words of every ending that Porter's rules know, after stems of several shapes."""
    endings = [*terms._STEP2, *terms._STEP3, *terms._STEP4, "sses", "ies", "eed", "ed", "ing", "y"]
    roots = ["tr", "rel", "condit", "hopp", "fil", "sky", "plaster", "oat", "controll", "yy", "nat"]
    return " ".join(root + end for root in roots for end in [*endings, "e", "ll", "s", ""])


@pytest.mark.parametrize("texts", [FOREIGN, library(), [suffixed(), string.printable]])
def test_stems_are_those_of_fts5(texts):
    assert [terms.stems(text) for text in texts] == by_fts5(texts)


def test_stems_of_conversations_are_those_of_fts5():
    if not path().exists():
        pytest.skip(f"{path()} is absent")
    texts = [turn.line for conversation in load(path()) for turn in conversation.turns]
    # FTS5's tables are older than some of the pictures people send, and take them for letters.
    texts = ["".join(c for c in text if ord(c) < 0x2000) for text in texts]
    assert [terms.stems(text) for text in texts] == by_fts5(texts)


def test_stems_by_hand():
    assert terms.stems("The Generalizations of RUNNING ponies, re-read!") == [
        "the", "gener", "of", "run", "poni", "re", "read",
    ]  # fmt: skip


def test_a_question_keeps_what_it_is_about():
    assert terms.query_terms("When did Melanie paint her sunrise paintings?") == [
        "melani", "paint", "sunris",
    ]  # fmt: skip


def test_a_question_of_stop_words_keeps_them():
    assert terms.query_terms("What was it?") == ["what", "wa", "it"]
    assert terms.query_terms(" ?! ") == []
