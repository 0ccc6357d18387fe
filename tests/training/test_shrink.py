import json
import pickle
import random
import warnings

import pytest
import torch
from torch import nn

from holdfast.errors import UsageError
from holdfast.training.reduction.classify import (
    Encoder,
    Setting,
    Texts,
    Vocabulary,
    accuracy,
    batch_bytes,
    evidence,
    read_folders,
    steps,
)
from holdfast.training.reduction.shrink import Shrink, combinations, search, tokens_per_word, words

# A sentence that has everything that could go wrong, in pieces to be mixed.
PIECES = [
    *("the", "The", "cat", "not", "don't", "don\u2019t", "it's", "a", "of", "rare", "rare", "3.14"),
    *("cafe\u0301", "\u0939\u093f\u0928\u094d\u0926\u0940", "x_y", "\u4e2d\u6587", "\U0001f600"),
    *("'", "\u2019", "(", ")", "-", "\u2014", ".", ",", "!", "\u3002"),
    *("\n", "\n\n", " ", "  ", "\t", "\u00a0"),
]


def mixed(seed, joiner):
    rng = random.Random(seed)
    return joiner.join(rng.choices(PIECES, k=rng.randrange(30)))


def is_part(short, full):
    rest = iter(full)
    return all(any(word == other for other in rest) for word in short)


@pytest.mark.parametrize("settings", combinations(), ids=str)
@pytest.mark.parametrize("joiner", ["", " "], ids=["glued", "apart"])
def test_idempotent_ordered_and_never_longer(settings, joiner):
    texts = [mixed(seed, joiner) for seed in range(40)]
    shrink = Shrink(**settings).fit(texts[:30])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for text in texts:
            short = shrink(text)
            assert shrink(short) == short
            assert is_part(words(short), words(text))
            assert len(words(short)) <= len(words(text))
            assert len(short.split()) <= len(text.split()) or not settings["keep_punct"]


@pytest.mark.parametrize("seed", range(40))
def test_with_everything_off_texts_stay_byte_for_byte(seed):
    text = mixed(seed, "")
    assert Shrink(None)(text) == text
    assert Shrink(None).transform([text, ""]) == [text, ""]


@pytest.mark.parametrize(
    ("settings", "text", "want"),
    [
        ({}, "The cat sat on the mat.", "cat sat mat."),
        ({}, "It is not what they don\u2019t say.", "not don\u2019t say."),
        ({"keep_negations": False}, "It is not what they don\u2019t say.", "say."),
        ({}, "one\n\nof two\nparagraphs", "two\nparagraphs"),
        ({}, "first\n\nthe second", "first\n\nsecond"),
        ({"stopwords": None, "keep_punct": False}, "well-known: (yes)", "well known yes"),
        ({"stopwords": None, "dedup": True}, "Dog bites dog, dog barks", "Dog bites, barks"),
        ({}, "Look (at the cat), it sat", "Look (cat), sat"),
        ({"stopwords": "id"}, "Saya tidak membaca buku itu.", "tidak membaca buku."),
    ],
)
def test_by_hand(settings, text, want):
    assert Shrink(**settings)(text) == want


def test_counts_come_from_the_training_part():
    shrink = Shrink(None, min_count=2)
    with pytest.raises(UsageError, match="call fit"):
        shrink("a text")
    assert shrink.fit_transform(["red blue red", "Blue green"]) == ["red blue red", "Blue"]
    # In the test part a word may be frequent, and is rare all the same.
    assert shrink.transform(["green green green red"]) == ["red"]


def test_what_would_be_empty_stays_with_a_warning():
    for shrink, text in ((Shrink(), "It is the."), (Shrink(None, keep_punct=False), "?!")):
        with pytest.warns(UserWarning, match="no word would remain"):
            assert shrink(text) == text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Shrink()("") == "" and Shrink()("...") == "..."


def test_unknown_language_warns_and_keeps_the_text():
    with pytest.warns(UserWarning, match="no stop words for language 'xx', only for en, id"):
        shrink = Shrink("xx")
    assert shrink("the cat of the house") == "the cat of the house"


def test_own_lists(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("# mine\nfoo bar\n# negations\nbaz\n", encoding="utf-8")
    assert Shrink(path)("foo baz qux") == "baz qux"
    assert Shrink(str(path), keep_negations=False)("foo baz qux") == "qux"
    with pytest.raises(UsageError, match=r"absent\.txt cannot be read"):
        Shrink(tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="min_count=0"):
        Shrink(min_count=0)


def test_parameters_can_be_read_and_set_like_an_estimators():
    shrink = Shrink("id", keep_punct=False, min_count=3).fit(["satu dua"])
    twin = Shrink(**shrink.get_params())
    assert twin.get_params() == shrink.get_params() and twin.counts_ is None
    assert shrink.set_params(min_count=1, stopwords=None) is shrink
    assert shrink("ini, itu") == "ini itu" and shrink.counts_["satu"] == 1
    assert pickle.loads(pickle.dumps(shrink)).get_params() == shrink.get_params()
    assert repr(Shrink()).startswith("Shrink(stopwords='en', keep_punct=True")


def test_in_a_pipeline_of_scikit_learn():
    pytest.importorskip("sklearn", reason="scikit-learn is optional")
    from sklearn.base import clone
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, labels = ["the red cat", "a red dog", "the blue cat", "blue dogs"] * 5, [0, 0, 1, 1] * 5
    pipeline = make_pipeline(Shrink(), CountVectorizer(), LogisticRegression())
    pipeline = clone(pipeline).set_params(shrink__dedup=True).fit(texts, labels)
    assert pipeline.predict(["red", "the blue"]).tolist() == [0, 1]
    assert "the" not in pipeline[1].vocabulary_


def test_tokens_per_word():
    assert tokens_per_word(list, ["ab cd", "e"]) == 6 / 3
    assert tokens_per_word(str.split, ["ab cd", "e"]) == 1
    with pytest.raises(UsageError, match="hold no word"):
        tokens_per_word(list, ["..."])


SPACE = {"lr": [1, 2, 3], "batch": [8, 16], "transform": [{"dedup": False}, {"dedup": True}]}


def score(settings):
    return (
        -abs(settings["lr"] - 2) + 0.5 * (settings["batch"] == 16) - settings["transform"]["dedup"]
    )


def test_the_search_goes_one_setting_at_a_time_and_resumes(tmp_path):
    log, calls = tmp_path / "log.json", []

    def evaluate(settings):
        if len(calls) == 3 and not log.with_suffix(".killed").exists():
            log.with_suffix(".killed").touch()
            raise KeyboardInterrupt
        calls.append(settings)
        return score(settings)

    with pytest.raises(KeyboardInterrupt):
        search(evaluate, SPACE, log)
    assert len(json.loads(log.read_text())["runs"]) == 3
    found = search(evaluate, SPACE, log)
    # 1 start, then one for each other value: no run twice, though it was interrupted.
    assert len(calls) == found["runs"] == 1 + 2 + 1 + 1
    assert found["best"] == {"lr": 2, "batch": 16, "transform": {"dedup": False}}
    assert found["score"] == 0.5
    assert [c["lr"] for c in calls] == [1, 2, 3, 2, 2]
    assert search(evaluate, SPACE, log) == found and len(calls) == 5


def test_a_log_of_something_else_is_refused(tmp_path):
    log = tmp_path / "log.json"
    search(score, SPACE, log)
    with pytest.raises(UsageError, match="log of another search"):
        search(score, {**SPACE, "lr": [1]}, log)
    log.write_text("[]")
    with pytest.raises(UsageError, match="no log of a search"):
        search(score, SPACE, log)
    with pytest.raises(UsageError, match="nothing to choose for lr"):
        search(score, {"lr": []}, log)


def toy(n, seed):
    rng = random.Random(seed)
    texts = [
        " ".join(rng.choices(["the", "of", f"word{i % 2}", "other"], k=12)) + f" word{i % 2}"
        for i in range(n)
    ]
    return Texts(texts, [i % 2 for i in range(n)], ("zero", "one"))


def test_the_classifier_learns_what_can_be_seen():
    train, test = toy(120, 0).split(0.25, seed=0)
    assert len(train.texts) == 90 and sorted(test.labels) == [0] * 15 + [1] * 15
    setting, ticks = Setting(length=13, lr=1e-2), []
    before = torch.get_rng_state()
    right = accuracy(train, test, setting, on_step=lambda: ticks.append(1))
    assert right > 0.9 and right == accuracy(train, test, setting)
    assert len(ticks) == steps(90, setting) == 9
    assert torch.equal(before, torch.get_rng_state())


def test_vocabulary_and_padding():
    vocabulary = Vocabulary(["b a B", "c"], size=4)
    ids = vocabulary.encode(["b c a b b", ""], 4)
    assert ids.tolist() == [[2, 1, 3, 2], [0, 0, 0, 0]]
    assert len(vocabulary) == 4
    model = Encoder(4, 4, 2).eval()
    assert model(ids).isfinite().all()
    longer = nn.functional.pad(ids[:1, :2], (0, 2))
    torch.testing.assert_close(model(longer), model(ids[:1, :2]))


def test_attention_bytes_grow_with_the_square():
    kept = {length: batch_bytes(length, 4, 2) for length in (32, 64, 128)}
    square = [kept[64] - 2 * kept[32], kept[128] - 2 * kept[64]]
    assert square[1] / square[0] == pytest.approx(4, rel=0.1)


def test_evidence_is_the_share_of_words_within_the_length():
    assert evidence(["a b c d", "e f."], 1) == 2 / 6
    assert evidence(["a b c d"], 9) == 1


def test_folders(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} {i}")
    found = read_folders(tmp_path)
    assert found.names == ("one", "two") and found.labels == [0, 0, 1, 1]
    assert found.texts[3] == "two 1"
    with pytest.raises(UsageError, match="holds 0 folders"):
        read_folders(tmp_path / "one")
    with pytest.raises(UsageError, match="one folder per class"):
        read_folders(tmp_path / "absent")
