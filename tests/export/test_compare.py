"""Losses, divergence and agreement are those of full logits, whatever the chunk; equal models are no distance apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_trainer.export import compare as module
from qlora_trainer.export.compare import Comparison, compare, is_worse
from qlora_trainer.model.base import resolve_base
from qlora_trainer.model.streamed import StreamedModel, stream_model
from qlora_trainer.run.evaluation import micro_batches
from tests.export.made_adapters import model_logits
from tests.hardware.profiled_memory import allocated_by
from tests.model.tiny_bases import CONFIGS, small_config, write_base
from tests.model.tiny_models import CPU, tiny_documents

DOCUMENTS = tiny_documents(33, 21, 40)


def streamed(folder: Path) -> StreamedModel:
    base = resolve_base(str(folder))
    return stream_model(base.folder, base.config, compute_dtype=torch.float32, device=CPU)


def learned(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Logits at the positions whose next token is learned, and those tokens."""
    rows = logits_TV.split([document.num_tokens for document in DOCUMENTS])
    chosen, targets = [], []
    for row_TV, document in zip(rows, DOCUMENTS, strict=True):
        labels_T = torch.from_numpy(document.labels_T).long()[1:]
        chosen.append(row_TV[:-1][labels_T >= 0])
        targets.append(labels_T[labels_T >= 0])
    return torch.cat(chosen), torch.cat(targets)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("chunk_bytes", [2**28, 6 * 4 * 128 * 7])
def test_figures_are_those_of_full_logits(
    name: str, packing: bool, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
    one, other = (write_base(tmp_path / str(seed), CONFIGS[name], seed=seed) for seed in (0, 1))
    found = compare(streamed(one), streamed(other), list(micro_batches(DOCUMENTS, 2048, packing=packing)))
    (own_NV, targets_N), (other_NV, _) = (learned(model_logits(folder, DOCUMENTS)) for folder in (one, other))
    own, others = (torch.distributions.Categorical(logits=logits.double()) for logits in (own_NV, other_NV))
    assert found.num_tokens == targets_N.numel()
    assert found.reference_loss == pytest.approx(-float(own.log_prob(targets_N).mean()), rel=1e-5)
    assert found.loss == pytest.approx(-float(others.log_prob(targets_N).mean()), rel=1e-5)
    assert found.kl == pytest.approx(float(torch.distributions.kl_divergence(own, others).mean()), rel=1e-4)
    assert found.agreement == pytest.approx(float((own_NV.argmax(-1) == other_NV.argmax(-1)).double().mean()))
    assert found.kl > 0.1  # they are far apart


def test_a_model_is_no_distance_from_itself(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", CONFIGS["llama"])
    found = compare(streamed(folder), streamed(folder), list(micro_batches(DOCUMENTS, 2048, packing=True)))
    assert (found.kl, found.agreement, found.loss) == (0.0, 1.0, found.reference_loss)


def test_full_logits_never_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary large enough for logits to be most of it. Mutation tried: one chunk takes 12 times as much."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", 6 * 4 * 16384 * 8)
    config = small_config("llama", vocab_size=16384)
    model = streamed(write_base(tmp_path / "base", config))
    batches = list(micro_batches(tiny_documents(130, 126), 2048, packing=True))
    num_bytes = allocated_by(lambda: compare(model, model, batches)).peak_bytes
    assert num_bytes < 256 * 16384 * 4 / 2  # half of one model's full logits; the head is upcast in 4 MB of it


@pytest.mark.parametrize(
    "loss,is_bad", [(1.0, False), (1.0199, False), (1.0201, True), (0.5, False), (float("nan"), True)]
)
def test_what_is_worse(loss: float, is_bad: bool) -> None:
    comparison = Comparison(num_tokens=1, reference_loss=1.0, loss=loss, kl=0.0, agreement=1.0)
    assert is_worse(comparison, by=0.02) is is_bad
