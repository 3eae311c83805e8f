"""As many layers as were asked for keep only their input; results are the same (see test_peft_oracle)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.activation_policy import decoder_layers, recompute_layers
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.step.train_step import summed_loss
from tests.model.tiny_bases import CONFIGS
from tests.model.tiny_models import attach_random_adapter, load_for_training, packed, prepare, tiny_documents


@pytest.fixture
def model(tmp_path: Path) -> QuantizedModel:
    model = load_for_training(*prepare(tmp_path / "base", CONFIGS["llama"]))
    attach_random_adapter(model)
    return model


def _saved_bytes(model: QuantizedModel, num_recomputed: int) -> int:
    """What forward keeps for backward, each storage once."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    recompute_layers(model, num_recomputed)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        summed_loss(model, packed(tiny_documents(40, 24)), loss_chunk_tokens=16)
    return sum(storages.values())


def test_each_recomputed_layer_keeps_less(model: QuantizedModel) -> None:
    none, one, two = (_saved_bytes(model, num_recomputed) for num_recomputed in (0, 1, 2))
    assert none - one == pytest.approx(one - two, rel=0.2)  # a layer's share
    assert two < 0.2 * none


def test_more_layers_than_there_are_cannot_be_recomputed(model: QuantizedModel) -> None:
    assert len(decoder_layers(model)) == 2
    with pytest.raises(ConfigError, match=r"memory\.activation_checkpointing: found 2 layers"):
        recompute_layers(model, 3)
