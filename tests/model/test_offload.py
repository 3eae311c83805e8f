"""Recomputed layers whose input waits elsewhere compute the same bits, and do not keep it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_trainer.hardware.input_store import FileInputs, HostInputs, InputStore, NoInputs
from qlora_trainer.model.activation_policy import decoder_layers
from qlora_trainer.model.adapters import trainable_parameters
from qlora_trainer.model.offload import keep_least
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.step.train_step import accumulate_gradients, summed_loss
from tests.hardware.late_stream import LateStream
from tests.model.tiny_bases import small_config
from tests.model.tiny_models import CPU, attach_random_adapter, load_for_training, packed, prepare, tiny_documents

NUM_LAYERS = 4


def loaded(tmp_path: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> QuantizedModel:
    model = load_for_training(*prepare(tmp_path / "base", small_config(name, num_hidden_layers=NUM_LAYERS)), dtype)
    attach_random_adapter(model)
    return model


def results(model: QuantizedModel) -> list[Tensor]:
    batches = [packed(tiny_documents(40, 24)), packed(tiny_documents(30, seed=1))]
    found = [accumulate_gradients(model, batches, num_supervised_tokens=60, loss_chunk_tokens=16)]
    for parameter in trainable_parameters(model).values():
        assert parameter.grad is not None
        found.append(parameter.grad)
        parameter.grad = None
    return found


@pytest.mark.parametrize("name, dtype", [("llama", torch.float32), ("llama", torch.bfloat16), ("phi3", torch.float32)])
def test_results_are_the_same_bits(name: str, dtype: torch.dtype, disk_folder: Path, tmp_path: Path) -> None:
    """The store of a GPU with copies as late as can be. Mutations tried: no `join` when a layer's input was sent (its
    memory is others' then), none when it is taken."""
    model = loaded(tmp_path, name, dtype)
    keep_least(model, 0, 0, NoInputs())
    expected = results(model)
    stores: tuple[InputStore, ...] = (FileInputs(disk_folder), HostInputs(LateStream(CPU)))
    for store in stores:
        for num_recomputed, num_offloaded in ((NUM_LAYERS, NUM_LAYERS), (3, 1), (2, 2)):
            keep_least(model, num_recomputed, num_offloaded, store)
            found = results(model)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_an_input_that_is_lost_would_be_seen(tmp_path: Path) -> None:
    """The store is really asked: without what was put into it, gradients differ."""
    model = loaded(tmp_path)
    keep_least(model, NUM_LAYERS, 0, NoInputs())
    expected = results(model)

    class Zeros(NoInputs):
        def take(self, number: int) -> Tensor:
            return super().take(number).zero_()

    keep_least(model, NUM_LAYERS, NUM_LAYERS, Zeros())
    assert not torch.equal(results(model)[1], expected[1])


def test_nothing_of_a_layers_input_stays_alive(tmp_path: Path, disk_folder: Path) -> None:
    model = loaded(tmp_path)
    alive: list[Any] = []

    def note(_module: Any, args: tuple[Tensor, ...]) -> None:
        alive.append(weakref.ref(args[0].untyped_storage()))

    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(note)
    counts = {}
    for num_offloaded in (0, 3):
        alive.clear()
        keep_least(model, NUM_LAYERS, num_offloaded, FileInputs(disk_folder))
        loss = summed_loss(model, packed(tiny_documents(40, 24)), loss_chunk_tokens=16)
        gc.collect()
        counts[num_offloaded] = sum(ref() is not None for ref in alive)
        del loss
    assert counts == {0: NUM_LAYERS, 3: NUM_LAYERS - 3}
