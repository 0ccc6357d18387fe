"""Terms: the words of a text as SQLite's FTS5 counts them, so that both sides of BM25 agree.

`stems` equals FTS5's tokenizer `porter unicode61`: runs of letters and digits, folded to lower
case, Latin letters without their diacritics, English endings cut by Porter's algorithm (M. F.
Porter, "An algorithm for suffix stripping", 1980). Symbols newer than SQLite's character tables,
which FTS5 takes for letters, end a word here.
"""

import functools
import re
import unicodedata

# Words that a question or any sentence may have whatever it is about.
_STOP = """
    a about after again against all am an and any are aren as at be because been before being below
    between both but by can could couldn did didn do does doesn doing don down during each few for
    from further had hadn has hasn have haven having he her here hers herself him himself his how i
    if in into is isn it its itself just let me more most my myself no nor not now of off on once
    only or other our ours ourselves out over own s same she should so some such t than that the
    their theirs them themselves then there these they this those through to too under until up
    very was wasn we were weren what when where which while who whom whose why will with won would
    you your yours yourself yourselves ll re ve m d
"""
STOP = frozenset(_STOP.split())
STEM_BYTES = 64  # FTS5 leaves longer tokens as they are


class _Folds(dict):
    """Code point -> what unicode61 makes of it; filled as characters turn up."""

    def __missing__(self, code: int) -> str:
        folded = self[code] = _fold(chr(code))
        return folded


def _fold(char: str) -> str:
    parts = unicodedata.normalize("NFD", char)
    if len(parts) == 2 and "LATIN" in unicodedata.name(parts[0], ""):
        char = parts[0]
    category = unicodedata.category(char)
    if category[0] in "LN" or category == "Co":
        folded = char.casefold()
        return folded if len(folded) == 1 else char.lower()
    # Combining accents belong to the letter before them; everything else ends a word.
    return "" if 768 <= ord(char) <= 817 else " "


_FOLDS = _Folds()

# Suffix and what replaces it; of those that fit only the longest is tried.
_STEP2 = {
    "ational": "ate",
    "tional": "tion",
    "enci": "ence",
    "anci": "ance",
    "izer": "ize",
    "logi": "log",
    "bli": "ble",
    "alli": "al",
    "entli": "ent",
    "eli": "e",
    "ousli": "ous",
    "ization": "ize",
    "ation": "ate",
    "ator": "ate",
    "alism": "al",
    "iveness": "ive",
    "fulness": "ful",
    "ousness": "ous",
    "aliti": "al",
    "iviti": "ive",
    "biliti": "ble",
}
_STEP3 = {
    "icate": "ic",
    "ative": "",
    "alize": "al",
    "iciti": "ic",
    "ical": "ic",
    "ful": "",
    "ness": "",
}
_ENDINGS = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize"
_STEP4 = dict.fromkeys(_ENDINGS.split(), "")
_UNDOUBLED = re.compile(r"([^aeioulsz])\1$")


def _shape(word: str) -> str:
    """One letter per letter: v for vowels, also a y after a consonant, c for the rest."""
    shape = "v"
    for letter in word:
        shape += "v" if letter in "aeiou" or (letter == "y" and shape[-1] == "c") else "c"
    return shape[1:]


def _measure(word: str) -> int:
    """How often vowels are followed by consonants."""
    return len(re.findall("v+c+", _shape(word)))


def _short_end(word: str) -> bool:
    """Whether it ends consonant, vowel, consonant, the last being none of w, x, y."""
    return _shape(word)[-3:] == "cvc" and word[-1] not in "wxy"


def _replace(word: str, suffixes: dict[str, str], above: int) -> str:
    """`word` with its longest suffix replaced if the measure of what stays is over `above`."""
    for length in range(min(7, len(word) - 1), 1, -1):
        if (suffix := word[-length:]) in suffixes:
            rest = word[:-length]
            fits = _measure(rest) > above and (suffix != "ion" or rest[-1] in "st")
            return rest + suffixes[suffix] if fits else word
    return word


def _plural(word: str) -> str:
    if not word.endswith("s") or word.endswith("ss"):
        return word
    if word.endswith("es") and ((word[-4:-2] == "ss" and len(word) > 4) or word[-3:] == "ies"):
        return word[:-2] if len(word) > 3 else word[:-1]
    return word[:-1]


def _past(word: str) -> str:
    if word.endswith("eed") and len(word) > 3:
        return word[:-1] if _measure(word[:-3]) else word
    ending = "ed" if word.endswith("ed") else "ing" if word.endswith("ing") else ""
    rest = word[: -len(ending)] if ending else ""
    if "v" not in _shape(rest):
        return word
    if rest.endswith(("at", "bl", "iz")) and len(rest) > 2:
        return rest + "e"
    if _UNDOUBLED.search(rest):
        return rest[:-1]
    return rest + "e" if _measure(rest) == 1 and _short_end(rest) else rest


def _porter(word: str) -> str:
    word = _past(_plural(word))
    if word.endswith("y") and "v" in _shape(word[:-1]):
        word = word[:-1] + "i"
    word = _replace(_replace(_replace(word, _STEP2, 0), _STEP3, 0), _STEP4, 1)
    if word.endswith("e"):
        rest = word[:-1]
        if (m := _measure(rest)) > 1 or (m == 1 and not _short_end(rest)):
            word = rest
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


@functools.lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """One folded word without its English ending."""
    letters = word.encode()
    if not 3 <= len(letters) <= STEM_BYTES:
        return word
    # FTS5 counts bytes: a letter outside ASCII is several consonants.
    return _porter(letters.decode("latin-1")).encode("latin-1").decode(errors="replace")


def words(text: str) -> list[str]:
    """The folded words of `text`, in order."""
    return text.translate(_FOLDS).split()


def stems(text: str) -> list[str]:
    """The terms of `text` in order, repeats included."""
    return [stem(word) for word in words(text)]


def query_terms(text: str) -> list[str]:
    """Distinct terms of a question in order without stop words, or with them if all are."""
    asked = words(text)
    chosen = [word for word in asked if word not in STOP] or asked
    return list(dict.fromkeys(map(stem, chosen)))
