"""Row norms of DoRA: in chunks, once a step, and never those of other weights than the model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_trainer.model import dora, nf4
from qlora_trainer.model.adapters import attach_adapters, attach_new_adapters, trainable_parameters
from qlora_trainer.model.base import Base
from qlora_trainer.model.linear import NF4Linear
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.planning.tracker import StorageTracker
from qlora_trainer.run.answer import generating
from qlora_trainer.step.optimizer import AdapterOptimizer, OptimizerSettings
from qlora_trainer.step.train_step import accumulate_gradients, evaluate
from tests.model.tiny_bases import CONFIGS
from tests.model.tiny_models import (
    load_for_training,
    lora_settings,
    packed,
    packed_logits,
    prepare,
    prepare_apart,
    random_adapter,
    relative_error,
    tiny_documents,
)

SHAPES = st.tuples(st.integers(1, 900), st.sampled_from([1, 3, 40, 64, 96, 128, 129]))
DOCUMENTS = tiny_documents(33, 21)
COUNT = sum(document.num_supervised_tokens for document in DOCUMENTS)
FP32 = torch.float32


def weight_of(shape: tuple[int, int], double_quant: bool) -> nf4.NF4Weight:
    return nf4.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(1)), double_quant=double_quant)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, double_quant=st.booleans(), num_elements=st.integers(1, 2**17))
def test_rows_are_those_of_the_whole_weight(shape: tuple[int, int], double_quant: bool, num_elements: int) -> None:
    weight = weight_of(shape, double_quant)
    rows = nf4.rows_at_once(weight.shape, num_elements)
    if shape[1] % nf4.BLOCKSIZE == 0:
        assert rows * shape[1] <= max(num_elements, nf4.BLOCKSIZE * nf4.NESTED_BLOCKSIZE * shape[1])
    parts = [nf4.dequantize_rows(weight, slice(first, first + rows)) for first in range(0, shape[0], rows)]
    assert torch.equal(torch.cat(parts), nf4.dequantize(weight, FP32))


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, double_quant=st.booleans())
def test_a_scaled_weight_is_the_weight_times_its_scales(shape: tuple[int, int], double_quant: bool) -> None:
    weight = weight_of(shape, double_quant)
    before = weight.absmax.clone()
    scale_O = torch.randn(shape[0], generator=torch.Generator().manual_seed(2))
    found = nf4.dequantize(weight, FP32, scale_O)
    assert relative_error(found, nf4.dequantize(weight, FP32) * scale_O.unsqueeze(1)) <= 1e-6
    assert torch.equal(weight.absmax, before)


def test_a_young_magnitude_is_not_rounded_away_in_16_bits() -> None:
    """1.0005 times a bf16 number is that number again; the scales of the blocks are fp32, and rounded only once."""
    weight = weight_of((8, 4096), True)
    exact = nf4.dequantize(weight, FP32)
    scaled = nf4.dequantize(weight, torch.bfloat16, torch.full((8,), 1.0005)).float()
    growth = float((scaled * exact).sum() / (exact * exact).sum())
    assert growth == pytest.approx(1.0005, abs=1e-4)
    rounded = nf4.dequantize(weight, torch.bfloat16)
    assert torch.equal(rounded * torch.tensor(1.0005).bfloat16(), rounded)


@pytest.mark.parametrize("num_columns", [128, 320])
def test_norms_are_those_of_the_dense_sum_and_made_in_chunks(num_columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows, chunk = 1500, 2**17
    generator = torch.Generator().manual_seed(0)
    linear = NF4Linear(weight_of((num_rows, num_columns), True), None)
    a_RI, b_OR = torch.randn(4, num_columns, generator=generator), torch.randn(num_rows, 4, generator=generator)
    monkeypatch.setattr(dora, "CHUNK_ELEMENTS", chunk)
    found_O = torch.empty(num_rows)
    tracker = StorageTracker()
    with tracker:
        dora.set_row_norms_(found_O, linear, a_RI, b_OR, 0.5)
    expected_O = torch.linalg.vector_norm(nf4.dequantize(linear.weight, FP32) + 0.5 * b_OR @ a_RI, dim=1)
    assert relative_error(found_O, expected_O) <= 1e-6
    assert tracker.peak_bytes < 4 * 1.3 * chunk  # the whole is up to four times that
    dora.set_row_norms_(found_O, linear)
    assert relative_error(found_O, torch.linalg.vector_norm(nf4.dequantize(linear.weight, FP32), dim=1)) <= 1e-6


def test_a_row_of_zeros_stays_zero() -> None:
    weight_OI = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    weight_OI[1] = 0.0
    linear = NF4Linear(nf4.quantize(weight_OI, double_quant=False), None)
    norm_O = torch.empty(3)
    dora.set_row_norms_(norm_O, linear)
    assert norm_O[1] == 1.0
    assert bool((norm_O[[0, 2]] != 1.0).all())


def test_training_leaves_a_row_of_zeros_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation tried: with a magnitude of 1 its row of B is trained, and jumps to length 1 with the first update."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def zero(module: torch.nn.Module) -> None:
        module.get_submodule("model.layers.0.self_attn.v_proj").weight.data[5] = 0.0  # type: ignore[operator]

    model = load_for_training(*prepare(tmp_path / "base", CONFIGS["llama"], change=zero))
    lora = replace(lora_settings(model), use_dora=True)
    attach_new_adapters(model, lora, dtype=FP32, seed=0)
    options = OptimizerSettings(bits=32, residency="device", weight_decay=0.1, paging_folder=Path())
    optimizer = AdapterOptimizer(trainable_parameters(model), options)
    for _ in range(3):
        optimizer.zero_gradients()
        step(model)
        optimizer.update(0.01)
    adapter = model.linears["model.layers.0.self_attn.v_proj"].adapter
    assert adapter is not None
    assert adapter.lora_magnitude_vector is not None
    assert float(adapter.lora_magnitude_vector.detach()[5]) == 0.0
    assert not bool(adapter.lora_B[5].any())
    assert bool(adapter.lora_B.any(dim=1)[[4, 6]].all())
    assert bool(torch.isfinite(packed_logits(model, DOCUMENTS)).all())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, NF4Cache]:
    return prepare_apart(tmp_path_factory.mktemp("llama"), CONFIGS["llama"])


def begun(prepared: tuple[Base, NF4Cache], dtype: torch.dtype = FP32) -> tuple[QuantizedModel, AdapterOptimizer]:
    model = load_for_training(*prepared)
    lora = replace(lora_settings(model), use_dora=True)
    attach_adapters(model, lora, random_adapter(model, lora, b_size=0.05), dtype=dtype)
    options = OptimizerSettings(bits=32, residency="device", weight_decay=0.0, paging_folder=Path())
    return model, AdapterOptimizer(trainable_parameters(model), options)


def step(model: QuantizedModel) -> Tensor:
    return accumulate_gradients(model, [packed(DOCUMENTS)], num_supervised_tokens=COUNT, loss_chunk_tokens=16)


def test_a_new_adapter_leaves_the_model_as_it_is(prepared: tuple[Base, NF4Cache]) -> None:
    model = load_for_training(*prepared)
    without_TV = packed_logits(model, DOCUMENTS)
    lora = replace(lora_settings(model), use_dora=True)
    attach_new_adapters(model, lora, dtype=torch.bfloat16, seed=0)
    dtypes = {name.rpartition(".")[2]: own.dtype for name, own in trainable_parameters(model).items()}
    assert dtypes == {"lora_A": torch.bfloat16, "lora_B": torch.bfloat16, "lora_magnitude_vector": FP32}
    assert relative_error(packed_logits(model, DOCUMENTS), without_TV) <= 1e-6


def evaluated(model: QuantizedModel) -> Tensor:
    return evaluate(model, [packed(DOCUMENTS)], loss_chunk_tokens=16)


def generated(model: QuantizedModel) -> Tensor:
    ids_BT = torch.arange(3, 20).unsqueeze(0)
    module: Any = model.module
    with generating(model, 0):
        logits_BTV: Tensor = module(input_ids=ids_BT, use_cache=True).logits
    return logits_BTV


@pytest.mark.parametrize("used", [step, evaluated, generated])
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_after_an_update_and_after_a_resume_the_norms_are_of_the_new_weights(
    used: Callable[[QuantizedModel], Tensor], dtype: torch.dtype, prepared: tuple[Base, NF4Cache]
) -> None:
    model, optimizer = begun(prepared, dtype)
    before = step(model)
    optimizer.update(0.05)
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    weights = {name: own.detach().float() for name, own in trainable_parameters(model).items()}
    found = used(model)
    fresh = load_for_training(*prepared)
    lora = replace(lora_settings(fresh), use_dora=True)
    attach_adapters(fresh, lora, weights, dtype=dtype)
    assert torch.equal(used(fresh), found)
    resumed, its_optimizer = begun(prepared, dtype)
    its_optimizer.load_state_dict(state)
    assert torch.equal(used(resumed), found)
    if used is step:
        assert float(found) != float(before)


def test_norms_are_computed_once_for_all_micro_batches(
    prepared: tuple[Base, NF4Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = begun(prepared)
    computed: list[NF4Linear] = []
    real = dora.set_row_norms_

    def counted(norm_O: Tensor, linear: NF4Linear, *rest: Any) -> None:
        computed.append(linear)
        real(norm_O, linear, *rest)

    monkeypatch.setattr(dora, "set_row_norms_", counted)
    batches = [packed(DOCUMENTS[:1]), packed(DOCUMENTS[1:]), packed(DOCUMENTS)]
    accumulate_gradients(model, batches, num_supervised_tokens=2 * COUNT, loss_chunk_tokens=16)
    assert computed == list(model.linears.values())
