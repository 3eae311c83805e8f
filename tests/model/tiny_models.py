"""Tiny quantized models, adapters and documents, and one training step of ours over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from qlora_trainer.model.activation_policy import decoder_layers, recompute_layers
from qlora_trainer.model.adapters import attach_adapters, trainable_parameters
from qlora_trainer.model.base import Base, resolve_base
from qlora_trainer.model.load import load_quantized
from qlora_trainer.model.lora_settings import LoraSettings, select_targets
from qlora_trainer.model.nf4_cache import NF4Cache, prepare_nf4_cache
from qlora_trainer.model.quantized import QuantizedModel, hidden_states
from qlora_trainer.model.trained_tables import table_parameters, table_weights
from qlora_trainer.model.trained_vectors import vector_weights
from qlora_trainer.step.batch import MicroBatch, make_micro_batch
from qlora_trainer.step.document import IGNORE_INDEX, Document
from qlora_trainer.step.train_step import accumulate_gradients
from tests.model.tiny_bases import VOCABULARY, write_base

RANK = 4
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Step:
    """What one training step computes.

    Attributes:
        loss: mean over the supervised tokens of all documents.
        gradients: `{target}.lora_A` and `{target}.lora_B`, fp32.
    """

    loss: float
    gradients: dict[str, Tensor]


def prepare(
    folder: Path, config: PreTrainedConfig, *, double_quant: bool = True, nf4_head: bool = False, **changes: Any
) -> tuple[Base, NF4Cache]:
    """A random base of `config` in `folder`, and its NF4 form; `changes` go to `write_base`."""
    base = resolve_base(str(write_base(folder, config, **changes)))
    return base, prepare_nf4_cache(base, double_quant=double_quant, nf4_head=nf4_head)


def prepare_apart(folder: Path, config: PreTrainedConfig) -> tuple[Base, NF4Cache]:
    """As `prepare`, with a cache of its own in `folder`: for fixtures that outlive the environment of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return prepare(folder / "base", config)


def load_for_training(base: Base, cache: NF4Cache, compute_dtype: torch.dtype = torch.float32) -> QuantizedModel:
    """The base on the CPU, in train mode, without an adapter."""
    model = load_quantized(base, cache, compute_dtype=compute_dtype, device=CPU)
    model.module.train()
    return model


def lora_settings(model: QuantizedModel, target_modules: str | Sequence[str] = "all-linear") -> LoraSettings:
    """Rank 4, scale 2, no dropout."""
    return LoraSettings(rank=RANK, alpha=8.0, dropout=0.0, targets=select_targets(list(model.linears), target_modules))


def random_adapter(model: QuantizedModel, settings: LoraSettings, *, b_size: float, seed: int = 0) -> dict[str, Tensor]:
    """fp32 matrices that bf16 holds exactly, B normal with standard deviation `b_size`, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name in settings.targets:
        linear = model.linears[name]
        a_RI = torch.randn(settings.rank_of(name), linear.in_features, generator=generator) / linear.in_features**0.5
        weights[f"{name}.lora_A"] = a_RI
        b_OR = torch.randn(linear.out_features, settings.rank_of(name), generator=generator)
        weights[f"{name}.lora_B"] = b_size * b_OR
        if settings.use_dora:
            weights[f"{name}.lora_magnitude_vector"] = 0.5 + torch.rand(linear.out_features, generator=generator)
        if settings.lora_bias:
            weights[f"{name}.lora_B_bias"] = b_size * torch.randn(linear.out_features, generator=generator)
    for name, own in {**vector_weights(model, settings), **table_weights(model, settings)}.items():
        weights[name] = own.float() + b_size * torch.randn(own.shape, generator=generator)
    return {name: tensor.bfloat16().float() for name, tensor in weights.items()}


def attach_random_adapter(model: QuantizedModel, *, b_size: float = 0.05) -> tuple[LoraSettings, dict[str, Tensor]]:
    """Give every linear of `model` an fp32 adapter that changes the result."""
    settings = lora_settings(model)
    weights = random_adapter(model, settings, b_size=b_size)
    attach_adapters(model, settings, weights, dtype=torch.float32)
    return settings, weights


def tiny_documents(*lengths: int, seed: int = 0) -> list[Document]:
    """Random tokens; the first third of each document is not trained on."""
    rng = np.random.default_rng(seed)
    documents = []
    for index, length in enumerate(lengths):
        input_ids_T = rng.integers(3, VOCABULARY, length, dtype=np.int32)
        labels_T = input_ids_T.copy()
        labels_T[: length // 3] = IGNORE_INDEX
        documents.append(Document(index, input_ids_T, labels_T))
    return documents


def packed(documents: Sequence[Document]) -> MicroBatch:
    """All documents in one row."""
    return make_micro_batch(documents, seed=0, step=0, packing=True)


@torch.no_grad()
def packed_logits(model: QuantizedModel, documents: Sequence[Document]) -> Tensor:
    """fp32 logits [T, V] of all documents, run as one row; what fills the row up is left out."""
    row = packed(documents)
    hidden_BTH = hidden_states(model, row.input_ids_BT, row.position_ids_BT, row.document_lengths)
    return model.logit_shape.apply(model.head(hidden_BTH))[0, : row.num_tokens].float()


def our_step(
    model: QuantizedModel,
    settings: LoraSettings,
    weights: Mapping[str, Tensor],
    documents: Sequence[Document],
    *,
    adapter_dtype: torch.dtype = torch.float32,
) -> Step:
    """Loss and gradients over `documents` in one packed row, every layer recomputed, the loss in chunks of 16."""
    attach_adapters(model, settings, weights, dtype=adapter_dtype)
    for parameter in table_parameters(model).values():  # the optimizer's part: they need a place for gradients
        parameter.grad = torch.zeros(parameter.shape)
    recompute_layers(model, len(decoder_layers(model)))
    num_supervised_tokens = sum(document.num_supervised_tokens for document in documents)
    loss = accumulate_gradients(
        model, [packed(documents)], num_supervised_tokens=num_supervised_tokens, loss_chunk_tokens=16
    )
    return Step(float(loss), {name: parameter.grad for name, parameter in _with_gradients(model)})


def _with_gradients(model: QuantizedModel) -> list[tuple[str, Any]]:
    parameters = list(trainable_parameters(model).items())
    assert all(parameter.grad is not None for _, parameter in parameters)
    return parameters


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of what is expected."""
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))
