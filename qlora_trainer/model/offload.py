"""What each layer keeps for backward, down to nothing: of the first ones even the input waits in host memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_trainer.hardware.input_store import InputStore
from qlora_trainer.model.activation_policy import decoder_layers, recompute_layers
from qlora_trainer.model.quantized import QuantizedModel


def keep_least(model: QuantizedModel, num_recomputed: int, num_offloaded: int, store: InputStore) -> None:
    """Recompute the first layers in backward; of the first of those not even the input stays on the device.

    Args:
        model: whose layers they are.
        num_recomputed: layers that keep their input at most.
        num_offloaded: of these, the layers whose input goes to `store`.
        store: for this model alone.

    Raises:
        ConfigError: the model has no layers that can be recomputed, and some should be.
    """
    recompute_layers(model, num_recomputed)
    offload_inputs(decoder_layers(model)[:num_offloaded], store)


def offload_inputs(layers: Sequence[GradientCheckpointingLayer], store: InputStore) -> None:
    """Let these layers, which are recomputed, keep their input in `store`; in model order.

    `torch.utils.checkpoint` saves a layer's input as any function saves its tensors, so torch's hooks for saved tensors
    reach it; inside, its own hooks take their place.
    """
    for number, layer in enumerate(layers):
        own: Any = layer
        recompute = own._gradient_checkpointing_func
        own._gradient_checkpointing_func = functools.partial(_offloaded, number, store, recompute)


def _offloaded(
    number: int,
    store: InputStore,
    recompute: Callable[..., Any],
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    def pack(hidden: Tensor) -> int:
        store.put(number, hidden)
        return number

    with saved_tensors_hooks(pack, store.take):
        out = recompute(function, *args, **kwargs)
    store.sent()
    return out
