"""What each layer keeps for backward: everything, or only its input, the rest being computed again.

transformers' layers (`GradientCheckpointingLayer`) look at two attributes of their own, set here layer by layer; the
model-wide switch of transformers knows only all or none.
"""

from __future__ import annotations

import functools

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.quantized import QuantizedModel

# No generator state to keep: every random draw is a function of keys (see random_draws).
_recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


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
        setattr(layer, "_gradient_checkpointing_func", _recompute)  # noqa: B010
