"""A head in NF4 computes what the head that it unpacks to does, block by block, wherever its packed bytes live."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_trainer.config.levers import NO_LEVERS, Levers
from qlora_trainer.errors import ConfigError
from qlora_trainer.model import nf4, vocabulary_blocks
from qlora_trainer.model.adapters import attach_new_adapters
from qlora_trainer.model.base import Base, resolve_base
from qlora_trainer.model.frozen import FrozenHead
from qlora_trainer.model.load import load_quantized
from qlora_trainer.model.nf4_cache import NF4Cache, prepare_nf4_cache
from qlora_trainer.model.pull_levers import pull_levers
from qlora_trainer.model.quantized import LogitShape
from qlora_trainer.model.table_names import require_nf4_head
from qlora_trainer.model.trained_tables import put_tensors, tensors_at
from qlora_trainer.step.loss import chunked_cross_entropy
from tests.model.test_tables import results
from tests.model.tiny_bases import CONFIGS, small_config, write_base
from tests.model.tiny_models import CPU, load_for_training, lora_settings, relative_error

VOCABULARY = 1000  # of which a block has 256 at least, so that it ends with the scales' own blocks
ON_HOST = Levers(embedding_residency="host")
Prepare = Callable[[str], tuple[Base, NF4Cache]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    @cache
    def make(name: str) -> tuple[Base, NF4Cache]:
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            base = resolve_base(str(write_base(folder / "base", small_config(name, vocab_size=VOCABULARY))))
            return base, prepare_nf4_cache(base, double_quant=name != "persimmon", nf4_head=True)

    return make


@pytest.mark.parametrize("name", ["llama", "phi", "persimmon"])  # the second has a bias, the third plain scales
def test_a_step_is_that_of_the_head_it_unpacks_to(
    name: str, prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation tried: scales of the first block for all of them."""
    monkeypatch.setattr(vocabulary_blocks, "BLOCK_ELEMENTS", 256 * 64)
    model = load_for_training(*prepared(name))
    head = model.head
    assert (head.weight.dtype, tuple(head.weight.shape)) == (torch.uint8, (VOCABULARY, 32))
    attach_new_adapters(model, lora_settings(model), dtype=torch.float32, seed=0)
    found = results(model)
    pull_levers(model, ON_HOST)  # packed bytes in the mapped file, whose pages are given back
    assert head.is_on_host
    assert all(torch.equal(one, other) for one, other in zip(results(model), found, strict=True))
    pull_levers(model, NO_LEVERS)
    head.hold(nf4.dequantize(packed(head), torch.float32))
    assert head.scales is None
    expected = results(model)
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def packed(head: FrozenHead) -> nf4.NF4Weight:
    scales = head.scales
    assert scales is not None
    shape = (head.out_features, head.in_features)
    return nf4.NF4Weight(head.weight, scales.absmax, scales.nested_absmax, scales.offset, scales.code, shape)


def test_it_is_quantized_as_bitsandbytes_would_and_not_what_the_base_has(prepared: Prepare) -> None:
    base, cache_ = prepared("llama")
    from tests.export.made_adapters import load_base

    original_VH = load_base(base.folder).lm_head.weight.detach()
    head = load_for_training(base, cache_).head
    expected = nf4.dequantize(nf4.quantize(original_VH.bfloat16(), double_quant=True), torch.float32)
    assert torch.equal(nf4.dequantize(packed(head), torch.float32), expected)
    assert 0.05 < relative_error(expected, original_VH) < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_gradient_adds_up_over_blocks_in_fp32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near to that of one product, which is rounded once, as a rounding is. Mutation tried: added up in 16 bits."""
    monkeypatch.setattr(vocabulary_blocks, "BLOCK_ELEMENTS", 1)
    generator = torch.Generator().manual_seed(0)
    weight = nf4.quantize(torch.randn(8192, 64, generator=generator), double_quant=True)
    hidden_NH = torch.randn(20, 64, generator=generator)
    targets_N = torch.randint(0, 8192, (20,), generator=generator)
    gradients = []
    for head in (
        FrozenHead(weight, None),
        FrozenHead(nf4.dequantize(weight, dtype), None),
    ):
        own_NH = hidden_NH.to(dtype).requires_grad_()
        chunked_cross_entropy(own_NH, targets_N, head, LogitShape(1.0, 0.0), chunk_tokens=8).backward()
        assert own_NH.grad is not None
        gradients.append(own_NH.grad)
    in_blocks, whole = gradients
    assert relative_error(in_blocks, whole) <= 0.4 * torch.finfo(dtype).eps  # 0.31; added up in 16 bits 0.54 and 0.69


def test_a_head_of_an_adapter_takes_its_place_and_gives_it_back(prepared: Prepare) -> None:
    model = load_for_training(*prepared("llama"))
    hidden_NH = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    before_NV = model.head(hidden_NH)
    own = tensors_at(model, [("lm_head", "weight")])
    weight_VH = torch.ones(VOCABULARY, 64)
    put_tensors(model, {("lm_head", "weight"): weight_VH})
    torch.testing.assert_close(model.head(hidden_NH), hidden_NH @ weight_VH.t())
    put_tensors(model, own)
    assert torch.equal(model.head(hidden_NH), before_NV)


def test_loaded_with_its_tables_on_the_host_it_is_the_same(prepared: Prepare) -> None:
    base, cache_ = prepared("llama")
    model = load_quantized(base, cache_, compute_dtype=torch.float32, device=CPU, levers=ON_HOST)
    hidden_NH = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert model.head.is_on_host
    assert torch.equal(model.head(hidden_NH), load_for_training(base, cache_).head(hidden_NH))


def test_an_odd_vocabulary_and_rows_that_end_within_a_block_of_scales_come_whole() -> None:
    for shape in ((333, 96), (77, 10)):
        weight = nf4.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), double_quant=True)
        head = FrozenHead(weight, None)
        assert vocabulary_blocks.rows_in_block(head.weight) == shape[0]
        hidden_NH = torch.randn(4, shape[1], generator=torch.Generator().manual_seed(1))
        expected_NV: Tensor = hidden_NH @ nf4.dequantize(weight, torch.float32).t()
        torch.testing.assert_close(head(hidden_NH), expected_NV)


def test_a_head_that_is_an_embedding_or_is_trained_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = resolve_base(str(write_base(tmp_path / "base", CONFIGS["llama-tied"])))
    with pytest.raises(ConfigError, match=r"^quantization\.head: found nf4, of a base in which embedding and head are"):
        prepare_nf4_cache(base, double_quant=True, nf4_head=True)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.safetensors"))
    with pytest.raises(
        ConfigError, match=r"^quantization\.head: found nf4, and lm_head in lora\.modules_to_save"
    ) as told:
        require_nf4_head("lm_head", is_tied=False, trained=("model.embed_tokens", "lm_head"))
    assert "\n" not in str(told.value)
    require_nf4_head("lm_head", is_tied=False, trained=("model.embed_tokens",))
