"""What is wrong with a config, each problem with the line it stands on, and the one line that reports them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qlora_trainer.config.did_you_mean import SECTIONS, suggest_key
from qlora_trainer.errors import ConfigError

_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written.

    Attributes:
        where: `file:line`, an override, or only the file for what is not written at all.
        rank: problems are told in this order; lines come first, then overrides, then what is missing.
    """

    where: str
    rank: tuple[int, int]

    @classmethod
    def of_line(cls, name: str, line: int) -> Origin:
        return cls(f"{name}:{line}", (0, line))

    @classmethod
    def of_override(cls, dotted: str) -> Origin:
        return cls(f"--set {dotted}", (1, 0))

    @classmethod
    def of_nothing(cls, name: str) -> Origin:
        return cls(name, (2, 0))


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake; the words are those of `ConfigError`."""

    origin: Origin
    found: str
    expected: str
    fix: str


def combined_error(problems: Sequence[Problem]) -> ConfigError:
    """Tell the first problem in full and count the others."""
    first = min(problems, key=lambda problem: problem.origin.rank)
    others = len(problems) - 1
    more = f" ({others} more problem{'s' if others > 1 else ''}.)" if others else ""
    return ConfigError(where=first.origin.where, found=first.found, expected=first.expected, fix=first.fix + more)


def unknown_key(dotted: str, origin: Origin) -> Problem:
    """A key, or a section without a key, that the config does not have."""
    section, _, key = dotted.partition(".")
    known_section = key and section in SECTIONS
    names = SECTIONS[section] if known_section else SECTIONS
    return Problem(
        origin=origin,
        found=f"the unknown key {dotted}",
        expected=f"a key of {section}" if known_section else "a section",
        fix=suggest_key(dotted) or f"There are {', '.join(names)}.",
    )


def not_a_section(section: str, value: object, origin: Origin) -> Problem:
    """A value where a section with keys belongs."""
    return Problem(
        origin=origin,
        found=f"{section} = {shown(value)}",
        expected=f"a key of {section} with a value",
        fix=f"Its keys are {', '.join(SECTIONS[section])}.",
    )


def validation_problems(error: ValidationError, *, origins: Mapping[str, Origin], name: str) -> list[Problem]:
    """Reword pydantic's errors, one problem a key: it reports each branch of a union by itself.

    Args:
        error: what pydantic found.
        origins: where each dotted key was written.
        name: the file, for keys that are missing.
    """
    by_key: dict[str, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        by_key.setdefault(_dotted(details), []).append(details)
    return [
        _reworded(dotted, branches, origins.get(dotted, Origin.of_nothing(name))) for dotted, branches in by_key.items()
    ]


def shown(value: object) -> str:
    """A value as one short line; JSON, so that text is told from a number and no control character gets through."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _reworded(dotted: str, branches: list[ErrorDetails], origin: Origin) -> Problem:
    section, _, key = dotted.partition(".")
    description = SECTIONS[section][key]
    first = branches[0]
    if first["type"] == "missing":
        return Problem(
            origin=origin,
            found=f"no {dotted}",
            expected="it to be set",
            fix=f"Add it to the section {section}, or give --set {dotted}=VALUE. {description}",
        )
    found = first["ctx"]["found"] if first["type"] == "disagreement" else first["input"]
    return Problem(
        origin=origin,
        found=f"{dotted} = {shown(found)}",
        expected=" or ".join(dict.fromkeys(map(_expected, branches))),
        fix=description,
    )


def _dotted(details: ErrorDetails) -> str:
    if details["type"] == "disagreement":
        return str(details["ctx"]["key"])
    return ".".join(str(part) for part in details["loc"][:2])  # deeper parts are branches of a union


def _expected(details: ErrorDetails) -> str:
    """pydantic's sentence as the end of "expected ..."."""
    text = details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return text.replace("a valid boolean", "true or false")
