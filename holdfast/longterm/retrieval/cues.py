"""What a question or a turn says of itself at a glance, before any word or vector is compared.

English, but for the question mark; a text in another language gives no cue and loses nothing.
"""

import re
from datetime import UTC, datetime

from holdfast.longterm.language import dates
from holdfast.longterm.language.slots import listed
from holdfast.longterm.retrieval import terms
from holdfast.longterm.retrieval.vectors import LETTERS

WEEK = 7 * 86_400_000_000  # microseconds

# A question mark that ends a turn, whatever caption follows it.
_ASKS = re.compile(r"\?[\"'”’)\s]*(\[[^\]]*\]\s*)?$")
_WHEN = re.compile(
    r"^\W*(?:(?:since|until|till|by) )?when\b|\bhow (?:long|recently)\b"
    r"|\b(?:what|which) (?:date|day|week|weekend|month|year|time)\b",
    re.I,
)
# "May" is mostly no month.
_TIMES = listed("yesterday today tonight tomorrow ago last night week weekend month year")
_YEARS = map(str, range(1900, 2100))
TIMES = [terms.stem(word) for word in (*_TIMES, *sorted(dates.CALENDAR - {"may"}), *_YEARS)]


def asks(text: str) -> bool:
    """Whether a turn ends by asking."""
    return _ASKS.search(text) is not None


def asks_when(question: str) -> bool:
    """Whether an answer has a time in it, which has one of the stems `TIMES`."""
    return _WHEN.search(question) is not None


def periods(question: str, now: int | None) -> list[tuple[int, int]]:
    """When the days that a question names are told of, in microseconds since 1970.

    From their first moment until a week after their last: what happened is told soon. Last June
    and yesterday count from `now`; without it only what names its year is dated. No more is read
    than embedders read.
    """
    when = None if now is None else datetime.fromtimestamp(now / 1e6, UTC)
    return [
        (int(1e6 * period.lo.timestamp()), int(1e6 * period.hi.timestamp()) + WEEK)
        for period in dates.find(question[:LETTERS], when)
        if period.lo is not None and period.hi is not None
    ]
