"""An unknown config key answered with the key that was probably meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import cast

from pydantic import BaseModel

from qlora_trainer.config.foreign import FOREIGN_KEYS
from qlora_trainer.config.schema import RunConfig


def _describe_sections() -> Mapping[str, Mapping[str, str]]:
    sections = {}
    for name, field in RunConfig.model_fields.items():
        section = cast("type[BaseModel]", field.annotation)
        sections[name] = MappingProxyType({key: str(info.description) for key, info in section.model_fields.items()})
    return MappingProxyType(sections)


SECTIONS = _describe_sections()  # section -> key -> description
DOTTED_KEYS = tuple(f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys)


def suggest_key(dotted: str) -> str:
    """Say what an unknown key should be called.

    Args:
        dotted: the key as written, with its section where it has one.

    Returns:
        One sentence: "Did you mean ...", empty when nothing comes close.
    """
    name = dotted.rpartition(".")[2].lower().replace("-", "_")
    exact = tuple(key for key in DOTTED_KEYS if key.rpartition(".")[2] == name)
    if exact:
        return _answer(exact)
    if name in FOREIGN_KEYS:
        return _answer(FOREIGN_KEYS[name].keys, note=FOREIGN_KEYS[name].note)
    if "." not in dotted and (sections := get_close_matches(name, SECTIONS, n=1, cutoff=0.75)):
        return f"Did you mean the section {sections[0]}?"
    close = _close_keys(dotted, name)
    if close:
        return _answer(close)
    foreign = get_close_matches(name, FOREIGN_KEYS, n=1, cutoff=0.85)
    return _answer(FOREIGN_KEYS[foreign[0]].keys, note=FOREIGN_KEYS[foreign[0]].note) if foreign else ""


def closest(word: str, words: Iterable[str]) -> str:
    """One sentence with the word that was probably meant, or nothing."""
    near = get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"Did you mean {near[0]}?" if near else ""


def _close_keys(dotted: str, name: str) -> tuple[str, ...]:
    """Up to two keys; one in the section that was written comes before the same likeness in another."""
    section = dotted.partition(".")[0]
    by_name: dict[str, list[str]] = {}
    for key in DOTTED_KEYS:
        by_name.setdefault(key.rpartition(".")[2], []).append(key)
    names = get_close_matches(name, by_name, n=2, cutoff=0.7)
    found = [key for close in names for key in by_name[close]]
    found += [key for key in get_close_matches(dotted, DOTTED_KEYS, n=1, cutoff=0.85) if key not in found]
    return tuple(sorted(found, key=lambda key: not key.startswith(f"{section}."))[:2])


def _answer(keys: tuple[str, ...], *, note: str = "") -> str:
    if not keys:
        return f"Delete it: {note}."
    explained = f" ({note})" if note else ""
    return f"Did you mean {' or '.join(keys)}?{explained}"
