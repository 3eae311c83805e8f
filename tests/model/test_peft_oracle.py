"""Same numbers as the reference: loss and every adapter gradient, for every architecture, in fp32.

Ours runs several documents in one packed row, recomputes every layer and takes the loss in chunks; the reference
(PEFT on bitsandbytes' own 4-bit linears) runs one document at a time and keeps everything.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from qlora_trainer.model.activation_policy import recompute_layers
from qlora_trainer.model.adapters import attach_adapters, trainable_parameters
from qlora_trainer.step.train_step import accumulate_gradients
from tests.model.peft_oracle import load_oracle, oracle_step, with_adapters
from tests.model.tiny_bases import CONFIGS, WINDOW
from tests.model.tiny_models import (
    load_for_training,
    lora_settings,
    our_step,
    packed,
    prepare,
    random_adapter,
    relative_error,
    tiny_documents,
)

TOLERANCE = 1e-5
DOCUMENTS = tiny_documents(37, 14, 50)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_loss_and_gradients_equal_the_reference(config: PreTrainedConfig, tmp_path: Path) -> None:
    _require_equal_step(config, tmp_path, double_quant=True, target_modules="all-linear")


@pytest.mark.parametrize(
    "double_quant,target_modules",
    [(False, "all-linear"), (True, ["v_proj", "down_proj"]), (True, r"model\.layers\.1\.self_attn\..*")],
)
def test_other_settings_equal_the_reference(
    double_quant: bool, target_modules: str | list[str], tmp_path: Path
) -> None:
    _require_equal_step(CONFIGS["llama"], tmp_path, double_quant=double_quant, target_modules=target_modules)


def _require_equal_step(
    config: PreTrainedConfig, folder: Path, *, double_quant: bool, target_modules: str | list[str]
) -> None:
    assert min(document.num_tokens for document in DOCUMENTS) > WINDOW
    base, cache = prepare(folder / "base", config, double_quant=double_quant)
    model = load_for_training(base, cache)
    settings = lora_settings(model, target_modules)
    weights = random_adapter(model, settings, b_size=0.05)
    found = our_step(model, settings, weights, DOCUMENTS)
    expected = oracle_step(with_adapters(load_oracle(cache.folder, torch.float32), settings, weights), DOCUMENTS)
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert found.gradients.keys() == expected.gradients.keys()
    errors = {name: relative_error(found.gradients[name], expected.gradients[name]) for name in expected.gradients}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("num_recomputed", [0, 1])
def test_recomputing_layers_changes_no_bit(name: str, num_recomputed: int, tmp_path: Path) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS[name])
    model = load_for_training(base, cache)
    settings = lora_settings(model)
    weights = random_adapter(model, settings, b_size=0.05)
    expected = our_step(model, settings, weights, DOCUMENTS)
    attach_adapters(model, settings, weights, dtype=torch.float32)
    recompute_layers(model, num_recomputed)
    num_supervised_tokens = sum(document.num_supervised_tokens for document in DOCUMENTS)
    loss = accumulate_gradients(
        model, [packed(DOCUMENTS)], num_supervised_tokens=num_supervised_tokens, loss_chunk_tokens=16
    )
    assert float(loss) == expected.loss
    for parameter_name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected.gradients[parameter_name])
