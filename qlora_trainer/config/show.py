"""The config as text: commented YAML to start from, the resolved YAML of a run folder, and a JSON schema."""

from __future__ import annotations

from textwrap import wrap
from typing import Any, cast

from pydantic import BaseModel

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.config.yaml_lines import write_yaml, write_yaml_line


def render_yaml(config: RunConfig) -> str:
    """Write every key with its value, under a comment with its description and its default.

    Returns:
        YAML that `load_config` reads back as an equal config.
    """
    values = config.model_dump(mode="json")
    lines = []
    for section, field in RunConfig.model_fields.items():
        model = cast("type[BaseModel]", field.annotation)
        lines += [f"# {model.__doc__}", f"{section}:"]
        for key, info in model.model_fields.items():
            default = "required" if info.is_required() else f"default: {_default_text(info.default)}"
            lines += _comment(f"{info.description} ({default})")
            lines.append(f"  {key}: {write_yaml_line(values[section][key])}")
        lines.append("")
    return "\n".join(lines)


def to_yaml(config: RunConfig) -> str:
    """Write the config without comments, for the run folder; `load_config` reads it back as an equal config."""
    return write_yaml(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, for editors that complete and check YAML."""
    return RunConfig.model_json_schema()


def _comment(text: str) -> list[str]:
    return [f"  # {line}" for line in wrap(text, width=110, break_long_words=False, break_on_hyphens=False)]


def _default_text(default: object) -> str:
    return write_yaml_line(list(default) if isinstance(default, tuple) else default)
