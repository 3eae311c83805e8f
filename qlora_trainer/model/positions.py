"""How long a document may be in a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

from qlora_trainer.errors import ConfigError


def max_positions(config: PreTrainedConfig) -> int | None:
    """Tokens that a document may have; None where the config names no limit.

    LongRoPE (Ding et al., 2024) has one set of frequencies up to `original_max_position_embeddings` and another beyond,
    and transformers (5.23, `longrope_frequency_update`) takes the one that the longest document of a forward pass asks
    for: a short document would depend on its neighbours. So the first set's limit is the base's.
    """
    limits = [getattr(config, "max_position_embeddings", None)]
    for rope in _ropes(getattr(config, "rope_parameters", None) or {}):
        if rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings"))
            limits.append(getattr(config, "original_max_position_embeddings", None))
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def require_positions(seq_len: int, config: PreTrainedConfig, name: str) -> None:
    """Refuse documents that are longer than a base allows.

    Args:
        seq_len: tokens of the longest document.
        config: of the base.
        name: of the base, for the message.

    Raises:
        ConfigError: they are longer than `max_positions`.
    """
    most = max_positions(config)
    if most is None or seq_len <= most:
        return
    is_all = most == getattr(config, "max_position_embeddings", None)
    raise ConfigError(
        where="data.seq_len",
        found=f"{seq_len} tokens",
        expected=f"at most {most}, the positions of {name}{'' if is_all else ' (LongRoPE: of its first frequencies)'}",
        fix="Lower data.seq_len, or choose a base with a longer context.",
    )


def _ropes(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parameters themselves, or those of each type of layer."""
    if "rope_type" in parameters:
        yield parameters
        return
    yield from (value for value in parameters.values() if isinstance(value, Mapping))
