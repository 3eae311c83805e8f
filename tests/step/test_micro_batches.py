"""However a global batch is cut, packed or padded, recomputed or not: the same loss and gradients, dropout included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Phi3Config, PreTrainedConfig

from qlora_trainer.model import nf4
from qlora_trainer.model.activation_policy import decoder_layers, recompute_layers
from qlora_trainer.model.adapters import attach_adapters, trainable_parameters
from qlora_trainer.model.lora_settings import LoraSettings, select_targets
from qlora_trainer.model.quantized import QuantizedModel, assemble
from qlora_trainer.model.skeleton import build_skeleton
from qlora_trainer.step.batch import ROW_MULTIPLE, make_micro_batch
from qlora_trainer.step.document import IGNORE_INDEX, Document
from qlora_trainer.step.train_step import accumulate_gradients, evaluate

TOLERANCE = 1e-5  # relative, fp32 compute
VOCABULARY = 160
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE, head_dim=16, sliding_window=8),  # shorter than most documents below
    "phi3": Phi3Config(**SHAPE),
}
EVERY_CUT = {
    "one": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "one in another order": [[7, 2, 0, 5, 6, 3, 1, 4]],
    "two": [[3, 1, 0], [2, 4, 5, 6, 7]],
    "eight": [[0], [1], [2], [3], [4], [5], [6], [7]],
}


class RandomWeights:
    """The parameters of a random model, its linears packed (a `WeightSource`)."""

    def __init__(self, config: PreTrainedConfig) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self._parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))

    def nf4(self, name: str) -> nf4.NF4Weight:
        return nf4.quantize(self._parameters[name].data, double_quant=True)

    def dense(self, name: str) -> Tensor:
        return self._parameters[name].data


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> QuantizedModel:
    config = CONFIGS[request.param]
    skeleton = build_skeleton(config, with_buffers=True)
    built = assemble(skeleton, RandomWeights(config), compute_dtype=torch.float32, device=torch.device("cpu"))
    built.module.train()
    return built


def make_documents() -> list[Document]:
    rng = np.random.default_rng(0)
    documents = []
    for index in range(8):
        num_tokens = int(rng.integers(5, 40))
        input_ids_T = rng.integers(0, VOCABULARY, num_tokens, dtype=np.int32)
        labels_T = input_ids_T.copy()
        labels_T[: num_tokens // 2] = IGNORE_INDEX
        documents.append(Document(index, input_ids_T, labels_T))
    return documents


DOCUMENTS = make_documents()
NUM_SUPERVISED_TOKENS = sum(document.num_supervised_tokens for document in DOCUMENTS)


def attach(model: QuantizedModel, dropout: float) -> None:
    """bf16 adapters as they are after some training: B is not zero."""
    settings = LoraSettings(4, 8.0, dropout, select_targets(list(model.linears), "all-linear"))
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name in settings.targets:
        linear = model.linears[name]
        weights[f"{name}.lora_A"] = torch.randn(settings.rank, linear.in_features, generator=generator) / 8
        weights[f"{name}.lora_B"] = 0.05 * torch.randn(linear.out_features, settings.rank, generator=generator)
    attach_adapters(model, settings, weights, dtype=torch.bfloat16)


def loss_and_gradients(
    model: QuantizedModel,
    cut: Sequence[Sequence[int]],
    *,
    dropout: float,
    packing: bool = True,
    num_recomputed: int = 0,
    loss_chunk_tokens: int = 16,
    step: int = 3,
) -> tuple[float, dict[str, Tensor]]:
    attach(model, dropout)
    recompute_layers(model, num_recomputed)
    micro_batches = [
        make_micro_batch([DOCUMENTS[index] for index in indices], seed=0, step=step, packing=packing) for indices in cut
    ]
    loss = accumulate_gradients(
        model, micro_batches, num_supervised_tokens=NUM_SUPERVISED_TOKENS, loss_chunk_tokens=loss_chunk_tokens
    )
    gradients = {name: parameter.grad for name, parameter in trainable_parameters(model).items()}
    return float(loss), {name: gradient for name, gradient in gradients.items() if gradient is not None}


def require_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        error = torch.linalg.vector_norm(found[1][name] - gradient) / torch.linalg.vector_norm(gradient)
        assert error <= TOLERANCE, f"{name}: {error:.2e}"


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_cut_changes_nothing(model: QuantizedModel, dropout: float, packing: bool) -> None:
    num_layers = len(decoder_layers(model))
    expected = loss_and_gradients(model, EVERY_CUT["one"], dropout=dropout)

    for cut in EVERY_CUT.values():
        for num_recomputed in (0, num_layers):
            found = loss_and_gradients(model, cut, dropout=dropout, packing=packing, num_recomputed=num_recomputed)
            require_same(found, expected)


@pytest.mark.parametrize("loss_chunk_tokens", [1, 7, 4096])
def test_the_loss_chunk_changes_nothing(model: QuantizedModel, loss_chunk_tokens: int) -> None:
    expected = loss_and_gradients(model, EVERY_CUT["two"], dropout=0.1)

    require_same(
        loss_and_gradients(model, EVERY_CUT["two"], dropout=0.1, loss_chunk_tokens=loss_chunk_tokens), expected
    )


def test_recomputing_some_layers_changes_nothing_bit_for_bit(model: QuantizedModel) -> None:
    loss, gradients = loss_and_gradients(model, EVERY_CUT["two"], dropout=0.1)
    again, recomputed = loss_and_gradients(model, EVERY_CUT["two"], dropout=0.1, num_recomputed=2)

    assert again == loss
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients.items())


def test_dropout_is_drawn_anew_each_step_and_the_same_each_time(model: QuantizedModel) -> None:
    _, without = loss_and_gradients(model, EVERY_CUT["one"], dropout=0.0)
    third = loss_and_gradients(model, EVERY_CUT["one"], dropout=0.1, step=3)
    third_again = loss_and_gradients(model, EVERY_CUT["one"], dropout=0.1, step=3)
    _, fourth = loss_and_gradients(model, EVERY_CUT["one"], dropout=0.1, step=4)

    assert third[0] == third_again[0]
    for name, gradient in third[1].items():
        assert torch.equal(gradient, third_again[1][name])
        for other in (without[name], fourth[name]):  # a tenth of the inputs differ, so their sums do by far more
            assert torch.linalg.vector_norm(gradient - other) > 0.01 * torch.linalg.vector_norm(gradient)


def test_evaluation_knows_no_dropout_and_no_cut(model: QuantizedModel) -> None:
    expected, _ = loss_and_gradients(model, EVERY_CUT["one"], dropout=0.0)
    attach(model, 0.5)

    for cut, packing in ((EVERY_CUT["one"], True), (EVERY_CUT["two"], False), (EVERY_CUT["eight"], True)):
        micro_batches = [
            make_micro_batch([DOCUMENTS[index] for index in indices], seed=0, step=0, packing=packing)
            for indices in cut
        ]
        summed = evaluate(model, micro_batches, loss_chunk_tokens=16)
        assert float(summed) / NUM_SUPERVISED_TOKENS == pytest.approx(expected, rel=TOLERANCE)
    assert model.module.training  # as it was before


def test_packed_rows_are_filled_up_to_few_lengths() -> None:
    """Each new length would cost oneDNN kernels that are never freed; filling is isolated and not trained on."""
    rng = np.random.default_rng(0)
    lengths = set()
    for index in range(40):
        num_tokens = int(rng.integers(2, 300))
        ids = rng.integers(3, 100, num_tokens).astype(np.int32)
        row = make_micro_batch([Document(index, ids, ids.copy())], seed=0, step=0, packing=True)
        lengths.add(row.input_ids_BT.shape[1])
        assert sum(row.document_lengths) == row.input_ids_BT.shape[1] == row.row_keys_T.numel()
        assert row.document_lengths[0] == num_tokens == row.num_tokens
        assert int(row.source_positions_N.max()) < num_tokens
    assert lengths <= set(range(ROW_MULTIPLE, 321, ROW_MULTIPLE))
