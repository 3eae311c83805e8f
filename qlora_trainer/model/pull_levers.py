"""Makes a model trade time for memory as a plan has decided."""

from __future__ import annotations

from qlora_trainer.config.levers import Levers
from qlora_trainer.model.activation_policy import tile_layers
from qlora_trainer.model.base_stream import stream_base
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.tables import place_tables


def pull_levers(model: QuantizedModel, levers: Levers) -> None:
    """Bring the model into the state that `levers` describe, whatever state it is in; nothing it computes changes.

    Args:
        model: loaded, or on fake tensors.
        levers: what is to be pulled from now on. Whether the head is in NF4 was decided when it was loaded.
    """
    tile_layers(model, levers.tile_tokens)
    place_tables(model, is_on_host=levers.embedding_residency == "host")
    stream_base(model, is_streamed=levers.base_residency == "streamed")
