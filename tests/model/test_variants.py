"""Every variant of LoRA against PEFT: gradients, and logits of folders in both directions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.model.adapter_folder import read_adapter_folder
from qlora_trainer.model.adapters import attach_adapters, trainable_parameters
from qlora_trainer.model.base import Base
from qlora_trainer.model.lora_adapter import LoraAdapter
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.run.export import export_adapter
from tests.model.peft_oracle import (
    adapter_parameters,
    load_adapter,
    load_oracle,
    logits,
    oracle_step,
    with_adapters,
    wrap,
)
from tests.model.tiny_bases import CONFIGS
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

DOCUMENTS = tiny_documents(33, 21)
# The order decides: the second pattern fits what the first one does, too.
RANKS = ((r"layers\.1\.self_attn\.q_proj", 6), ("q_proj", 2), ("down_proj", 9))
ALPHAS = (("v_proj", 3.0), (r"layers\.0\..*", 5.0))
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "rslora-patterns": {"use_rslora": True, "rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "dora": {"use_dora": True},
    "dora-all": {"use_dora": True, "use_rslora": True, "rank_pattern": RANKS, "alpha_pattern": ALPHAS},
}
# The fused halves, biases, norms of heads, tied tables; and layers that are not fused.
BASES = ("llama-biases", "qwen3", "gemma2")
TOLERANCE = 1e-5

Prepared = tuple[Base, NF4Cache, Path]


@pytest.fixture(scope="module", params=BASES)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return *prepare(folder / "base", CONFIGS[request.param]), folder


def settings_for(model: QuantizedModel, variant: str, target_modules: str = "all-linear") -> LoraSettings:
    return replace(lora_settings(model, target_modules), **VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("targets", ["all-linear", r".*(q_proj|v_proj|down_proj|qkv_proj)"])
def test_loss_and_gradients_equal_peft(variant: str, targets: str, prepared: Prepared) -> None:
    base, cache, _ = prepared
    model = load_for_training(base, cache)
    settings = settings_for(model, variant, targets)
    weights = random_adapter(model, settings, b_size=0.05)
    found = our_step(model, settings, weights, DOCUMENTS)
    expected = oracle_step(with_adapters(load_oracle(cache.folder, torch.float32), settings, weights), DOCUMENTS)
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert found.gradients.keys() == expected.gradients.keys()
    errors = {name: relative_error(found.gradients[name], expected.gradients[name]) for name in expected.gradients}
    assert max(errors.values()) <= TOLERANCE, errors


class OurDropout(nn.Module):
    """In the place of PEFT's: what an adapter of ours draws for a document that begins its row."""

    def __init__(self, adapter: LoraAdapter) -> None:
        super().__init__()
        self._adapter = [adapter]  # no module of this one

    def forward(self, x: Tensor) -> Tensor:
        keys = self._adapter[0].of_tokens.row_keys_T
        factors = self._adapter[0].draw_dropout(0 if keys is None else keys.numel(), x.dtype)
        return x if factors is None else x * factors[: x.shape[-2]]


@pytest.mark.parametrize("variant", ["plain", *VARIANTS])
def test_dropout_is_where_peft_has_it(variant: str, prepared: Prepared) -> None:
    base, cache, _ = prepared
    model = load_for_training(base, cache)
    settings = replace(lora_settings(model), dropout=0.3, **VARIANTS.get(variant, {}))
    weights = random_adapter(model, settings, b_size=0.05)
    found = our_step(model, settings, weights, DOCUMENTS[:1])
    wrapped = with_adapters(load_oracle(cache.folder, torch.float32), settings, weights)
    for name, linear in model.linears.items():
        assert linear.adapter is not None
        wrapped.get_submodule(f"base_model.model.{name}").lora_dropout["default"] = OurDropout(linear.adapter)
    expected = oracle_step(wrapped, DOCUMENTS[:1])
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    errors = {name: relative_error(found.gradients[name], expected.gradients[name]) for name in expected.gradients}
    assert max(errors.values()) <= TOLERANCE, errors
    undropped = our_step(model, replace(settings, dropout=0.0), weights, DOCUMENTS[:1])
    assert abs(found.loss - undropped.loss) > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_gives_our_logits_of_our_folder(variant: str, prepared: Prepared, tmp_path: Path) -> None:
    base, cache, _ = prepared
    model = load_for_training(base, cache)
    settings = settings_for(model, variant)
    attach_adapters(model, settings, random_adapter(model, settings, b_size=0.05), dtype=torch.float32)
    export(tmp_path / "adapter", model, settings)
    ours_TV = packed_logits(model, DOCUMENTS)
    oracle = load_oracle(cache.folder, torch.float32)
    with torch.no_grad():
        theirs_TV = logits(load_adapter(oracle, tmp_path / "adapter"), DOCUMENTS)
    assert relative_error(ours_TV, theirs_TV) <= TOLERANCE
    plain = LoraSettings(settings.rank, settings.alpha, 0.0, settings.targets)
    read = read_adapter_folder(tmp_path / "adapter", linear_names=list(model.linears))
    unsorted = replace(read.settings, rank_pattern=settings.rank_pattern, alpha_pattern=settings.alpha_pattern)
    assert unsorted == settings != plain
    for name in settings.targets:
        assert read.settings.scale_of(name) == settings.scale_of(name)
    assert all(torch.equal(read.weights[name], own) for name, own in trainable_parameters(model).items())


def export(folder: Path, model: QuantizedModel, settings: LoraSettings) -> None:
    linear_names = list(model.linears)
    weights = trainable_parameters(model)
    export_adapter(folder, weights, settings, linear_names=linear_names, base_name="base", revision=None)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layers", [None, [1]], ids=["every-layer", "one-layer"])
def test_we_give_the_logits_of_a_folder_of_peft(
    variant: str, layers: list[int] | None, prepared: Prepared, tmp_path: Path
) -> None:
    base, cache, _ = prepared
    fields: Any = {
        name: dict(value) if isinstance(value, tuple) else value for name, value in VARIANTS[variant].items()
    }
    if layers and "alpha_pattern" in fields:
        del fields["alpha_pattern"][r"layers\.0\..*"]  # PEFT warns of one that fits nothing
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj", "down_proj"],
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
        **fields,
    )
    wrapped = wrap(load_oracle(cache.folder, torch.float32), config).train()
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(wrapped).values():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(tmp_path / "adapter")
    model = load_for_training(base, cache)
    read = read_adapter_folder(tmp_path / "adapter", linear_names=list(model.linears))
    assert {name.split(".")[2] for name in read.settings.targets} == ({"1"} if layers else {"0", "1"})
    attach_adapters(model, read.settings, read.weights, dtype=torch.float32)
    with torch.no_grad():
        # Read again: PEFT sorts a pattern's keys when it saves, which may change what it trained.
        theirs_TV = logits(load_adapter(load_oracle(cache.folder, torch.float32), tmp_path / "adapter"), DOCUMENTS)
        without_TV = logits(load_oracle(cache.folder, torch.float32), DOCUMENTS)
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= TOLERANCE
    assert relative_error(without_TV, theirs_TV) > 1e-3
