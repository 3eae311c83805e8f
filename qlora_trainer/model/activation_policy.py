"""What each layer keeps for backward: everything, or only its input, the rest being computed again, whole or in tiles.

transformers' layers (`GradientCheckpointingLayer`) look at two attributes of their own, set here layer by layer; the
model-wide switch of transformers knows only all or none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.fused_layer import FusedLayer
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.tiled import TiledMlp


def _recompute(layer: GradientCheckpointingLayer, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a layer such that it keeps its input; when it is run again, a fused layer knows."""
    num_runs = 0

    def run(*inner_args: Any, **inner_kwargs: Any) -> Any:
        nonlocal num_runs
        num_runs += 1
        if not isinstance(layer, FusedLayer):
            return function(*inner_args, **inner_kwargs)
        layer.is_to_be_computed_again, layer.is_computed_again = num_runs == 1, num_runs > 1
        try:
            return function(*inner_args, **inner_kwargs)
        finally:
            layer.is_to_be_computed_again = layer.is_computed_again = False

    # No generator state to keep: every random draw is a function of keys (see random_draws).
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def decoder_layers(model: QuantizedModel) -> list[GradientCheckpointingLayer]:
    """The layers that can be recomputed, in model order."""
    return [part for part in model.module.modules() if isinstance(part, GradientCheckpointingLayer)]


def recompute_layers(model: QuantizedModel, num_layers: int) -> None:
    """Recompute the first `num_layers` layers in backward and keep the activations of the others.

    The first ones: what the last layers keep is freed before the first layers' recomputation needs room.

    Raises:
        ConfigError: the model has no layers that can be recomputed, and some should be.
    """
    layers = decoder_layers(model)
    if num_layers > len(layers):
        raise ConfigError(
            where="memory.activation_checkpointing",
            found=f"{len(layers)} layers of {type(model.module).__name__} that can be recomputed",
            expected=f"at least {num_layers}",
            fix="Set memory.activation_checkpointing to false for this model.",
        )
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < num_layers
        # setattr: nn.Module declares its attributes as tensors or modules, which a function is not.
        setattr(layer, "_gradient_checkpointing_func", functools.partial(_recompute, layer))  # noqa: B010


def can_tile(model: QuantizedModel) -> bool:
    """Whether `tile_layers` changes anything, in every layer."""
    layers = decoder_layers(model)
    return bool(layers) and all(_tiled_part(layer) is not None for layer in layers)


def tile_layers(model: QuantizedModel, tile_tokens: int) -> None:
    """Compute recomputed layers, and all of them in an evaluation, for so many tokens at a time; 0: all.

    Of a layer that is not fused the MLP only. The loss norms the last layer's output in tiles, too.

    Raises:
        ConfigError: a layer's MLP is not known to be token by token.
    """
    if tile_tokens and not can_tile(model):
        raise ConfigError(
            where="memory.tile_tokens",
            found=f"{tile_tokens}, of layers of {type(model.module).__name__}, whose MLPs cannot be cut into tiles",
            expected="0",
            fix="Set memory.tile_tokens to 0 or auto for this model.",
        )
    for layer in decoder_layers(model):
        tiled = _tiled_part(layer)
        if tiled is not None:
            tiled.tile_tokens = tile_tokens
    if model.final_norm is not None:
        model.final_norm.tile_tokens = tile_tokens


def tile_tokens_of(model: QuantizedModel) -> int:
    """What `tile_layers` was given last; 0 before."""
    return max((part.tile_tokens for part in map(_tiled_part, decoder_layers(model)) if part is not None), default=0)


def _tiled_part(layer: GradientCheckpointingLayer) -> FusedLayer | TiledMlp | None:
    if isinstance(layer, FusedLayer):
        return layer
    return next((part for part in layer.children() if isinstance(part, TiledMlp)), None)
