"""Long-text shortening (053): drop words that say little, so that fewer tokens may do.

Keeps    the words that carry the class, in their order, within fewer tokens.
Form     text, before the tokenizer.
Bytes    saved activations in proportion to the tokens, those of eager attention to their square.
Source   Mutasodirin, Prasojo, Abka, Rasyidi, "Simple Hack for Transformers against Heavy Long-Text
         Classification on a Time- and Memory-Limited GPU Service", ICAICTA 2023; abstract read.
Departs  the paper does not say how it searches settings: `search` goes from one to the next and
         keeps the best so far. Negations stay unless asked otherwise.

Stop words, punctuation, rare words and repeated words can each go. Word counts come from the
training part only. When truncation at equal epochs is compared, what is compared is also how much
of the evidence was seen: shortened texts show more of it in the same number of tokens.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import UsageError
from holdfast.files import write_text

LANGUAGES = ("en", "id")
_SYMBOLS = (
    r"!-/:-@\[-`{-~\u00a1-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u00d7\u00f7"
    r"\u2010-\u27bf\u2e00-\u2e5f\u3001-\u3020\uff01-\uff0f\uff1a-\uff20\U0001f000-\U0001faff"
)
# Whatever is no symbol and no space belongs to words: also combining marks, which \w leaves out.
_WORD = rf"[^\s{_SYMBOLS}]+(?:['\u2019][^\s{_SYMBOLS}]+)*"
_UNITS = re.compile(rf"(?P<word>{_WORD})|(?P<space>\s+)|(?P<symbol>.)", re.DOTALL)


class Shrink:
    """Shorten texts word by word; also a transformer for scikit-learn's pipelines.

    `Shrink("en")(text)`; or `fit(training_texts)` and `transform(texts)`.

    Args:
        stopwords: "en", "id", a path to a file of words (those after a line "# negations" are
            negations), or None to keep all. An unknown language warns and keeps all.
        keep_punct: keep punctuation and other symbols.
        min_count: drop words that the training texts have fewer times; above 1 it needs `fit`.
        dedup: keep only the first occurrence of each word in a text.
        keep_negations: keep "not", "never", "don't", without which a text says the opposite.

    Raises:
        UsageError: a file that cannot be read, `min_count` below 1, or texts before `fit`.
    """

    def __init__(
        self,
        stopwords: str | Path | None = "en",
        keep_punct: bool = True,
        min_count: int = 1,
        dedup: bool = False,
        keep_negations: bool = True,
    ):
        if min_count < 1:
            raise UsageError(f"min_count={min_count} must be at least 1, which keeps every word")
        self.stopwords, self.keep_punct, self.min_count = stopwords, keep_punct, min_count
        self.dedup, self.keep_negations = dedup, keep_negations
        self._stop = read_stopwords(stopwords, keep_negations)
        self.counts_: Counter[str] | None = None

    def __call__(self, text: str) -> str:
        """The shortened text; a text of which no word would remain stays, with a warning."""
        if self.min_count > 1 and self.counts_ is None:
            raise UsageError(
                f"min_count={self.min_count} needs word counts; call fit(training_texts) first"
            )
        kept: list[str] = []
        last, gaps, first, near, dropped, lost = "", [], "", "", False, False
        seen: set[str] = set()
        for match in _UNITS.finditer(text):
            kind, unit = str(match.lastgroup), match.group()
            if kind == "space":
                gaps.append(unit)
                near = unit
                continue
            if not self._keeps(kind, unit, seen):
                first = first if dropped else near
                near, dropped, lost = "", True, lost or kind == "word"
                continue
            if not dropped:
                kept += gaps
            elif last:
                # A comma stays at the word before it, a bracket at the one after; words stay apart.
                space = first if last == "symbol" else near
                apart = (first or " ") if last == kind == "word" else ""
                kept.append(_line_break(gaps) or space or apart)
            kept.append(unit)
            last, gaps, near, dropped = kind, [], "", False
        if (lost and not seen) or (dropped and not last):
            warnings.warn(
                f"no word would remain of a text of {len(text)} characters; it is kept as it is",
                stacklevel=2,
            )
            return text
        kept += [_line_break(gaps)] if dropped else gaps
        return "".join(kept)

    def _keeps(self, kind: str, unit: str, seen: set[str]) -> bool:
        if kind == "symbol":
            return self.keep_punct
        word = _normal(unit)
        if word in self._stop:
            return False
        if self.min_count > 1 and self.counts_[word] < self.min_count:  # type: ignore[index]
            return False
        if self.dedup and word in seen:
            return False
        seen.add(word)
        return True

    def fit(self, texts: Iterable[str], y: Any = None) -> "Shrink":
        """Count the words of the training texts; `y` is ignored."""
        self.counts_ = Counter(_normal(word) for text in texts for word in words(text))
        return self

    def transform(self, texts: Iterable[str]) -> list[str]:
        return [self(text) for text in texts]

    def fit_transform(self, texts: Iterable[str], y: Any = None) -> list[str]:
        texts = list(texts)
        return self.fit(texts).transform(texts)

    # What scikit-learn asks of estimators, which need not be its subclasses.
    def get_params(self, deep: bool = True) -> dict[str, Any]:
        names = ("stopwords", "keep_punct", "min_count", "dedup", "keep_negations")
        return {name: getattr(self, name) for name in names}

    def set_params(self, **params: Any) -> "Shrink":
        counts = self.counts_
        self.__init__(**{**self.get_params(), **params})  # type: ignore[misc]
        self.counts_ = counts
        return self

    def __repr__(self) -> str:
        return f"Shrink({', '.join(f'{k}={v!r}' for k, v in self.get_params().items())})"


def combinations(stopwords: str | Path = "en") -> list[dict[str, Any]]:
    """The four transforms, each off or on, as arguments of `Shrink`; the first keeps everything."""
    return [
        {"stopwords": stop, "keep_punct": punct, "min_count": count, "dedup": dedup}
        for stop in (None, stopwords)
        for punct in (True, False)
        for count in (1, 2)
        for dedup in (False, True)
    ]


def words(text: str) -> list[str]:
    """The words of a text as they stand in it."""
    return [m.group() for m in _UNITS.finditer(text) if m.lastgroup == "word"]


def _normal(word: str) -> str:
    return word.casefold().replace("\u2019", "'")


def _line_break(gaps: list[str]) -> str:
    """Of the spaces around what was dropped, the one that breaks most lines; or nothing."""
    most = max(gaps, key=lambda gap: gap.count("\n"), default="")
    return most if "\n" in most else ""


def read_stopwords(source: str | Path | None, keep_negations: bool) -> frozenset[str]:
    """The stop words of a language, a file or None, as `Shrink` reads them."""
    if source is None:
        return frozenset()
    path = Path(source)
    if source in LANGUAGES:
        path = Path(__file__).with_name(f"stopwords_{source}.txt")
    elif not path.suffix and len(path.parts) == 1 and not path.is_file():
        warnings.warn(
            f"no stop words for language {str(source)!r}, only for {', '.join(LANGUAGES)}; all "
            "words are kept, or name a file of stop words",
            stacklevel=3,
        )
        return frozenset()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"stop words {source} cannot be read: {error}") from error
    plain, _, negations = text.partition("# negations")
    lists = [plain] if keep_negations else [plain, negations]
    lines = [line for part in lists for line in part.splitlines() if not line.startswith("#")]
    found = {_normal(word) for line in lines for word in line.split()}
    # A negation that someone's list also has among its other words is still one.
    return frozenset(found - set(negations.split()) if keep_negations else found)


def tokens_per_word(tokenize: Callable[[str], Sequence[Any]], texts: Iterable[str]) -> float:
    """How many tokens a tokenizer makes of a word; of several tokenizers, the least is best."""
    texts = list(texts)
    count = sum(len(words(text)) for text in texts)
    if not count:
        raise UsageError(f"{len(texts)} texts hold no word; give texts to compare tokenizers on")
    return sum(len(tokenize(text)) for text in texts) / count


def search(
    evaluate: Callable[[dict[str, Any]], float],
    space: Mapping[str, Sequence[Any]],
    log: str | Path,
) -> dict[str, Any]:
    """Choose settings one after the other, each while the others are the best so far.

    Args:
        evaluate: settings -> score, higher is better; called for one setting at a time.
        space: name -> values, in the order of the search; the first values are the start.
        log: a JSON file, written after each run. Where it exists, its runs are not repeated.

    Returns:
        `best`: the settings, `score`: theirs, and `runs`: how many were made in all.

    Raises:
        UsageError: an empty list of values, or a log of another space.
    """
    empty = [name for name, values in space.items() if not values]
    if empty or not space:
        raise UsageError(f"nothing to choose for {', '.join(empty) or 'an empty space'}")
    document = json.loads(json.dumps({name: list(values) for name, values in space.items()}))
    path, runs = Path(log), []
    if path.exists():
        known = _read_log(path)
        if known["space"] != document:
            raise UsageError(f"{path} is the log of another search; name another file")
        runs = known["runs"]
    scores = {json.dumps(run["settings"]): run["score"] for run in runs}

    def score_of(settings: dict[str, Any]) -> float:
        key = json.dumps(settings)
        if key not in scores:
            scores[key] = float(evaluate(dict(settings)))
            runs.append({"settings": settings, "score": scores[key]})
            write_text(path, json.dumps({"space": document, "runs": runs}, indent=1) + "\n")
        return scores[key]

    best = {name: values[0] for name, values in document.items()}
    score = score_of(best)
    for name, values in document.items():
        for value in values[1:]:
            tried = {**best, name: value}
            found = score_of(tried)
            if found > score:
                best, score = tried, found
    return {"best": best, "score": score, "runs": len(runs)}


def _read_log(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if {"space", "runs"} <= known.keys():
            return known
    except (OSError, ValueError, AttributeError):
        pass
    raise UsageError(f"{path} exists and is no log of a search; name another file")
