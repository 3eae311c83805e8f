"""Packed documents do not read each other: nothing of a document changes, not a bit, whatever its neighbours say.

And what they learn is what they would learn one by one. Each claim is also made of a row without borders, and fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_trainer.model.adapters import trainable_parameters
from qlora_trainer.model.base import resolve_base
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from qlora_trainer.model.quantized import QuantizedModel, hidden_states
from qlora_trainer.step.batch import MicroBatch
from qlora_trainer.step.document import IGNORE_INDEX, Document
from qlora_trainer.step.train_step import accumulate_gradients
from tests.model.tiny_bases import CONFIGS
from tests.model.tiny_models import attach_random_adapter, load_for_training, packed, prepare, tiny_documents

TOLERANCE = 1e-5  # relative, fp32 compute
LENGTHS = (30, 23, 41)  # each longer than the sliding windows
DISTURBED = 1  # the document between the two others


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> QuantizedModel:
    return _with_adapter(load_tiny(tmp_path_factory, request.param))


def load_tiny(tmp_path_factory: pytest.TempPathFactory, name: str) -> QuantizedModel:
    folder = tmp_path_factory.mktemp(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return load_for_training(*prepare(folder / "base", CONFIGS[name]))


def _with_adapter(model: QuantizedModel) -> QuantizedModel:
    attach_random_adapter(model)
    return model


def without_borders(documents: Sequence[Document]) -> MicroBatch:
    """The mistake that others make: positions restart, but each token reads the whole row before it."""
    row = packed(documents)
    return replace(row, document_lengths=(sum(row.document_lengths),))


def disturbed(documents: Sequence[Document], vocabulary: int) -> list[Document]:
    """Other tokens in the document in the middle, as many as before."""
    changed = list(documents)
    ids_T = (documents[DISTURBED].input_ids_T.astype(np.int64) * 7 + 13) % (vocabulary - 3) + 3
    changed[DISTURBED] = replace(documents[DISTURBED], input_ids_T=ids_T.astype(np.int32))
    return changed


def silenced(documents: Sequence[Document]) -> list[Document]:
    """The document in the middle is read and not learned, so that every gradient is its neighbours'."""
    changed = list(documents)
    labels_T = np.full_like(documents[DISTURBED].labels_T, IGNORE_INDEX)
    changed[DISTURBED] = replace(documents[DISTURBED], labels_T=labels_T)
    return changed


@torch.no_grad()
def neighbours_states(model: QuantizedModel, row: MicroBatch) -> Tensor:
    """What the head makes logits of, of the first and the last document: [tokens, hidden]."""
    hidden_BTH = hidden_states(model, row.input_ids_BT, row.position_ids_BT, row.document_lengths)
    logits_TV = model.logit_shape.apply(model.head(hidden_BTH))[0, : sum(LENGTHS)]
    first, last = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    return torch.cat([logits_TV[:first], logits_TV[last:]])


def gradients(model: QuantizedModel, rows: Sequence[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
    parameters = trainable_parameters(model)
    for parameter in parameters.values():
        parameter.grad = None
    num_supervised_tokens = sum(row.targets_N.numel() for row in rows)
    loss = accumulate_gradients(model, rows, num_supervised_tokens=num_supervised_tokens, loss_chunk_tokens=16)
    return float(loss), {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


def require_isolated(
    model: QuantizedModel, vocabulary: int, pack: Callable[[Sequence[Document]], MicroBatch] = packed
) -> None:
    documents = silenced(tiny_documents(*LENGTHS))
    before, after = pack(documents), pack(disturbed(documents, vocabulary))
    assert not torch.equal(before.input_ids_BT, after.input_ids_BT)
    assert torch.equal(neighbours_states(model, before), neighbours_states(model, after))
    loss, expected = gradients(model, [before])
    loss_after, found = gradients(model, [after])
    assert loss == loss_after
    assert len(expected) == len(trainable_parameters(model))
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def require_like_one_by_one(model: QuantizedModel, pack: Callable[[Sequence[Document]], MicroBatch] = packed) -> None:
    documents = tiny_documents(*LENGTHS)
    loss, expected = gradients(model, [packed([document]) for document in documents])
    packed_loss, found = gradients(model, [pack(documents)])
    assert packed_loss == pytest.approx(loss, rel=TOLERANCE)
    for name, gradient in expected.items():
        error = torch.linalg.vector_norm(found[name] - gradient) / torch.linalg.vector_norm(gradient)
        assert error <= TOLERANCE, f"{name}: {error:.2e}"


def test_a_neighbour_changes_no_bit(model: QuantizedModel) -> None:
    require_isolated(model, model.module.config.vocab_size)


def test_packed_documents_learn_what_they_would_alone(model: QuantizedModel) -> None:
    require_like_one_by_one(model)


def test_both_fail_without_the_borders(model: QuantizedModel) -> None:
    with pytest.raises(AssertionError):
        require_isolated(model, model.module.config.vocab_size, without_borders)
    with pytest.raises(AssertionError):
        require_like_one_by_one(model, without_borders)


@pytest.mark.slow
def test_the_shipped_model_is_isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base = resolve_base("smollm2-135m")
    model = _with_adapter(load_for_training(base, prepare_nf4_cache(base, double_quant=True)))
    require_isolated(model, model.module.config.vocab_size)
    require_like_one_by_one(model)
    with pytest.raises(AssertionError):
        require_isolated(model, model.module.config.vocab_size, without_borders)
