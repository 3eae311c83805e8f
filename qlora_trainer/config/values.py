"""Kinds of values of the config beyond plain numbers and texts: each checks and normalises what it is given.

Lists and mappings become tuples, so that a config stays frozen and can be hashed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import inf
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

from qlora_trainer.config.sizes import EXPECTED_SIZE, MAX_SIZE_BYTES, format_size, parse_size_bytes

Auto = Literal["auto"]


def _size_bytes(value: object) -> int:
    if isinstance(value, str):
        return parse_size_bytes(value)
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIZE_BYTES:
        return value
    raise ValueError(EXPECTED_SIZE)


def _path_text(value: str) -> str:
    if not value.strip() or "\0" in value:
        raise ValueError("a path or name that is not empty and has no NUL character")
    return value


def _names(value: object) -> tuple[str, ...]:
    if isinstance(value, (list, tuple)):
        names = tuple(name for name in value if isinstance(name, str) and name.strip())
        if len(names) == len(value) == len(set(names)):
            return names
    raise ValueError("a list of different, non-empty names")


def _paths(value: object) -> str | tuple[str, ...]:
    expected = "a path or pattern, or a list of different ones"
    if isinstance(value, str):
        return _path_text(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(path, str) for path in value):
        paths = tuple(_path_text(path) for path in value)
        if len(set(paths)) == len(paths):
            return paths
    raise ValueError(expected)


def _columns(value: object) -> tuple[tuple[str, str], ...]:
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if (
        isinstance(pairs, tuple)
        and pairs
        and all(isinstance(ours, str) and isinstance(theirs, str) and theirs for ours, theirs in pairs)
        and {ours for ours, _ in pairs} <= set(COLUMNS)
    ):
        return tuple(sorted(pairs))
    raise ValueError(f"a mapping from some of {', '.join(COLUMNS)} to names of columns in the file")


def _pattern(value: object, expected: str) -> tuple[tuple[str, Any], ...]:
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if isinstance(pairs, (list, tuple)) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        names = [name for name, _ in pairs if isinstance(name, str) and name]
        if len(names) == len(pairs) == len(set(names)):
            return tuple((name, number) for name, number in pairs)
    raise ValueError(f"a mapping from different module names to {expected}, such as {{q_proj: 32}}")


def _ranks(value: object) -> tuple[tuple[str, int], ...]:
    found = _pattern(value, "ranks")
    if all(type(rank) is int and rank >= 1 for _, rank in found):
        return found
    raise ValueError("whole numbers from 1 as ranks")


def _alphas(value: object) -> tuple[tuple[str, float], ...]:
    found = _pattern(value, "alphas")
    if all(type(alpha) in (int, float) and 0 < alpha < inf for _, alpha in found):
        return found
    raise ValueError("positive numbers as alphas")


def _layers(value: object) -> tuple[int, ...]:
    if isinstance(value, (list, tuple)):
        layers = tuple(layer for layer in value if type(layer) is int and layer >= 0)
        if layers and len(value) == len(set(layers)):
            return layers
    raise ValueError("a list of different numbers of layers, from 0")


def _tokens(value: object) -> tuple[int, ...]:
    if isinstance(value, (list, tuple)) and all(type(token) is int and 0 <= token < MAX_TOKEN for token in value):
        return tuple(value)
    raise ValueError("a list of numbers of tokens, from 0")


def _ranges(value: object) -> tuple[tuple[int, int], ...]:
    if isinstance(value, (list, tuple)) and all(isinstance(own, (list, tuple)) and len(own) == 2 for own in value):
        ranges = tuple((first, end) for first, end in value)
        if all(type(first) is type(end) is int and 0 <= first < end for first, end in ranges):
            return ranges
    raise ValueError("a list of [first, end], numbers of layers from 0, such as [[0, 4], [2, 5]]")


def _target_modules(value: object) -> str | tuple[str, ...]:
    expected = '"all-linear", a list of different module names or a regular expression'
    if isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{expected} ({error})") from error
    if value == "" or not isinstance(value, (str, list, tuple)):
        raise ValueError(expected)
    return value if isinstance(value, str) else _names(value)


def _budget_text(value: int | Auto) -> str:
    return value if isinstance(value, str) else format_size(value)


MAX_TOKEN = 2**31  # as many as no vocabulary has
# The keys of all forms of rows (data.formats reads them).
COLUMNS = (
    "messages",
    "tools",
    "conversations",
    "prompt",
    "completion",
    "question",
    "answer",
    "instruction",
    "input",
    "output",
    "system",
    "text",
)
SizeBytes = Annotated[int, BeforeValidator(_size_bytes, json_schema_input_type=int | str)]
Budget = Annotated[SizeBytes | Auto, PlainSerializer(_budget_text, return_type=str, when_used="json")]
PathText = Annotated[str, AfterValidator(_path_text)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Paths = Annotated[str | tuple[str, ...], BeforeValidator(_paths)]
Columns = Annotated[
    tuple[tuple[str, str], ...],
    BeforeValidator(_columns, json_schema_input_type=dict[str, str]),
    PlainSerializer(dict, return_type=dict[str, str]),
]
# Pairs, in which the order is kept (the first that fits decides) also where a file sorts the keys of its mappings.
RankPattern = Annotated[tuple[tuple[str, int], ...], BeforeValidator(_ranks, json_schema_input_type=dict[str, int])]
AlphaPattern = Annotated[
    tuple[tuple[str, float], ...], BeforeValidator(_alphas, json_schema_input_type=dict[str, float])
]
Layers = Annotated[tuple[int, ...], BeforeValidator(_layers, json_schema_input_type=list[int])]
Tokens = Annotated[tuple[int, ...], BeforeValidator(_tokens, json_schema_input_type=list[int])]
LayerRanges = Annotated[
    tuple[tuple[int, int], ...], BeforeValidator(_ranges, json_schema_input_type=list[tuple[int, int]])
]
TargetModules = Annotated[str | tuple[str, ...], BeforeValidator(_target_modules)]
