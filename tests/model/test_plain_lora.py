"""PiSSA and OLoRA: the model that PEFT makes when it loads one over its base, as plain LoRA on that base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_set import AdapterSet
from qlora_trainer.model.adapters import attach_adapters
from qlora_trainer.model.base import Base
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.plain_lora import as_plain_lora
from qlora_trainer.model.skeleton import build_skeleton, find_parts
from qlora_trainer.run.export import export_adapter
from tests.export.made_adapters import load_base
from tests.model.adapters_in_use import read_that_fits
from tests.model.peft_oracle import (
    adapter_parameters,
    load_adapter,
    load_oracle,
    logits,
    oracle_step,
    save_converted,
    wrap,
)
from tests.model.tiny_bases import CONFIGS
from tests.model.tiny_models import (
    load_for_training,
    our_step,
    packed_logits,
    prepare,
    prepare_apart,
    relative_error,
    tiny_documents,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA", "ignore:PiSSA changes the base weights")
DOCUMENTS = tiny_documents(33, 21)
TOLERANCE = 1e-5
CASES: list[dict[str, Any]] = [
    {"init_lora_weights": "pissa"},
    {
        "init_lora_weights": "olora",
        "use_rslora": True,
        "rank_pattern": {"down_proj": 5},
        "alpha_pattern": {"q_proj": 2},
    },
    {"init_lora_weights": "pissa", "use_dora": True, "modules_to_save": ["lm_head"]},
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, NF4Cache]:
    return prepare_apart(tmp_path_factory.mktemp("llama"), CONFIGS["llama"])


def trained_by_peft(folder: Path, base: Base, **fields: Any) -> Any:
    """Made on the 16-bit base, in fp32, and moved, beside how it began."""
    asked: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], **fields}
    wrapped = wrap(load_base(base.folder), peft.LoraConfig(task_type="CAUSAL_LM", **asked))
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(folder / "begun")
    wrapped.peft_config["default"].init_lora_weights = asked["init_lora_weights"]
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(wrapped).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder / "trained")
    return wrapped


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_it_is_what_peft_loads(fields: dict[str, Any], prepared: tuple[Base, NF4Cache], tmp_path: Path) -> None:
    """Put on the same base, by PEFT: a folder of ours, over a fresh one. Mutation tried: the part added, not taken."""
    base, _ = prepared
    wrapped = trained_by_peft(tmp_path, base, **fields)
    with torch.no_grad():
        trained_TV = logits(wrapped, DOCUMENTS)
        loaded_TV = logits(load_adapter(load_base(base.folder), tmp_path / "trained"), DOCUMENTS)
    assert relative_error(loaded_TV, trained_TV) <= TOLERANCE  # PEFT finds the same part again
    adapter = as_plain_lora(read_that_fits(tmp_path / "trained", base), base.folder)
    assert adapter.variant is None
    names = find_parts(build_skeleton(base.config, with_buffers=False)).linears
    export_adapter(
        tmp_path / "ours", adapter.weights, adapter.settings, linear_names=names, base_name="x", revision=None
    )
    with torch.no_grad():
        ours_TV = logits(load_adapter(load_base(base.folder), tmp_path / "ours"), DOCUMENTS)
        base_TV = logits(load_base(base.folder), DOCUMENTS)
    assert relative_error(ours_TV, trained_TV) <= TOLERANCE
    assert relative_error(base_TV, trained_TV) > 1e-2


def test_it_is_pefts_own_conversion_and_its_gradients(prepared: tuple[Base, NF4Cache], tmp_path: Path) -> None:
    """Over the base in NF4, on which PEFT begins no PiSSA: what was converted has the same logits and gradients."""
    base, cache = prepared
    wrapped = trained_by_peft(tmp_path, base, init_lora_weights="pissa")
    save_converted(wrapped, tmp_path / "converted", tmp_path / "begun")
    theirs = load_adapter(load_oracle(cache.folder, torch.float32), tmp_path / "converted")
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    expected = oracle_step(theirs, DOCUMENTS)
    model = load_for_training(base, cache)
    adapter = as_plain_lora(read_that_fits(tmp_path / "trained", base), base.folder)
    found = our_step(model, adapter.settings, adapter.weights, DOCUMENTS)
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():  # the first half: the second is found but for its signs
        axis = 0 if name.endswith("lora_A") else 1
        ours, theirs_half = (own.narrow(axis, 0, 3) for own in (found.gradients[name], gradient))
        assert relative_error(ours, theirs_half) <= TOLERANCE, name
    with torch.no_grad():
        theirs_TV = logits(theirs, DOCUMENTS)
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= TOLERANCE


def test_what_cannot_be_found_is_refused(prepared: tuple[Base, NF4Cache], tmp_path: Path) -> None:
    base, cache = prepared
    trained_by_peft(tmp_path, base, init_lora_weights="olora")
    config = tmp_path / "trained" / "adapter_config.json"
    fields = json.loads(config.read_text())
    adapter = read_that_fits(tmp_path / "trained", base)
    with pytest.raises(ConfigError, match="8 weights that do not fit the base"):  # half of them is still to be found
        attach_adapters(load_for_training(base, cache), adapter.settings, adapter.weights, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"adapter a: found weights of a variant: .*olora.*as_plain_lora"):
        AdapterSet(load_for_training(base, cache)).add("a", adapter)
    other, _ = prepare(tmp_path / "other", CONFIGS["qwen3"])
    with pytest.raises(
        ConfigError,
        match=r"q_proj\.weight: found \(128, 64\); expected a weight that lora_A \(3, 64\) and lora_B \(64, 3\) of",
    ):
        as_plain_lora(adapter, other.folder)
    for start in ("pissa_niter_4", "corda", "lora_ga"):
        config.write_text(json.dumps(fields | {"init_lora_weights": start}))
        with pytest.raises(ConfigError, match=f"init_lora_weights = '{start}'.*PEFT cannot load it"):
            read_that_fits(tmp_path / "trained", base)
