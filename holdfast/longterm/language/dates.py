"""Dates in English text, absolute and relative, as half-open intervals in UTC.

A day, week, month, season or year is the whole of it, in the reference time's own zone. Without a
reference time only what names its year is dated. A bare month or weekday is the last one that has
begun, unless the words say otherwise. English only.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta, tzinfo

from holdfast.errors import UsageError
from holdfast.longterm.language.slots import listed

MONTHS = {
    name: i
    for i, names in enumerate(
        listed(
            """january jan|february feb|march mar|april apr|may|june jun|july jul|august aug|
        september sept sep|october oct|november nov|december dec""",
            "|",
        ),
        1,
    )
    for name in names.split()
}
_DAYS = listed("monday tuesday wednesday thursday friday saturday sunday")
CALENDAR = frozenset([*MONTHS, *_DAYS])
_SEASONS = {"spring": 3, "summer": 6, "fall": 9, "autumn": 9, "winter": 12}
_NUMBERS = {
    name: i
    for i, name in enumerate(
        listed("zero one two three four five six seven eight nine ten eleven twelve")
    )
} | {"a": 1, "an": 1, "couple of": 2, "a couple of": 2, "a couple": 2}
# "A few weeks ago" is one of these weeks.
_VAGUE = {"few": (2, 5), "a few": (2, 5), "several": (3, 8), "some": (2, 5)}

_MONTH = r"(?P<month>{})\.?".format("|".join(sorted(MONTHS, key=len, reverse=True)))
_YEAR = r"(?P<year>(?:19|20)\d\d)"
_DAY = r"(?P<day>[0-3]?\d)(?:st|nd|rd|th)?"
_COUNT = r"(?P<count>\d+|{})".format("|".join(sorted([*_NUMBERS, *_VAGUE], key=len, reverse=True)))
_UNIT = r"(?P<unit>day|week|month|year)s?"
_WHEN = r"(?P<side>last|past|previous|this|next|coming)"
_SPAN = r"(?P<span>week|month|year|weekend|night|{}|{}|{})".format(
    "|".join(_DAYS),
    "|".join(_SEASONS),
    "|".join(sorted(MONTHS, key=len, reverse=True)),
)


@dataclass(frozen=True)
class Period:
    """A date found in a text.

    Attributes:
        start, end: characters of the text, with the preposition before the date.
        lo, hi: aware UTC, `lo <= t < hi`; None is open.
        text: what stands there.
    """

    start: int
    end: int
    lo: datetime | None
    hi: datetime | None
    text: str


def aware(when: datetime | None, name: str = "when") -> datetime | None:
    """`when` itself.

    Raises:
        UsageError: it has no time zone.
    """
    if when is not None and when.utcoffset() is None:
        raise UsageError(
            f"{name}={when:%Y-%m-%d %H:%M} has no time zone; facts are stored in UTC.\n"
            "Pass an aware datetime, e.g. datetime(2024, 5, 8, 13, 56, tzinfo=timezone.utc)."
        )
    return when


def find(text: str, when: datetime | None = None) -> list[Period]:
    """Every date in `text`, in order, none overlapping; relative ones count from `when`.

    Raises:
        UsageError: `when` has no time zone.
    """
    aware(when)
    today = when.date() if when else None
    zone = (when.tzinfo if when else None) or UTC
    found: list[Period] = []
    taken = [False] * len(text)
    for pattern, read in _RULES:
        for match in pattern.finditer(text):
            if any(taken[match.start() : match.end()]):
                continue
            try:
                days = read(match, today)
            except (ValueError, OverflowError):  # no such day: 31 June, year 20000
                continue
            if days is None:
                continue
            taken[match.start() : match.end()] = [True] * (match.end() - match.start())
            found.append(_period(text, match.start(), match.end(), days, zone, when))
    return sorted(_joined(text, sorted(found, key=lambda p: p.start)), key=lambda p: p.start)


def parse(text: str, when: datetime | None = None) -> Period | None:
    """The first date in `text`, or None."""
    return next(iter(find(text, when)), None)


def ahead(period: Period, when: datetime | None) -> Period:
    """A plan's "in July" or "on Friday": the next one after `when`, where the last was found."""
    if when is None or period.lo is None or period.hi is None or period.hi > when:
        return period
    said = period.text.lower().split()
    if any(word.isdigit() or word in ("last", "past", "previous", "ago") for word in said):
        return period
    lo, hi = (moment.astimezone(when.tzinfo) for moment in (period.lo, period.hi))
    if said[-1] in _DAYS:
        lo, hi = lo + timedelta(days=7), hi + timedelta(days=7)
    elif said[-1] in MONTHS:
        lo, hi = lo.replace(year=lo.year + 1), hi.replace(year=hi.year + 1)
    return replace(period, lo=lo.astimezone(UTC), hi=hi.astimezone(UTC))


_Days = tuple[date, date]


def _period(
    text: str, start: int, end: int, days: _Days, zone: tzinfo, when: datetime | None
) -> Period:
    lo, hi = (datetime(d.year, d.month, d.day, tzinfo=zone).astimezone(UTC) for d in days)
    before = _PREPOSITION.search(text[:start])
    if before:
        start = before.start()
        word = before.group(1).lower()
        if word in ("since", "starting"):
            hi = None
        elif word in ("until", "till", "before", "by"):
            lo, hi = None, hi if word in ("until", "till", "by") else lo
        elif word == "after":
            lo, hi = hi, None
    if text[start:end].lower().startswith("for ") and when:
        hi = None
    return Period(start, end, lo, hi, text[start:end])


def _joined(text: str, found: list[Period]) -> list[Period]:
    """'From 2015 to 2019' is one period."""
    out: list[Period] = []
    for one in found:
        last = out[-1] if out else None
        between = text[last.end : one.start].lower().strip() if last else None
        if (
            last
            and last.lo
            and one.hi
            and between in ("to", "and", "-", "–", "through", "")
            and re.match(r"(from|between)\b", last.text, re.I)
            and (between or re.match(r"(until|till)\b", one.text, re.I))
        ):
            out[-1] = Period(last.start, one.end, last.lo, one.hi, text[last.start : one.end])
        else:
            out.append(one)
    return out


_PREPOSITION = re.compile(
    r"\b(since|starting|until|till|before|by|after|from|between|in|on|during|at|of|around|about)\s+"
    r"(?:about |around |early |late |mid-?|the )?(?:of )?$",
    re.I,
)


def _month(year: int, month: int, count: int = 1) -> _Days:
    last = year * 12 + month - 1 + count
    return date(year, month, 1), date(last // 12, last % 12 + 1, 1)


def _day(day: date, count: int = 1) -> _Days:
    return day, day + timedelta(days=count)


def _shift(day: date, months: int) -> date:
    index = day.year * 12 + day.month - 1 + months
    first = date(index // 12, index % 12 + 1, 1)
    length = (_month(first.year, first.month)[1] - first).days
    return first.replace(day=min(day.day, length))


def _iso(match: re.Match[str], today: date | None) -> _Days:
    year, month, day = match.group("y", "m", "d")
    if day is None:
        return _month(int(year), int(month))
    return _day(date(int(year), int(month), int(day)))


def _full(match: re.Match[str], today: date | None) -> _Days | None:
    """8 May, 2023 or May 8th; without a year the one nearest to the reference."""
    month, day = MONTHS[match["month"].lower()], int(match["day"])
    if match["year"]:
        return _day(date(int(match["year"]), month, day))
    if today is None:
        return None
    options = [date(today.year + i, month, day) for i in (-1, 0, 1)]
    return _day(min(options, key=lambda d: abs((d - today).days)))


def _month_year(match: re.Match[str], today: date | None) -> _Days:
    return _month(int(match["year"]), MONTHS[match["month"].lower()])


def _bare_month(match: re.Match[str], today: date | None) -> _Days | None:
    if today is None:
        return None
    month = MONTHS[match["month"].lower()]
    return _month(today.year - (month > today.month), month)


def _year(match: re.Match[str], today: date | None) -> _Days:
    year = int(match["year"])
    return date(year, 1, 1), date(year + 1, 1, 1)


def _word(match: re.Match[str], today: date | None) -> _Days | None:
    if today is None:
        return None
    word = match[0].lower()
    away = 2 if word.startswith("the day") else 1
    if "yesterday" in word or word == "last night":
        return _day(today - timedelta(days=away))
    if "tomorrow" in word:
        return _day(today + timedelta(days=away))
    return _day(today)


def _counted(match: re.Match[str]) -> tuple[int, int]:
    word = match["count"].lower()
    if word in _VAGUE:
        return _VAGUE[word]
    return (int(word),) * 2 if word.isdigit() else (_NUMBERS[word],) * 2


def _ago(match: re.Match[str], today: date | None) -> _Days | None:
    return _away(match, today, -1)


def _ahead(match: re.Match[str], today: date | None) -> _Days | None:
    return _away(match, today, 1)


def _away(match: re.Match[str], today: date | None, sign: int) -> _Days | None:
    """Two weeks ago is the week around that day, three months ago that month."""
    if today is None:
        return None
    ends = [_unit_at(today, match["unit"].lower(), sign * count) for count in _counted(match)]
    return min(lo for lo, _ in ends), max(hi for _, hi in ends)


def _unit_at(today: date, unit: str, count: int) -> _Days:
    if unit == "day":
        return _day(today + timedelta(days=count))
    if unit == "week":
        return _day(today + timedelta(weeks=count) - timedelta(days=3), 7)
    if unit == "month":
        there = _shift(today, count)
        return _month(there.year, there.month)
    return date(today.year + count, 1, 1), date(today.year + count + 1, 1, 1)


def _lasting(match: re.Match[str], today: date | None) -> _Days | None:
    """'For four years' began four years ago."""
    if today is None:
        return None
    count, unit = _counted(match)[1], match["unit"].lower()
    start = {
        "day": lambda: today - timedelta(days=count),
        "week": lambda: today - timedelta(weeks=count),
        "month": lambda: _shift(today, -count),
        "year": lambda: _shift(today, -12 * count),
    }[unit]()
    return start, today + timedelta(days=1)


def _sided(match: re.Match[str], today: date | None) -> _Days | None:
    """Last Friday, this weekend, next month, last May."""
    if today is None:
        return None
    side, span = match["side"].lower(), match["span"].lower()
    step = {"this": 0, "next": 1, "coming": 1}.get(side, -1)
    monday = today - timedelta(days=today.weekday())
    if span == "night":
        return _day(today + timedelta(days=step))
    if span == "week":
        return _day(monday + timedelta(weeks=step), 7)
    if span == "weekend":
        saturday = monday + timedelta(days=5)
        # On a weekend "last weekend" is the one before, on Friday the one just past.
        return _day(saturday + timedelta(weeks=step), 2)
    if span == "month":
        there = _shift(today.replace(day=1), step)
        return _month(there.year, there.month)
    if span == "year":
        return date(today.year + step, 1, 1), date(today.year + step + 1, 1, 1)
    if span in _DAYS:
        return _weekday(today, _DAYS.index(span), step)
    if span in _SEASONS:
        first = _SEASONS[span]
        years = [y for y in range(today.year - 2, today.year + 3)]
        return _nearest([_month(y, first, 3) for y in years], today, step)
    years = range(today.year - 2, today.year + 3)
    return _nearest([_month(y, MONTHS[span]) for y in years], today, step)


def _nearest(options: list[_Days], today: date, step: int) -> _Days:
    """Of yearly returning periods the last that is over, the next to come, or this year's."""
    if step < 0:
        return [one for one in options if one[1] <= today][-1]
    if step > 0:
        return next(one for one in options if one[0] > today)
    holds = [one for one in options if one[0] <= today < one[1]]
    return holds[0] if holds else next(one for one in options if one[0].year == today.year)


def _weekday(today: date, weekday: int, step: int) -> _Days:
    if step < 0:
        return _day(today - timedelta(days=(today.weekday() - weekday - 1) % 7 + 1))
    monday = today - timedelta(days=today.weekday())
    return _day(monday + timedelta(weeks=step, days=weekday))


def _bare_weekday(match: re.Match[str], today: date | None) -> _Days | None:
    return None if today is None else _weekday(today, _DAYS.index(match["weekday"].lower()), -1)


def _rule(pattern: str, read: Callable[[re.Match[str], date | None], _Days | None]):
    return re.compile(pattern, re.I), read


# Longer forms first: a later rule may not touch what an earlier one took.
_RULES = [
    _rule(r"\b(?P<y>(?:19|20)\d\d)-(?P<m>[01]\d)(?:-(?P<d>[0-3]\d))?\b(?!-)", _iso),
    _rule(rf"\b(?:the )?{_DAY} (?:of )?{_MONTH},? {_YEAR}\b", _full),
    _rule(rf"\b{_MONTH} {_DAY},? {_YEAR}\b", _full),
    _rule(rf"\b{_MONTH},? (?:of )?{_YEAR}\b", _month_year),
    _rule(rf"\b(?:the )?{_DAY} (?:of )?{_MONTH}(?P<year>)\b", _full),
    _rule(rf"\b{_MONTH} {_DAY}(?P<year>)\b(?! ?%)", _full),
    _rule(r"\bthe day before yesterday\b|\bthe day after tomorrow\b", _word),
    _rule(r"\b(?:yesterday|today|tonight|tomorrow|this (?:morning|afternoon|evening))\b", _word),
    _rule(r"\blast night\b", _word),
    _rule(rf"\b{_COUNT} {_UNIT} (?:ago|back|earlier)\b", _ago),
    _rule(rf"\b(?:in|within) {_COUNT} {_UNIT}(?:'s? time)?\b", _ahead),
    _rule(rf"\b{_COUNT} {_UNIT} from now\b", _ahead),
    _rule(
        rf"\bfor (?:the (?:last|past) )?(?:about |over |almost |nearly )?{_COUNT} {_UNIT}"
        r"(?: now)?\b",
        _lasting,
    ),
    _rule(rf"\b(?:the )?{_WHEN} {_SPAN}\b", _sided),
    _rule(r"(?<![\d$€£.,-])\b" + _YEAR + r"\b(?![\d%]|[.,-]\d)", _year),
    _rule(rf"(?<=\bin ){_MONTH}\b", _bare_month),
    _rule(rf"(?<=\bsince ){_MONTH}\b", _bare_month),
    _rule(r"(?<=\bon )(?P<weekday>{})\b".format("|".join(_DAYS)), _bare_weekday),
]
