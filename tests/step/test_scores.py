"""Loss and accuracy of an evaluation against the full logits, which it never makes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from qlora_trainer.step.batch import MicroBatch, make_micro_batch
from qlora_trainer.step.document import Document
from qlora_trainer.step.scores import Scores, score
from qlora_trainer.step.train_step import evaluate
from tests.hardware.profiled_memory import allocated_by
from tests.model.tiny_bases import CONFIGS, small_config
from tests.model.tiny_models import attach_random_adapter, load_for_training, packed_logits, prepare, tiny_documents

DOCUMENTS = tiny_documents(33, 21, 40)


def batches(*cuts: slice, packing: bool = True) -> list[MicroBatch]:
    return [make_micro_batch(DOCUMENTS[cut], seed=0, step=0, packing=packing) for cut in cuts]


def num_right(model: object, documents: list[Document]) -> int:
    logits_TV = packed_logits(model, documents)  # type: ignore[arg-type]
    row = make_micro_batch(documents, seed=0, step=0, packing=True)
    return int((logits_TV[row.source_positions_N].argmax(-1) == row.targets_N).sum())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_what_the_full_logits_give(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = load_for_training(*prepare(tmp_path / "base", CONFIGS[name]), dtype)
    attach_random_adapter(model, b_size=0.3)
    # What the model finds likeliest is the right token of every third position, so that there is something to count.
    likeliest_T = packed_logits(model, DOCUMENTS[:1]).argmax(-1).numpy()
    DOCUMENTS[0].labels_T[1:][::3] = likeliest_T[:-1][::3]
    found = score(model, batches(slice(0, 2), slice(2, 3)), loss_chunk_tokens=7)
    num_tokens = sum(document.num_supervised_tokens for document in DOCUMENTS)
    assert model.module.training  # as it was
    assert found.num_supervised_tokens == num_tokens
    expected = sum(num_right(model, DOCUMENTS[cut]) for cut in (slice(0, 2), slice(2, 3)))
    assert 8 <= expected < num_tokens
    assert found.accuracy == expected / num_tokens
    total = evaluate(model, batches(slice(0, 2), slice(2, 3)), loss_chunk_tokens=7)
    assert found.loss == float(total) / num_tokens  # to the bit
    assert found.perplexity == math.exp(found.loss)
    padded = score(model, batches(slice(0, 3), packing=False), loss_chunk_tokens=100)
    assert padded.loss == pytest.approx(found.loss, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_full_logits_never_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = load_for_training(*prepare(tmp_path / "base", small_config("llama", vocab_size=4096)))
    model.module.eval()
    documents = tiny_documents(300, 300)
    row = make_micro_batch(documents, seed=0, step=0, packing=True)

    def peak_bytes(loss_chunk_tokens: int) -> int:
        return allocated_by(lambda: score(model, [row], loss_chunk_tokens=loss_chunk_tokens)).peak_bytes

    full_bytes = 4 * 4096 * row.targets_N.numel()
    assert peak_bytes(8) < full_bytes / 2 < full_bytes <= peak_bytes(1000)


def test_a_perplexity_beyond_a_double_is_infinite() -> None:
    assert Scores(loss=1e4, accuracy=0.0, num_supervised_tokens=1).perplexity == math.inf
    assert math.isnan(Scores(loss=math.nan, accuracy=0.0, num_supervised_tokens=1).perplexity)
