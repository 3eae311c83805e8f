"""config.json of well-known bases, so that a plan by name or by hub id needs neither a network nor a token. No torch.

`known_models.json` holds the fields of the config.json that the owner of each model publishes on the Hugging Face hub,
less the ones that nothing is computed from (`initializer_range`, or the window of a Qwen that does not use it). Chat
versions share the entry of their base: the shapes are equal, the ids that end a text are the first hub id's. Where one
was built for another number of positions, that is kept: a plan must not promise what the run then refuses.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, TypedDict

from qlora_trainer.config.bases import BaseKind, base_kind
from qlora_trainer.errors import ConfigError

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_MIN_LIKENESS = 0.75  # below it, difflib takes any two models of one owner for alike


class _Row(TypedDict, total=False):
    """A model of the file: `family` names shared fields, `sizes` are the `_SIZES`, `fields` come on top.

    `max_position_embeddings` has the hub ids that were built for another number of positions.
    """

    family: str
    sizes: list[int]
    fields: dict[str, Any]
    max_position_embeddings: dict[str, int]
    hub_ids: list[str]


def known_names() -> tuple[str, ...]:
    """The short names, lower case, family by family."""
    return tuple(_read()[1])


def hub_ids(name: str) -> tuple[str, ...]:
    """The hub ids that share the entry of a short name, as the hub spells them; the entry is the first one's config."""
    return tuple(_read()[1][name]["hub_ids"])


def known_config(name: str) -> dict[str, Any] | None:
    """The config.json of a base.

    Args:
        name: a short name of `known_names` or a hub id, in any case.

    Returns:
        Keyword arguments of `AutoConfig.for_model`, the caller's own to change; None for a base that is not known.
    """
    spelling = _spellings().get(name.strip().lower())
    if spelling is None:
        return None
    families, models = _read()
    row = models.get(spelling) or next(row for row in models.values() if spelling in row["hub_ids"])
    config = families[row["family"]] | dict(zip(_SIZES, row["sizes"], strict=True)) | row.get("fields", {})
    if spelling in row.get("max_position_embeddings", {}):
        config["max_position_embeddings"] = row["max_position_embeddings"][spelling]
    return copy.deepcopy(config)  # transformers writes into the rope fields that it is given


def suggest(name: str) -> str | None:
    """The short name or hub id that was probably meant, if any comes close; None for one that is known as it is."""
    if known_config(name) is not None:
        return None
    close = get_close_matches(name.strip().lower(), _spellings(), n=1, cutoff=_MIN_LIKENESS)
    return _spellings()[close[0]] if close else None


def check_name(name: str) -> None:
    """Refuse what cannot name an architecture: no folder, no well-known model, no hub id.

    Raises:
        ConfigError: names the well-known model that was probably meant.
    """
    if os.path.isdir(name) or known_config(name) is not None:
        return
    hint = suggest(name)
    fix = f"Did you mean {hint}?" if hint else "Give a folder with a config.json, or a hub id."
    try:
        kind = base_kind(name)
    except ConfigError as error:
        expected = f"a folder, a hub id owner/name, or one of {', '.join(known_names())}"
        raise ConfigError(where="model.base", found=f'"{name}"', expected=expected, fix=fix) from error
    if kind is BaseKind.FOLDER:
        raise ConfigError(
            where="model.base", found=f"no folder {name}", expected="a folder with a config.json", fix=fix
        )


@cache
def _read() -> tuple[dict[str, dict[str, Any]], dict[str, _Row]]:
    content = json.loads(files(__package__).joinpath("known_models.json").read_text(encoding="utf-8"))
    return content["families"], content["models"]


@cache
def _spellings() -> Mapping[str, str]:
    """Every short name and hub id, lower case -> as it is written."""
    models = _read()[1]
    every = [*models, *(hub_id for row in models.values() for hub_id in row["hub_ids"])]
    return MappingProxyType({spelling.lower(): spelling for spelling in every})
