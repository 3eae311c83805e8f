"""Fused decoder layers against transformers' own: same losses, same gradients, less kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_trainer.model import quantized
from qlora_trainer.model.activation_policy import decoder_layers, recompute_layers
from qlora_trainer.model.adapters import attach_adapters, trainable_parameters
from qlora_trainer.model.base import Base
from qlora_trainer.model.fused_layer import FusedLayer
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.step.batch import make_micro_batch
from qlora_trainer.step.train_step import accumulate_gradients
from tests.model.tiny_bases import CONFIGS
from tests.model.tiny_models import (
    load_for_training,
    lora_settings,
    prepare,
    random_adapter,
    relative_error,
    tiny_documents,
)

FUSED = ("llama", "llama-tied", "llama-biases", "mistral", "qwen2", "qwen2-window", "qwen3", "gemma")
LENGTHS = (21, 30, 9)

Prepare = Callable[[str], tuple[Base, NF4Cache]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    made: dict[str, tuple[Base, NF4Cache]] = {}

    def base_of(name: str) -> tuple[Base, NF4Cache]:
        if name not in made:
            folder: Path = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
                made[name] = prepare(folder / "base", CONFIGS[name])
        return made[name]

    return base_of


def step_of(
    model: QuantizedModel, *, targets: str = "all-linear", dropout: float = 0.0, num_recomputed: int = 0
) -> dict[str, Tensor]:
    settings = replace(lora_settings(model, targets), dropout=dropout)
    attach_adapters(model, settings, random_adapter(model, settings, b_size=0.05), dtype=torch.float32)
    recompute_layers(model, num_recomputed)
    documents = tiny_documents(*LENGTHS)
    micro_batch = make_micro_batch(documents, seed=0, step=0, packing=True)
    count = sum(document.num_supervised_tokens for document in documents)
    loss = accumulate_gradients(model, [micro_batch], num_supervised_tokens=count, loss_chunk_tokens=16)
    found = {name: parameter.grad for name, parameter in trainable_parameters(model).items()}
    assert all(grad is not None for grad in found.values())
    return {"loss": loss, **{name: grad for name, grad in found.items() if grad is not None}}


def unfused(base: Base, cache: NF4Cache, monkeypatch: pytest.MonkeyPatch) -> QuantizedModel:
    with monkeypatch.context() as patch:
        patch.setattr(quantized, "fuse_layers", lambda _module: None)
        model = load_for_training(base, cache)
    assert not any(isinstance(layer, FusedLayer) for layer in decoder_layers(model))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_which_layers_are_fused(name: str, prepared: Prepare) -> None:
    model = load_for_training(*prepared(name))
    assert [isinstance(layer, FusedLayer) for layer in decoder_layers(model)] == [name in FUSED] * 2
    names = {name for name, part in model.module.named_modules() if part in model.linears.values()}
    assert names == set(model.linears)  # the modules are called as they are in a checkpoint


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_recomputed": 1}, {"dropout": 0.3}, {"targets": ".*(q_proj|v_proj|down_proj)"}, {"targets": ".*1.mlp.*"}],
    ids=str,
)
def test_the_step_is_the_same(
    name: str, options: dict[str, object], prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, cache = prepared(name)
    expected = step_of(unfused(base, cache, monkeypatch), **options)  # type: ignore[arg-type]
    found = step_of(load_for_training(base, cache), **options)  # type: ignore[arg-type]
    assert found.keys() == expected.keys()
    for entry, tensor in found.items():
        assert relative_error(tensor, expected[entry]) <= 1e-5, entry


def test_less_is_kept_for_backward(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    base, cache = prepared("llama")
    kept = {}
    for which, model in (("fused", load_for_training(base, cache)), ("plain", unfused(base, cache, monkeypatch))):
        storages: dict[int, int] = {}

        def note(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            step_of(model)
        kept[which] = sum(storages.values())
    assert kept["fused"] < 0.7 * kept["plain"]  # of all, ends of the model included


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
def test_with_a_cache_of_keys_it_is_the_layer_that_it_replaced(
    name: str, prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, cache = prepared(name)
    ids = torch.arange(3, 12).unsqueeze(0)
    found = []
    for model in (load_for_training(base, cache), unfused(base, cache, monkeypatch)):
        model.module.set_attn_implementation("sdpa")  # as generation does
        with torch.no_grad():
            first = model.module.base_model(input_ids=ids[:, :5], use_cache=True)
            second = model.module.base_model(
                input_ids=ids[:, 5:], use_cache=True, past_key_values=first.past_key_values
            )
        found.append(torch.cat((first.last_hidden_state, second.last_hidden_state), 1))
    assert torch.equal(found[0], found[1])
