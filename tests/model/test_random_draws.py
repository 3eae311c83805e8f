"""Random numbers that are functions of their keys: the right rate, no pattern, nothing that depends on history."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qlora_trainer.model.lora_adapter import LoraAdapter, OfTokens
from qlora_trainer.model.random_draws import dropout_factors, key32, mix32, token_keys
from qlora_trainer.step.batch import make_micro_batch
from qlora_trainer.step.document import Document

KEYS = st.integers(0, 2**32 - 1)


def lowbias32(value: int) -> int:
    """C. Wellons' hash in Python's own integers."""
    value ^= value >> 16
    value = value * 0x7FEB352D & 0xFFFFFFFF
    value ^= value >> 15
    value = value * 0x846CA68B & 0xFFFFFFFF
    return value ^ value >> 16


@given(st.lists(KEYS, min_size=1, max_size=20))
def test_mix32_is_lowbias32_and_leaves_its_argument_alone(values: list[int]) -> None:
    keys = torch.tensor(values, dtype=torch.int64)

    assert mix32(keys).tolist() == [lowbias32(value) for value in values]
    assert keys.tolist() == values


def test_keys_are_the_same_in_every_version() -> None:
    # A change here would break the exact resume of runs that were started before it.
    assert key32("document", 0, 3, 7) == 3004776683
    assert key32("dropout", "model.layers.0.self_attn.q_proj") == 3476464853


@given(st.lists(st.one_of(st.integers(), st.text(st.characters(exclude_characters="\0"))), min_size=2, max_size=2))
def test_keys_tell_their_parts_apart(parts: list[int | str]) -> None:
    joined = "".join(str(part) for part in parts)

    assert key32(*parts) == key32(*parts)
    assert key32(*parts) != key32(joined)


def row_keys(num_tokens: int, document_key: int = 12345) -> Tensor:
    return token_keys([document_key], [num_tokens])


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.9])
def test_the_rate_is_the_probability(probability: float) -> None:
    num_tokens, num_columns = 1000, 1000
    factors = dropout_factors(row_keys(num_tokens), key32("layer"), num_columns, probability, torch.float64)

    assert set(factors.unique().tolist()) == {0.0, 1.0 / (1.0 - probability)}
    # Five standard deviations: of all draws together, of a row's, of a column's.
    deviation = math.sqrt(probability * (1.0 - probability))
    dropped = (factors == 0.0).double()
    assert abs(float(dropped.mean()) - probability) < 5 * deviation / 1000
    assert float((dropped.mean(0) - probability).abs().max()) < 5 * deviation / math.sqrt(num_tokens)
    assert float((dropped.mean(1) - probability).abs().max()) < 5 * deviation / math.sqrt(num_columns)
    assert float(factors.mean()) == pytest.approx(1.0, abs=5 * deviation / (1.0 - probability) / 1000)


def correlations(standard_NM: Tensor) -> Tensor:
    """Between all pairs of different rows, each row of M numbers with mean 0 and variance 1."""
    products = standard_NM @ standard_NM.T / standard_NM.shape[1]
    return products[~torch.eye(standard_NM.shape[0], dtype=torch.bool)]


def test_rows_columns_and_layers_are_independent() -> None:
    probability, size = 0.1, 512
    layers = [
        dropout_factors(row_keys(size), key32("dropout", name), size, probability, torch.float64) for name in ("q", "k")
    ]
    first, second = (((factors == 0.0).double() - probability) / math.sqrt(0.09) for factors in layers)

    # Correlations of independent draws have standard deviation 1 / sqrt(512); 6 of them for 2 x 10^5 pairs.
    for matrix in (first, first.T):
        found = correlations(matrix)
        assert float(found.abs().max()) < 6 / math.sqrt(size)
        assert float(found.std()) == pytest.approx(1 / math.sqrt(size), rel=0.05)
    assert abs(float((first * second).mean())) < 5 / size
    # Neighbours along a diagonal would show a pattern that rows and columns alone do not.
    assert abs(float((first[1:, 1:] * first[:-1, :-1]).mean())) < 5 / size


def test_neighbouring_documents_and_steps_are_independent() -> None:
    matrices = []
    for step, index in ((0, 0), (0, 1), (1, 0)):
        keys = row_keys(512, key32("document", 0, step, index))
        factors = dropout_factors(keys, key32("layer"), 512, 0.5, torch.float64)
        matrices.append((factors == 0.0).double() * 2 - 1)

    for other in matrices[1:]:
        assert abs(float((matrices[0] * other).mean())) < 5 / 512


def test_a_token_has_its_own_key_wherever_its_document_lies() -> None:
    documents = [
        Document(index, np.arange(n, dtype=np.int32), np.arange(n, dtype=np.int32)) for index, n in ((4, 6), (9, 3))
    ]

    together = make_micro_batch(documents, seed=1, step=2, packing=True).row_keys_T
    turned = make_micro_batch(documents[::-1], seed=1, step=2, packing=True).row_keys_T
    padded = make_micro_batch(documents, seed=1, step=2, packing=False).row_keys_T
    alone = [
        make_micro_batch([document], seed=1, step=2, packing=True).row_keys_T[: document.num_tokens]
        for document in documents
    ]

    assert torch.equal(together[:9], torch.cat(alone))
    assert torch.equal(turned[:9], torch.cat(alone[::-1]))
    assert torch.equal(padded.view(2, 6)[0], alone[0])
    assert torch.equal(padded.view(2, 6)[1, :3], alone[1])
    assert together.unique().numel() == together.numel()
    for seed, step in ((2, 2), (1, 3)):
        other = make_micro_batch(documents, seed=seed, step=step, packing=True).row_keys_T
        assert not bool((other == together)[:9].any())


def make_adapter(keys: OfTokens, layer_key: int, dropout: float = 0.3) -> LoraAdapter:
    return LoraAdapter(
        torch.zeros(2, 32), torch.zeros(8, 2), scale=1.0, dropout=dropout, layer_key=layer_key, of_tokens=keys
    )


def test_an_adapter_draws_by_token_and_layer_and_the_same_each_time() -> None:
    keys = OfTokens(row_keys(10))
    first, second = make_adapter(keys, 1), make_adapter(keys, 2)
    drawn = first.draw_dropout(10, torch.float32)
    torch.manual_seed(5)  # no generator has a part in it

    again, other = first.draw_dropout(10, torch.float32), second.draw_dropout(10, torch.float32)

    assert drawn is not None
    assert again is not None
    assert other is not None
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)
    keys.row_keys_T = row_keys(10, document_key=6)
    moved = first.draw_dropout(10, torch.float32)
    assert moved is not None
    assert not torch.equal(moved, drawn)


def test_no_dropout_is_drawn_where_there_should_be_none() -> None:
    keys = OfTokens(row_keys(10))

    assert make_adapter(keys, 1, dropout=0.0).draw_dropout(10, torch.float32) is None
    assert make_adapter(OfTokens(), 1).draw_dropout(10, torch.float32) is None
    assert make_adapter(keys, 1).eval().draw_dropout(10, torch.float32) is None


def test_keys_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="10 dropout keys for 11 tokens"):
        make_adapter(OfTokens(row_keys(10)), 1).draw_dropout(11, torch.float32)
