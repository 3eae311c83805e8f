"""A base some of whose layers are there several times: PEFT's `layer_replication`, as `lora.layer_replication`.

`((0, 4), (2, 5))` makes 0, 1, 2, 3, 2, 3, 4 of the layers of a base (PEFT 0.21, `replicate_layers`). PEFT's copies
share their weights; here each is a layer of its own, quantized again, since adapters, plan and levers know layers by
number.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from qlora_trainer.config.values import LayerRanges
from qlora_trainer.errors import ConfigError

_KEY = "lora.layer_replication"
_MAX_LAYERS = 1024  # beyond any base that is trained here
_OF_MODEL, _OF_TOKENS = ("architectures",), ("_token_id", "_token_ids")  # lists that may be as long as one by layer
_IN_LAYER = re.compile(r"(?P<list>(?:.*\.)?layers\.)(?P<index>\d+)(?P<rest>\..*)")


def repeated(ranges: LayerRanges) -> tuple[int, ...]:
    """The layer of the base that each layer is."""
    return tuple(index for first, end in ranges for index in range(first, end))


def with_repeated_layers(config: PreTrainedConfig, ranges: LayerRanges) -> PreTrainedConfig:
    """The base's config with as many layers; itself where nothing is repeated.

    Raises:
        ConfigError: a range that the base does not have, too many layers, or a base whose layers are of several kinds:
            PEFT's copies keep their own, transformers' masks go by number.
    """
    if not ranges:
        return config
    num_layers = int(config.num_hidden_layers)
    num_repeated = sum(max(0, end - first) for first, end in ranges)
    if not all(0 <= first < end <= num_layers for first, end in ranges) or num_repeated > _MAX_LAYERS:
        raise _wrong(
            f"{[list(own) for own in ranges]}"[:200],
            f"[first, end] of a base of {num_layers} layers, {_MAX_LAYERS} in all",
        )
    fields = {
        name: own
        for name, own in vars(config).items()
        if isinstance(own, list) and len(own) == num_layers and not (name in _OF_MODEL or name.endswith(_OF_TOKENS))
    }
    if any(len(set(map(str, own))) > 1 for own in fields.values()):
        raise _wrong(f"a base whose layers differ ({', '.join(fields)})", "a base of equal layers")
    found = copy.deepcopy(config)
    for name, own in fields.items():
        setattr(found, name, own[:1] * num_repeated)
    found.num_hidden_layers = num_repeated
    return found


def stored_weights(files: Mapping[str, Path], ranges: LayerRanges) -> dict[str, tuple[Path, str]]:
    """Name of a weight -> its file, and its name in there.

    Args:
        files: of the base, as `weight_files` gives them.
        ranges: of its layers; empty where nothing is repeated.
    """
    found: dict[str, tuple[Path, str]] = {}
    layers = repeated(ranges)
    for stored, path in files.items():
        match = _IN_LAYER.fullmatch(stored) if ranges else None
        numbers = [None] if match is None else [at for at, own in enumerate(layers) if own == int(match["index"])]
        for number in numbers:
            name = stored if match is None else f"{match['list']}{number}{match['rest']}"
            found[name] = (path, stored)
    return found


def _wrong(found: str, expected: str) -> ConfigError:
    fix = f"Correct {_KEY}, or use the base that the adapter was trained on."
    return ConfigError(where=_KEY, found=found, expected=expected, fix=fix)


def ranges_of(fields: Mapping[str, Any]) -> LayerRanges:
    """Of the checked fields of an adapter's config."""
    return tuple((first, end) for first, end in fields.get("layer_replication") or ())
