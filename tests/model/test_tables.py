"""Embedding and head on the host: the same bits, from a mapped file whose pages do not stay, and block by block."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_trainer.config.levers import NO_LEVERS, Levers
from qlora_trainer.hardware.mapped_pages import file_spans
from qlora_trainer.hardware.memory import resident_bytes
from qlora_trainer.model import vocabulary_blocks
from qlora_trainer.model.adapters import attach_new_adapters, trainable_parameters
from qlora_trainer.model.base import Base
from qlora_trainer.model.frozen import FrozenHead
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.pull_levers import pull_levers
from qlora_trainer.model.quantized import LogitShape, QuantizedModel
from qlora_trainer.model.tables import embeddings_of, tables_of
from qlora_trainer.model.vocabulary_blocks import VocabularyBlocks, look_up_on_host, rows_in_block
from qlora_trainer.step.loss import chunk_logits, chunked_cross_entropy
from qlora_trainer.step.train_step import accumulate_gradients, evaluate
from tests.hardware.late_stream import LateStream
from tests.model.tiny_bases import CONFIGS
from tests.model.tiny_models import CPU, load_for_training, packed, prepare, relative_error, tiny_documents

MIB = 2**20
ON_HOST = Levers(embedding_residency="host")
NO_SHAPE = LogitShape(1.0, 0.0)
Prepare = Callable[[str], tuple[Base, NF4Cache]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    @cache
    def make(name: str) -> tuple[Base, NF4Cache]:
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            return prepare(folder / "base", CONFIGS[name])

    return make


@pytest.fixture
def table_VH(disk_folder: Path) -> Tensor:
    """Mapped: 30,000 tokens, 16 MiB in bf16, which is two blocks."""
    generator = torch.Generator().manual_seed(0)
    path = disk_folder / "table.safetensors"
    save_file({"table": torch.randn(30_000, 280, generator=generator).bfloat16()}, path)
    with safe_open(path, framework="pt") as file:
        found: Tensor = file.get_tensor("table")
        return found


def results(model: QuantizedModel) -> list[Tensor]:
    batches = [packed(tiny_documents(40, 24)), packed(tiny_documents(30, seed=1))]
    found = [evaluate(model, batches, loss_chunk_tokens=16)]
    found.append(accumulate_gradients(model, batches, num_supervised_tokens=60, loss_chunk_tokens=16))
    for parameter in trainable_parameters(model).values():
        assert parameter.grad is not None
        found.append(parameter.grad)
        parameter.grad = None
    ids = torch.arange(3, 9).unsqueeze(0)
    with torch.no_grad():
        found.append(model.module(input_ids=ids).logits)  # as an answer is made
    return found


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "phi"])  # scaled, capped, with a bias
def test_a_step_has_the_same_bits(name: str, prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_blocks, "BLOCK_ELEMENTS", 64 * 48)  # several blocks in either case
    monkeypatch.setattr(vocabulary_blocks, "ROWS_AT_ONCE", 7)
    model = load_for_training(*prepared(name))
    attach_new_adapters(model, LoraSettings(4, 8.0, 0.0, tuple(model.linears)), dtype=torch.float32, seed=0)
    expected = results(model)
    pull_levers(model, ON_HOST)
    assert model.head.is_on_host
    assert all(table.device == CPU for table in embeddings_of(model))
    assert all(torch.equal(one, other) for one, other in zip(results(model), expected, strict=True))
    pull_levers(model, NO_LEVERS)
    assert all(torch.equal(one, other) for one, other in zip(results(model), expected, strict=True))


def test_a_tied_table_is_one(prepared: Prepare) -> None:
    assert len(tables_of(load_for_training(*prepared("llama-tied")))) == 1
    assert len(tables_of(load_for_training(*prepared("llama")))) == 2


def test_pages_of_a_lookup_do_not_stay(table_VH: Tensor) -> None:
    ids = torch.randint(0, table_VH.shape[0], (2, 2000), generator=torch.Generator().manual_seed(1))
    before = resident_bytes()
    found = look_up_on_host(table_VH, ids, CPU)
    assert resident_bytes() - before < found.nbytes + MIB
    assert torch.equal(found, torch.nn.functional.embedding(ids, table_VH))
    assert resident_bytes() - before > found.nbytes + 8 * MIB  # what the whole table takes, read the usual way


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0.0), (torch.bfloat16, 1e-2)])
def test_pages_of_a_head_do_not_stay(dtype: torch.dtype, tolerance: float, table_VH: Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    targets_N = torch.randint(0, table_VH.shape[0], (40,), generator=generator)
    hidden_NH = torch.randn(40, table_VH.shape[1], generator=generator).to(dtype)
    losses, gradients, logits = [], [], []
    before = resident_bytes()
    for is_on_host in (True, False):
        head = FrozenHead(table_VH, None)
        head.is_on_host = is_on_host
        own_NH = hidden_NH.clone().requires_grad_()
        loss = chunked_cross_entropy(own_NH, targets_N, head, NO_SHAPE, chunk_tokens=4)
        loss.backward()
        with torch.no_grad():
            logits.append(chunk_logits(hidden_NH[:4], head, NO_SHAPE))
            logits.append(head(hidden_NH[:4]))
        assert own_NH.grad is not None
        losses.append(loss.detach())
        gradients.append(own_NH.grad)
        if is_on_host:
            (pages,) = file_spans([table_VH])
            assert resident_of(pages.first, pages.last) == 0
        else:
            assert resident_of(pages.first, pages.last) >= table_VH.nbytes
    assert resident_bytes() > before
    for one, other in (losses, gradients, (logits[0], logits[2]), (logits[1], logits[3])):
        assert relative_error(one, other) <= tolerance


def resident_of(first: int, last: int) -> int:
    """Resident bytes of the mapping that holds these addresses."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start < last and first < end
        elif inside and head == "Rss:":
            found += 1024 * int(line.split()[1])
    return found


def test_a_table_of_no_file_is_refused() -> None:
    """Given back, its pages would come back as zeros."""
    table_VH = torch.ones(10_000, 512)
    with pytest.raises(ValueError, match="no part of a mapped file"):
        look_up_on_host(table_VH, torch.tensor([1]), CPU)
    with pytest.raises(ValueError, match="no part of a mapped file"):
        VocabularyBlocks.of(table_VH, torch.ones(1), is_on_host=True)
    assert bool((table_VH == 1).all())


def test_blocks_that_arrive_are_good_until_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: through two buffers, here of the host, by copies as late as can be.

    Mutations tried: no `join` before a block is given out, and the next one's copy into the same buffer.
    """
    monkeypatch.setattr(vocabulary_blocks, "BLOCK_ELEMENTS", 64)
    weight_VH = torch.arange(11 * 16.0).view(11, 16)  # three blocks
    buffers = [torch.empty(4, 16) for _ in range(2)]
    blocks = VocabularyBlocks(weight_VH, None, buffers, None, is_on_host=True, stream=LateStream(CPU))
    assert rows_in_block(weight_VH) == 4
    seen = 0
    for block, part_VH in blocks.each():
        assert torch.equal(part_VH, weight_VH[block])
        seen += part_VH.shape[0]
    assert seen == 11
