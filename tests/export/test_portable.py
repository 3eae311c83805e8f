"""The portable form gives the same logits to a reader that knows nothing but alpha and r."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from qlora_trainer.errors import ConfigError
from qlora_trainer.export.adapter import export
from qlora_trainer.export.portable import portable_adapter, require_portable
from qlora_trainer.model.lora_settings import LoraSettings
from tests.export.made_adapters import PATTERNS, load_base, make_adapter, peft_logits
from tests.model.peft_oracle import logits
from tests.model.tiny_bases import CONFIGS, write_base
from tests.model.tiny_models import relative_error, tiny_documents

DOCUMENTS = tiny_documents(33, 21)
PREFIX = "base_model.model."


def export_portable(adapter: Path, to: Path) -> Path:
    export(adapter, to=to, portable=True, gguf=None, ollama=False, model=None)
    return to


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize(
    "target_modules", ["all-linear", ["o_proj", "down_proj"], r"model\.layers\.1\..*_proj"], ids=str
)
def test_alpha_and_r_are_all_that_it_takes(name: str, target_modules: str | list[str], tmp_path: Path) -> None:
    """Read by a few lines that know `r`, `lora_alpha` and the tensors, and by PEFT; against PEFT on what was given.

    Mutation tried: with the scale left out of B, or the patterns' ranks not filled up, the logits differ by 10 %.
    """
    base = write_base(tmp_path / "base", CONFIGS[name])
    make_adapter(tmp_path / "given", base, target_modules=target_modules, **PATTERNS)
    expected_TV = peft_logits(base, tmp_path / "given", DOCUMENTS)
    folder = export_portable(tmp_path / "given", tmp_path / "portable")

    fields = json.loads((folder / "adapter_config.json").read_text())
    scale = fields["lora_alpha"] / fields["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    model = load_base(base)
    for key, a_RI in tensors.items():
        if key.endswith(".lora_A.weight"):
            b_OR = tensors[key.replace("lora_A", "lora_B")]
            assert (a_RI.shape[0], b_OR.shape[1]) == (fields["r"], fields["r"])
            module = model.get_submodule(key.removeprefix(PREFIX).removesuffix(".lora_A.weight"))
            module.weight.data += scale * (b_OR @ a_RI)
    with torch.no_grad():
        assert relative_error(logits(model, DOCUMENTS), expected_TV) <= 1e-5
        assert relative_error(logits(load_base(base), DOCUMENTS), expected_TV) > 1e-2  # the adapter does something
    assert relative_error(peft_logits(base, folder, DOCUMENTS), expected_TV) <= 1e-5


def test_nothing_but_alpha_and_r_is_left_in_its_config(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS["llama"])
    make_adapter(tmp_path / "given", base, **PATTERNS)
    fields = json.loads((export_portable(tmp_path / "given", tmp_path / "to") / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (7, 7)
    assert (fields["use_rslora"], fields["use_dora"], fields["modules_to_save"]) == (False, False, None)
    assert (fields["rank_pattern"], fields["alpha_pattern"], fields["layers_to_transform"]) == ({}, {}, None)


@given(
    rank=st.integers(1, 5),
    alpha=st.floats(0.1, 100),
    other_rank=st.integers(1, 5),
    other_alpha=st.floats(0.1, 100),
    use_rslora=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_each_update_stays_the_same(
    rank: int, alpha: float, other_rank: int, other_alpha: float, use_rslora: bool, dtype: torch.dtype
) -> None:
    settings = LoraSettings(
        rank=rank,
        alpha=alpha,
        dropout=0.0,
        targets=("a", "b"),
        use_rslora=use_rslora,
        rank_pattern=(("b", other_rank),),
        alpha_pattern=(("b", other_alpha),),
    )
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name in settings.targets:
        weights[f"{name}.lora_A"] = torch.randn(settings.rank_of(name), 4, generator=generator).to(dtype)
        weights[f"{name}.lora_B"] = torch.randn(6, settings.rank_of(name), generator=generator).to(dtype)
    plain, found = portable_adapter(settings, weights)
    assert plain.rank == plain.alpha == max(rank, other_rank)
    for name in settings.targets:
        expected = settings.scale_of(name) * (weights[f"{name}.lora_B"].double() @ weights[f"{name}.lora_A"].double())
        assert found[f"{name}.lora_A"].shape == (plain.rank, 4)
        update = found[f"{name}.lora_B"].double() @ found[f"{name}.lora_A"].double()
        assert torch.allclose(update, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_bf16_stays_where_the_scale_rounds_nothing(tmp_path: Path) -> None:
    weights = {"a.lora_A": torch.randn(4, 8).bfloat16(), "a.lora_B": torch.randn(8, 4).bfloat16()}
    exact = LoraSettings(rank=4, alpha=8.0, dropout=0.0, targets=("a",))
    assert {own.dtype for own in portable_adapter(exact, weights)[1].values()} == {torch.bfloat16}
    rounding = LoraSettings(rank=4, alpha=5.0, dropout=0.0, targets=("a",))
    assert {own.dtype for own in portable_adapter(rounding, weights)[1].values()} == {torch.float32}


@pytest.mark.parametrize(
    "fields,found",
    [
        ({"use_dora": True}, "DoRA's magnitudes"),
        ({"modules_to_save": ["lm_head"]}, "trained whole (lm_head)"),
        ({"modules_to_save": ["norm", "lm_head"]}, "trained whole (lm_head, 5 norms)"),
        ({"bias": "lora_only"}, "an adapter with trained biases"),
        ({"lora_bias": True}, "an adapter with trained biases"),
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'", "ignore:`lora_bias=True` was passed but")
@pytest.mark.parametrize("gguf", [False, True])
def test_what_plain_lora_cannot_hold_is_refused(fields: dict[str, Any], found: str, gguf: bool, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS["qwen2" if "bias" in fields else "llama"])
    make_adapter(tmp_path / "given", base, **fields)
    to, file = (None, tmp_path / "x.gguf") if gguf else (tmp_path / "to", None)
    with pytest.raises(ConfigError) as error:
        export(tmp_path / "given", to=to, portable=not gguf, gguf=file, ollama=False, model=None)
    assert found in str(error.value)
    assert "Merge it instead" in str(error.value)
    assert not (tmp_path / "to").exists()
    assert not (tmp_path / "x.gguf").exists()


def test_plain_lora_is_portable() -> None:
    require_portable(LoraSettings(rank=4, alpha=8.0, dropout=0.0, targets=("a",), use_rslora=True), Path("a"))
