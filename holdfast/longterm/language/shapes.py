"""JSON that a model sends: parsed as data, checked against the part of JSON Schema we use."""

import json
import re
from collections.abc import Mapping
from typing import Any

from holdfast.errors import HoldfastError, UsageError

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_CHECKED = {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "enum",
    "anyOf",
    "minItems",
    "maxItems",
    "minimum",
    "maximum",
}
_NOTES = {"title", "description", "default", "examples", "$schema"}
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.S | re.I)


class LLMError(HoldfastError):
    """A model did not answer, or answered something other than what was asked."""


def record(**properties: Mapping[str, Any]) -> dict[str, Any]:
    """Schema of an object with exactly these properties, all required."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def listing(items: Mapping[str, Any]) -> dict[str, Any]:
    """Schema of an array of `items`."""
    return {"type": "array", "items": items}


def parse(reply: str) -> Any:
    """The JSON value in a model's reply, which may be fenced or wrapped in prose.

    Raises:
        ValueError: no JSON object or array is in it.
    """
    for text in [reply, *_FENCE.findall(reply)]:
        try:
            return json.loads(text, parse_constant=_no_constant)
        except ValueError:
            pass
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    for match in re.finditer(r"[{\[]", reply):
        try:
            return decoder.raw_decode(reply, match.start())[0]
        except ValueError:
            continue
    raise ValueError(f"no JSON in {reply[:120]!r}")


def problem(value: Any, schema: Mapping[str, Any], path: str = "$") -> str | None:
    """The first way in which `value` breaks `schema`, as a sentence; None if it does not.

    Raises:
        UsageError: the schema has a keyword that would go unchecked.
    """
    strange = set(schema) - _CHECKED - _NOTES
    if strange:
        raise UsageError(
            f"schema at {path} uses {', '.join(sorted(strange))}, which is not checked here; "
            f"use {', '.join(sorted(_CHECKED))}"
        )
    if "anyOf" in schema:
        tried = [problem(value, option, path) for option in schema["anyOf"]]
        if all(tried):
            return f"{path} fits none of {len(tried)} alternatives; the last one: {tried[-1]}"
    if "enum" in schema and not any(_equal(value, one) for one in schema["enum"]):
        return f"{path} is {_short(value)}, expected one of {_short(schema['enum'])}"
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(_is(value, name) for name in names):
            return f"{path} is {_short(value)}, expected {' or '.join(names)}"
    if isinstance(value, dict):
        return _object_problem(value, schema, path)
    if isinstance(value, list):
        return _array_problem(value, schema, path)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if "minimum" in schema and not value >= schema["minimum"]:
            return f"{path} is {value}, expected at least {schema['minimum']}"
        if "maximum" in schema and not value <= schema["maximum"]:
            return f"{path} is {value}, expected at most {schema['maximum']}"
    return None


def _object_problem(value: dict[str, Any], schema: Mapping[str, Any], path: str) -> str | None:
    known = schema.get("properties", {})
    for name in schema.get("required", []):
        if name not in value:
            return f"{path} lacks {name!r}"
    extra = schema.get("additionalProperties", True)
    for name, one in value.items():
        inner = known.get(name, extra)
        if inner is False:
            return f"{path} has {name!r}, which is not among {', '.join(known)}"
        if inner is not True and (found := problem(one, inner, f"{path}.{name}")):
            return found
    return None


def _array_problem(value: list[Any], schema: Mapping[str, Any], path: str) -> str | None:
    if len(value) < schema.get("minItems", 0):
        return f"{path} has {len(value)} items, expected at least {schema['minItems']}"
    if len(value) > schema.get("maxItems", len(value)):
        return f"{path} has {len(value)} items, expected at most {schema['maxItems']}"
    for i, one in enumerate(value):
        if found := problem(one, schema.get("items", {}), f"{path}[{i}]"):
            return found
    return None


def _is(value: Any, name: str) -> bool:
    if name not in _TYPES:
        raise UsageError(f"schema type {name!r} is none of {', '.join(_TYPES)}")
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES[name]) or (
        # JSON has one kind of number: 3.0 is an integer.
        name == "integer" and isinstance(value, float) and value.is_integer()
    )


def _equal(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
