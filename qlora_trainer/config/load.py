"""A YAML file and `--set` overrides become one `RunConfig`, or one line that says what is wrong and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora_trainer.config.did_you_mean import SECTIONS
from qlora_trainer.config.problems import (
    Origin,
    Problem,
    combined_error,
    not_a_section,
    shown,
    unknown_key,
    validation_problems,
)
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.config.yaml_lines import Located, read_yaml
from qlora_trainer.errors import ConfigError


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge and validate.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: `section.key=value` texts whose values are YAML; a later one wins.

    Returns:
        The config; "auto" values stay as they are.

    Raises:
        ConfigError: no such file, no YAML, an unknown key or a wrong value. The first problem is told in full,
            the others are counted.
    """
    name = "the command line" if path is None else str(path)
    document = Located(None, {}) if path is None else read_yaml(_read_text(path), name=name)
    sections, origins, problems = _known_keys(document, name=name)
    for override in overrides:
        problems += _apply_override(override, sections=sections, origins=origins)
    try:
        config = RunConfig.model_validate(sections)
    except ValidationError as error:
        problems += validation_problems(error, origins=origins, name=name)
        raise combined_error(problems) from error
    if problems:
        raise combined_error(problems)
    return config


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"a byte that is not UTF-8 at offset {error.start}"
    except OSError as error:
        found = (error.strerror or str(error)).lower()
    except ValueError:
        found = "a NUL character in the path"
    raise ConfigError(
        where=str(path),
        found=found,
        expected="a readable YAML file",
        fix="`qlora-trainer config --print > run.yaml` writes one to start from.",
    )


def _known_keys(document: Located, *, name: str) -> tuple[dict[str, dict[str, Any]], dict[str, Origin], list[Problem]]:
    """Split a document into the values of known keys, where every key stands, and problems with the others."""
    origins = {".".join(path): Origin.of_line(name, line) for path, line in document.lines.items()}
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    problems = []
    top = {} if document.value is None else document.value
    if not isinstance(top, Mapping):
        raise ConfigError(
            where=name,
            found=shown(top),
            expected=f"the sections {', '.join(SECTIONS)}",
            fix="See the layout with `qlora-trainer config --print`.",
        )
    for section, values in top.items():
        if section not in SECTIONS:
            problems.append(unknown_key(section, origins[section]))
        elif isinstance(values, Mapping):
            for key, value in values.items():
                if key in SECTIONS[section]:
                    sections[section][key] = value
                else:
                    problems.append(unknown_key(f"{section}.{key}", origins[f"{section}.{key}"]))
        elif values is not None:  # a section whose keys are all commented out is null
            problems.append(not_a_section(section, values, origins[section]))
    return sections, origins, problems


def _apply_override(override: str, *, sections: dict[str, dict[str, Any]], origins: dict[str, Origin]) -> list[Problem]:
    """Set one value in `sections` and say in `origins` that the command line did, or tell what is wrong with it."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    origin = Origin.of_override(dotted)
    section, _, key = dotted.partition(".")
    if not equals or not section or (section in SECTIONS and not key):
        raise ConfigError(
            where=f"--set {override}",
            found="no section.key=value",
            expected="one key and its value",
            fix="For example --set training.learning_rate=1e-4.",
        )
    if section not in SECTIONS or key not in SECTIONS[section]:
        return [unknown_key(dotted, origin)]
    sections[section][key] = read_yaml(text, name=origin.where).value
    origins[dotted] = origin
    return []
