"""Linears that PEFT has trained whole: the model that it loads, as LoRA of full rank on its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_fit import base_tables, require_adapter_fits
from qlora_trainer.model.adapter_folder import WEIGHTS_FILE, read_adapter_folder
from qlora_trainer.model.adapter_set import AdapterSet
from qlora_trainer.model.base import Base
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.plain_lora import as_plain_lora
from qlora_trainer.model.skeleton import build_skeleton, find_parts
from qlora_trainer.model.whole_linears import WHOLE_LINEARS, is_saved, whole_linears, with_whole_linears
from qlora_trainer.run.export import export_adapter
from tests.export.made_adapters import load_base
from tests.model.adapters_in_use import read_that_fits
from tests.model.peft_oracle import load_adapter, logits, wrap
from tests.model.tiny_bases import CONFIGS
from tests.model.tiny_models import load_for_training, prepare_apart, relative_error, tiny_documents

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using Rank-Stabilized LoRA",
    "ignore:PiSSA changes the base weights",
    "ignore:`lora_bias=True` was passed",
    "ignore:Adapter .* LoRA tensor.*invalid shape",
    "ignore:The following (rank|alpha)_pattern keys did not match",
)
DOCUMENTS = tiny_documents(33, 21)
TOLERANCE = 1e-5
Prepared = dict[str, tuple[Base, NF4Cache]]
# Base, what PEFT is asked for, and how many linears it trains whole.
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {"modules_to_save": ["down_proj"]}, 2),
    ("llama", {"modules_to_save": ["up_proj", "norm", "lm_head"], "target_modules": "all-linear", "use_dora": True}, 2),
    ("llama", {"modules_to_save": ["layers.1.mlp"], "use_rslora": True, "alpha_pattern": {"q_proj": 2}}, 3),
    ("llama", {"modules_to_save": ["o_proj"], "init_lora_weights": "pissa"}, 2),
    ("llama", {"modules_to_save": ["o_proj"], "lora_bias": True}, 2),
    ("llama", {"modules_to_save": ["k_proj"], "layers_to_transform": [1]}, 2),
    ("qwen2", {"modules_to_save": ["q_proj"], "target_modules": ["q_proj", "o_proj"]}, 2),  # with its bias
    ("qwen2", {"modules_to_save": ["v_proj"], "bias": "all"}, 2),
    (  # keys that PEFT does not look at, since it puts no LoRA there
        "llama",
        {
            "modules_to_save": ["layers.1.self_attn.o_proj"],
            "target_modules": ["o_proj"],
            "alpha_pattern": {r"model\.layers\.1\.self_attn\.o_proj": 2},
            "rank_pattern": {r"model\.layers\.1\.self_attn\.o_proj": 2},
        },
        1,
    ),
    ("llama-biases", {"modules_to_save": ["mlp"], "bias": "all"}, 6),  # of which PEFT writes each bias three times
    ("qwen3", {"modules_to_save": ["self_attn"], "target_modules": "all-linear"}, 8),  # and the norms of heads
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return {
        name: prepare_apart(tmp_path_factory.mktemp(name), CONFIGS[name])
        for name in ("llama", "llama-biases", "qwen2", "qwen3")
    }


def moved(folder: Path, base: Base, fields: dict[str, Any]) -> Any:
    """Made by PEFT on the base in fp32, every trained weight of it moved, and saved."""
    asked: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **fields}
    wrapped = wrap(load_base(base.folder), peft.LoraConfig(task_type="CAUSAL_LM", **asked))
    generator = torch.Generator().manual_seed(0)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name, fields, num_linears", CASES, ids=str)
def test_it_is_what_peft_loads(
    name: str, fields: dict[str, Any], num_linears: int, prepared: Prepared, tmp_path: Path
) -> None:
    """Put on the same base, by PEFT: a folder of ours, over a fresh one. Mutations tried: the factors the other way
    round; a whole linear scaled as the others are."""
    base, _ = prepared[name]
    trained = moved(tmp_path / "trained", base, fields)
    with torch.no_grad():
        trained_TV, base_TV = logits(trained, DOCUMENTS), logits(load_base(base.folder), DOCUMENTS)
        loaded_TV = logits(load_adapter(load_base(base.folder), tmp_path / "trained"), DOCUMENTS)
    assert relative_error(loaded_TV, trained_TV) <= TOLERANCE
    found = read_that_fits(tmp_path / "trained", base)
    assert found.variant is not None
    assert len(found.variant.whole) == num_linears
    adapter = as_plain_lora(found, base.folder)
    assert adapter.variant is None
    names = find_parts(build_skeleton(base.config, with_buffers=False)).linears
    export_adapter(
        tmp_path / "ours", adapter.weights, adapter.settings, linear_names=names, base_name="x", revision=None
    )
    with torch.no_grad():
        ours_TV = logits(load_adapter(load_base(base.folder), tmp_path / "ours"), DOCUMENTS)
    assert relative_error(ours_TV, trained_TV) <= TOLERANCE
    assert relative_error(base_TV, trained_TV) > 1e-2


V_PROJ, O_PROJ, UP_PROJ = (f"model.layers.1.{own}" for own in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"))
# What is changed in a file with two whole linears, a norm and a head: removed, or put there, and what is told.
BROKEN: list[tuple[list[str], dict[str, tuple[int, ...]], str]] = [
    ([f"{V_PROJ}.lora_A.weight", f"{V_PROJ}.lora_B.weight"], {}, rf"2 weights .*{V_PROJ}\.lora_A: adapter has none"),
    (
        [],
        {f"{UP_PROJ}.lora_A.weight": (3, 64), f"{UP_PROJ}.lora_B.weight": (128, 3)},
        rf"2 weights .*{UP_PROJ}\.lora_A: adapter \(3",
    ),
    (
        [f"{O_PROJ}.weight"],
        {},
        rf"means {O_PROJ}, and no matrix {O_PROJ}\.weight; expected the weights of all 2 linears",
    ),
    (["lm_head.weight"], {}, r"lm_head\.weight: adapter has none"),
    (["model.norm.weight"], {}, r"model\.norm\.weight: adapter has none"),
    ([], {f"{O_PROJ}.weight": (64, 32)}, rf"{O_PROJ}\.weight: adapter \(64, 32\), base \(64, 64\)"),
    ([], {f"{O_PROJ}.weight": (1, 64)}, rf"{O_PROJ}\.weight: adapter \(1, 64\), base \(64, 64\)"),
    ([], {f"{O_PROJ}.weight": (64,)}, rf"no matrix {O_PROJ}\.weight"),
    ([], {f"{O_PROJ}.lora_A.weight": (3, 64), f"{O_PROJ}.lora_B.weight": (64, 3)}, f"LoRA on {O_PROJ}, and its weight"),
    ([], {f"{UP_PROJ}.weight": (128, 64)}, rf"1 weights .*{UP_PROJ}\.weight: adapter \(128, 64\), base has none"),
    ([], {"model.layers.1.o_proj.weight": (4, 4)}, r"a matrix model\.layers\.1\.o_proj\.weight, which is no linear"),
    ([], {"model.embed_tokens.weight": (128, 64)}, "an adapter that changes model.embed_tokens other than as a whole"),
]


@pytest.mark.parametrize("gone, there, told", BROKEN, ids=str)
def test_what_the_file_has_not_or_too_much_is_refused(
    gone: list[str], there: dict[str, tuple[int, ...]], told: str, prepared: Prepared, tmp_path: Path
) -> None:
    base, _ = prepared["llama"]
    moved(tmp_path / "trained", base, {"modules_to_save": ["o_proj", "norm", "lm_head"]})
    path, prefix = tmp_path / "trained" / WEIGHTS_FILE, "base_model.model."
    kept = {name: own for name, own in load_file(path).items() if name.removeprefix(prefix) not in gone}
    save_file(kept | {prefix + name: torch.ones(shape) for name, shape in there.items()}, path)
    with pytest.raises(ConfigError, match=told):
        read_that_fits(tmp_path / "trained", base)


def test_one_of_another_base_is_named_where_its_weights_are_read(prepared: Prepared, tmp_path: Path) -> None:
    base, cache = prepared["llama"]
    moved(tmp_path / "trained", base, {"modules_to_save": ["o_proj"], "target_modules": "dummy-target-modules"})
    adapter = read_that_fits(tmp_path / "trained", base)
    with pytest.raises(ConfigError, match=r"adapter a: found weights of a variant: .*o_proj.*as_plain_lora"):
        AdapterSet(load_for_training(base, cache)).add("a", adapter)
    other, _ = prepared["qwen3"]
    with pytest.raises(ConfigError, match=r"o_proj\.weight: found \(64, 128\); expected \(64, 64\), as this adapter"):
        as_plain_lora(adapter, other.folder)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("table", ["embed_tokens", "lm_head"])
def test_lora_on_a_table_beside_one_is_what_it_is(table: str, prepared: Prepared, tmp_path: Path) -> None:
    """And a table that PEFT writes beside it, which the config does not name, is not trained for that."""
    base, _ = prepared["llama"]
    moved(tmp_path / "trained", base, {"modules_to_save": ["down_proj"], "target_modules": ["q_proj", table]})
    skeleton = build_skeleton(base.config, with_buffers=False)
    parts = find_parts(skeleton)
    adapter = read_adapter_folder(
        tmp_path / "trained", linear_names=parts.linears, tables=base_tables(parts), may_change_base=True
    )
    require_adapter_fits(skeleton, adapter, where="adapter")
    assert len(adapter.updates) == 1
    assert adapter.variant is not None
    assert len(adapter.variant.whole) == 2


def test_no_file_says_by_itself_what_was_whole(prepared: Prepared, tmp_path: Path) -> None:
    base, _ = prepared["llama"]
    moved(tmp_path / "trained", base, {})
    path = tmp_path / "trained" / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {WHOLE_LINEARS: ["model.layers.0.mlp.up_proj"]}))
    with pytest.raises(ConfigError, match="a field that is not known"):
        read_that_fits(tmp_path / "trained", base)
    path.write_text(json.dumps(fields | {WHOLE_LINEARS: 1}))  # a number is no field that computes
    assert read_that_fits(tmp_path / "trained", base).variant is None


def test_what_is_whole_is_told_by_both() -> None:
    """By the config, with PEFT's ends of names, and the file."""
    shapes = {
        "model.layers.0.q.lora_A.weight": (3, 8),
        "model.layers.0.o.weight": (8, 6),
        "model.layers.0.up.weight": (8, 6),
        "model.layers.0.norm.weight": (8,),
        "lm_head.weight": (9, 8),
        "lm_head.original_module.weight": (9, 8),
        "model.layers.0.o.bias": (8,),
    }
    assert whole_linears({"modules_to_save": None}, shapes) == {}
    found = whole_linears({"modules_to_save": ["o", "norm", "lm_head"]}, shapes)
    assert found == {"model.layers.0.o": (8, 6)}
    assert whole_linears({"modules_to_save": ["layers.0"]}, shapes).keys() == {"model.layers.0.o", "model.layers.0.up"}
    fields = with_whole_linears({"use_rslora": True, "rank_pattern": None}, found)
    assert fields["rank_pattern"] == {r"model\.layers\.0\.o": 6}
    assert fields["alpha_pattern"] == {r"model\.layers\.0\.o": 6**0.5}
    assert fields[WHOLE_LINEARS] == ("model.layers.0.o",)
    assert with_whole_linears({"modules_to_save": ["x"]}, {}) == {"modules_to_save": ["x"], WHOLE_LINEARS: ()}
    assert is_saved(["self_attn"], "model.layers.0.self_attn.q_proj")
    assert not is_saved(["attn.q"], "model.layers.0.self_attn.q_proj")
