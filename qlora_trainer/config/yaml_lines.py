"""YAML text turned into plain values that remember their lines.

It reads what `yaml.safe_load` reads, except that `1e-4` is a number (PyYAML wants `1.0e-4`), a date stays text, and
duplicate keys, aliases and tags are refused: the first hide a value, the second let a small file grow without limit,
the third name types that no key has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import yaml

from qlora_trainer.errors import ConfigError

MAX_TEXT_CHARACTERS = 2**20  # a config has about 2,000; a gigabyte passed by mistake is told at once
MAX_DEPTH = 8  # a config is 3 deep; PyYAML takes time quadratic in the depth
_TIMESTAMP_TAG = "tag:yaml.org,2002:timestamp"
_FLOAT_TAG = "tag:yaml.org,2002:float"
_SCIENTIFIC = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")

KeyPath = tuple[str, ...]


def _our_resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's rules for what a bare word is, by its first character, with ours in place of the date's."""
    resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag != _TIMESTAMP_TAG]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in "-+.0123456789":
        resolvers.setdefault(first, []).append((_FLOAT_TAG, _SCIENTIFIC))
    return resolvers


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` with our scalars."""

    yaml_implicit_resolvers = _our_resolvers()


class _Dumper(yaml.SafeDumper):
    """`yaml.SafeDumper` that quotes exactly what `_Loader` would not read back as text, and repeats shared values."""

    yaml_implicit_resolvers = _our_resolvers()

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Between single quotes a line feed is written as it is, on lines of its own.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


@dataclass(frozen=True, slots=True)
class Located:
    """A YAML document.

    Attributes:
        value: its plain value; None where the text is empty.
        lines: 1-based line of every mapping key and list item, by path from the top.
    """

    value: Any
    lines: Mapping[KeyPath, int]


def read_yaml(text: str, *, name: str) -> Located:
    """Parse one YAML document.

    Args:
        text: the document.
        name: file or option it comes from, for messages.

    Raises:
        ConfigError: it is no YAML, too long or too deep, or has a key twice, a key that is not text, an alias or
            a tag.
    """
    if len(text) > MAX_TEXT_CHARACTERS:
        raise ConfigError(
            where=name,
            found=f"{len(text):,} characters",
            expected=f"at most {MAX_TEXT_CHARACTERS:,}",
            fix="Give the config, not the data.",
        )
    lines: dict[KeyPath, int] = {}
    try:
        _refuse_what_no_config_needs(text, name=name)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            value = None if node is None else _construct(loader, node, path=(), lines=lines, name=name)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(_where(name, error.problem_mark), f"a YAML error ({error.problem})") from error
    except yaml.reader.ReaderError as error:  # a character that YAML does not allow, the only error without a mark
        line_number = text.count("\n", 0, error.position) + 1
        raise _not_yaml(f"{name}:{line_number}", f"the character U+{error.character:04X}") from error
    except ValueError as error:  # PyYAML lets int() speak for `0b_` and for 5,000 digits
        raise _not_yaml(name, f"a number that cannot be read ({error})") from error
    return Located(value, MappingProxyType(lines))


def write_yaml(value: object) -> str:
    """Dump plain values in block style and in their own order; `read_yaml` gives them back.

    Other characters than ASCII are escaped: PyYAML writes U+0085 bare and reads it as a line break.
    """
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False)
    return text


def write_yaml_line(value: object) -> str:
    """Dump one value on a single line, for the right side of `key: value`."""
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def _refuse_what_no_config_needs(text: str, *, name: str) -> None:
    """Aliases, tags and depth; the events come one by one, so that deep text is refused before it costs time."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        where = _where(name, event.start_mark)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _not_yaml(where, f"values nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.AliasEvent):
            raise _not_yaml(where, f"the alias *{event.anchor}")
        if isinstance(event, yaml.NodeEvent) and getattr(event, "tag", None) is not None:
            raise _not_yaml(where, "a tag (!name)")  # even harmless ones raise KeyError in PyYAML: `!!bool x`


def _construct(loader: _Loader, node: yaml.Node, *, path: KeyPath, lines: dict[KeyPath, int], name: str) -> Any:
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            lines[(*path, str(index))] = item.start_mark.line + 1
            items.append(_construct(loader, item, path=(*path, str(index)), lines=lines, name=name))
        return items
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = loader.construct_object(key_node, deep=True) if isinstance(key_node, yaml.ScalarNode) else None
        where = f"{name}:{line}"
        if not isinstance(key, str):
            shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            raise ConfigError(
                where=where, found=f"the key {shown}", expected="a word as key", fix="Write each key as `name: value`."
            )
        key_path = (*path, key)
        if key in mapping:
            raise ConfigError(
                where=where,
                found=f"{'.'.join(key_path)} a second time (first on line {lines[key_path]})",
                expected="each key once",
                fix="Delete one of them.",
            )
        lines[key_path] = line
        mapping[key] = _construct(loader, value_node, path=key_path, lines=lines, name=name)
    return mapping


class _Mark(Protocol):
    """A place in the text; PyYAML has one class for it in Python and one in C."""

    @property
    def line(self) -> int: ...


def _where(name: str, mark: _Mark | None) -> str:
    return name if mark is None else f"{name}:{mark.line + 1}"


def _not_yaml(where: str, found: str) -> ConfigError:
    return ConfigError(
        where=where,
        found=found,
        expected="plain YAML",
        fix="See the layout with `qlora-trainer config --print`.",
    )
