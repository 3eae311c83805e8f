"""In bf16, what a young adapter adds, and its gradients, are no further from fp32 than PEFT's own.

B is as large as after 1, 10 and 100 AdamW steps at 2e-4 (an element moves by about the learning rate a step). All
weights are such that bf16 holds them exactly, so that only the computation differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from qlora_trainer.model import nf4
from qlora_trainer.model.adapters import attach_adapters
from qlora_trainer.model.base import Base
from qlora_trainer.model.linear import NF4Linear
from qlora_trainer.model.lora_adapter import LoraAdapter
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.nf4_cache import NF4Cache
from tests.model.peft_oracle import load_oracle, logits, oracle_step, with_adapters
from tests.model.tiny_bases import small_config
from tests.model.tiny_models import (
    load_for_training,
    lora_settings,
    our_step,
    packed_logits,
    prepare,
    random_adapter,
    relative_error,
    tiny_documents,
)

LEARNING_RATE = 2e-4
NO_FURTHER_THAN = 1.2
BF16 = torch.bfloat16
DOCUMENTS = tiny_documents(60, 30, 64)


@dataclass(frozen=True, slots=True)
class Result:
    """What an adapter does: logits with it minus logits without, and all gradients as one vector."""

    contribution_TV: Tensor
    gradient: Tensor


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen2", "phi3"])
def quantized_base(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Base, NF4Cache]]:
    folder = tmp_path_factory.mktemp("bf16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield prepare(folder / "base", small_config(request.param, hidden_size=128, intermediate_size=256))


@pytest.mark.parametrize("num_steps", [1, 10, 100])
def test_model_is_no_further_from_fp32_than_peft(quantized_base: tuple[Base, NF4Cache], num_steps: int) -> None:
    base, cache = quantized_base
    settings, weights = _young_adapter(base, cache, num_steps)
    exact = _peft(cache, settings, weights, torch.float32)
    ours = _ours(base, cache, settings, weights)
    peft = _peft(cache, settings, weights, BF16)
    assert _error(ours.contribution_TV, exact.contribution_TV) <= NO_FURTHER_THAN * _error(
        peft.contribution_TV, exact.contribution_TV
    )
    assert _error(ours.gradient, exact.gradient) <= NO_FURTHER_THAN * _error(peft.gradient, exact.gradient)


def _error(found: Tensor, exact: Tensor) -> float:
    error = relative_error(found, exact)
    assert error > 1e-3  # bf16 was really used
    return error


def _young_adapter(base: Base, cache: NF4Cache, num_steps: int) -> tuple[LoraSettings, dict[str, Tensor]]:
    model = load_for_training(base, cache)
    settings = lora_settings(model)
    return settings, random_adapter(model, settings, b_size=num_steps * LEARNING_RATE)


def _ours(base: Base, cache: NF4Cache, settings: LoraSettings, weights: dict[str, Tensor]) -> Result:
    model = load_for_training(base, cache, BF16)
    without_TV = packed_logits(model, DOCUMENTS)
    attach_adapters(model, settings, weights, dtype=BF16)
    contribution_TV = packed_logits(model, DOCUMENTS) - without_TV
    step = our_step(model, settings, weights, DOCUMENTS, adapter_dtype=BF16)
    return Result(contribution_TV, _as_vector(step.gradients, weights))


def _peft(cache: NF4Cache, settings: LoraSettings, weights: dict[str, Tensor], dtype: torch.dtype) -> Result:
    oracle = load_oracle(cache.folder, dtype)
    with torch.no_grad():
        without_TV = logits(oracle, DOCUMENTS)
        wrapped = with_adapters(oracle, settings, weights, dtype=dtype)
        contribution_TV = logits(wrapped, DOCUMENTS) - without_TV
    return Result(contribution_TV, _as_vector(oracle_step(wrapped, DOCUMENTS).gradients, weights))


def _as_vector(gradients: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in weights])


@pytest.mark.parametrize("num_steps", [1, 10, 100])
def test_one_layer_is_no_further_from_fp32_than_peft(num_steps: int) -> None:
    layer, x_TI = _one_layer(num_steps)
    exact_TO = _contribution(layer, x_TI.float())
    ours = relative_error(_contribution(layer, x_TI), exact_TO)
    peft = relative_error(_peft_contribution(layer, x_TI), exact_TO)
    assert ours <= NO_FURTHER_THAN * peft


@pytest.mark.parametrize("num_steps", [1, 10, 100])
@torch.no_grad()
def test_merging_into_the_bf16_weight_would_be_further(num_steps: int) -> None:
    layer, x_TI = _one_layer(num_steps)
    assert layer.adapter is not None
    exact_TO = _contribution(layer, x_TI.float())
    weight_OI = nf4.dequantize(layer.weight, BF16)
    update_OI = layer.adapter.scale * layer.adapter.lora_B.float() @ layer.adapter.lora_A.float()
    merged_OI = (weight_OI.float() + update_OI).to(BF16)
    merged_TO = (x_TI @ merged_OI.t()).float() - (x_TI @ weight_OI.t()).float()
    peft = relative_error(_peft_contribution(layer, x_TI), exact_TO)
    assert relative_error(merged_TO, exact_TO) > NO_FURTHER_THAN * peft


def _one_layer(num_steps: int) -> tuple[NF4Linear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size, rank, num_tokens = 512, 16, 256
    weight_OI = torch.randn(size, size, generator=generator) * 0.02
    layer = NF4Linear(nf4.quantize(weight_OI, double_quant=True), None)
    a_RI = torch.randn(rank, size, generator=generator) / size**0.5
    b_OR = torch.randn(size, rank, generator=generator) * LEARNING_RATE * num_steps
    layer.adapter = LoraAdapter(a_RI.to(BF16), b_OR.to(BF16), scale=2.0)
    return layer, torch.randn(num_tokens, size, generator=generator).to(BF16)


@torch.no_grad()
def _contribution(layer: NF4Linear, x_TI: Tensor) -> Tensor:
    with_adapter_TO = layer(x_TI).float()
    adapter, layer.adapter = layer.adapter, None
    without_TO = layer(x_TI).float()
    layer.adapter = adapter
    contribution_TO: Tensor = with_adapter_TO - without_TO
    return contribution_TO


@torch.no_grad()
def _peft_contribution(layer: NF4Linear, x_TI: Tensor) -> Tensor:
    """peft/tuners/lora/bnb.py, Linear4bit.forward: the update is computed on its own, then added."""
    assert layer.adapter is not None
    base_TO = x_TI @ nf4.dequantize(layer.weight, x_TI.dtype).t()
    update_TO = x_TI @ layer.adapter.lora_A.t() @ layer.adapter.lora_B.t() * layer.adapter.scale
    contribution_TO: Tensor = (base_TO + update_TO).float() - base_TO.float()
    return contribution_TO
