"""Sentences on behaviour that become programs over the pose functions without a model.

Where a sentence gives no number, lengths are the animal's own, so that it fits any camera.
"""

import json
import re

from holdfast.errors import UsageError
from holdfast.longterm.tools.pose import Pose

SYMBOL = re.compile(r"<\|([^|<>]+)\|>")
_NUMBER = r"(\d+(?:\.\d+)?)"
_ANIMAL = r"(?:mouse|animal|rat|fly|fish)\s+(\d+)"


def phrase(text: str, pose: Pose) -> str:
    """A program for one of the phrases that are known without a model.

    Raises:
        UsageError: no phrase fits; says which there are.
    """
    text = text.strip().rstrip(".?! ")
    least = re.search(rf"\s*\bfor at least {_NUMBER} seconds?", text)
    if least:
        text = text.replace(least[0], "")
    first, *second = re.split(
        rf"\bbefore\b|\bat most {_NUMBER} seconds? before\b", text, maxsplit=1
    )
    subject = re.search(_ANIMAL, text)
    animal = subject[1] if subject else "0"
    min_len = least[1] if least else "0"
    if second:
        within, later = second[0] or "2", second[1]
        one, two = (_either(part, animal, min_len, pose) for part in (first, later))
        return f"return before({one}, {two}, {within})"
    return f"return {_either(text, animal, min_len, pose)}"


def _either(text: str, animal: str, min_len: str, pose: Pose) -> str:
    parts = [_both(part, animal, min_len, pose) for part in re.split(r"\bor\b", text)]
    while len(parts) > 1:
        parts[:2] = [f"either({parts[0]}, {parts[1]})"]
    return parts[0]


def _both(text: str, animal: str, min_len: str, pose: Pose) -> str:
    parts = []
    for part in re.split(r"\band\b|\bwhile\b", text):
        named = re.search(_ANIMAL, part)
        own = named[1] if named else animal
        parts.append(_clause(part.strip(), own, min_len, pose))
    while len(parts) > 1:
        parts[:2] = [f"both({parts[0]}, {parts[1]})"]
    return parts[0]


def _clause(text: str, animal: str, min_len: str, pose: Pose) -> str:
    if symbol := SYMBOL.search(text):
        return f"symbol({json.dumps(symbol[1])})"
    others = [n for n in re.findall(_ANIMAL, text) if n != animal]
    other = others[0] if others else None
    low = text.lower()
    if re.search(r"\b(chas|follow|pursu)", low) and other:
        test = (
            f"(distance({animal}, {other}) < 3 * size({animal})) & "
            f"(angle({animal}, {other}) < 0.8) & (speed({animal}) > size({animal})) & "
            f"(speed({other}) > size({other}))"
        )
        return f"events({test}, {max(float(min_len), 0.5):g}, 0.5)"
    if re.search(r"\b(freez|frozen|still|immobile|motionless)", low):
        return f"events(speed({animal}) < size({animal}) / 5, {max(float(min_len), 1):g}, 0.2)"
    if found := re.search(rf"\b(faster|slower) than {_NUMBER}", low):
        sign = "><"[found[1] == "slower"]
        return f"events(speed({animal}) {sign} {found[2]}, {min_len})"
    if (found := re.search(rf"\bcloser than {_NUMBER}", low)) and other:
        return f"events(distance({animal}, {other}) < {found[1]}, {min_len})"
    if re.search(r"\b(fac(es|ing)|look(s|ing)? at)", low) and other:
        return f"events(angle({animal}, {other}) < 0.5, {min_len})"
    for region in sorted(pose.regions, key=len, reverse=True):
        if re.search(rf"(?<!\w){re.escape(region.lower())}(?!\w)", low):
            return f"events(inside({animal}, {json.dumps(region)}), {min_len}, 0.2)"
    regions = f" ({', '.join(pose.regions)})" if pose.regions else ""
    raise UsageError(
        f"{text!r} is none of the phrases that are known without a model: mouse 0 chases mouse 1, "
        "freezes, is faster or slower than 5, closer than 5 to mouse 1, faces mouse 1, "
        f"is in a region{regions}, a <|symbol|>; joined by and, or, before. Give llm= for others"
    )
