"""Variants of LoRA as PEFT trains and saves them, read as plain LoRA: our logits over NF4 are PEFT's.

The bases here hold numbers that NF4 holds exactly, so that PEFT can take its singular values of the same weights.
"""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, CordaConfig, KasaConfig, LoraGAConfig, MontecloraConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.quant_library import bitsandbytes
from qlora_trainer.model import nf4
from qlora_trainer.model.adapter_fit import require_adapter_fits
from qlora_trainer.model.adapter_folder import WEIGHTS_FILE, read_adapter_fields, read_adapter_folder
from qlora_trainer.model.adapter_variants import variant_told
from qlora_trainer.model.adapters import attach_adapters
from qlora_trainer.model.base import Base, resolve_base
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from qlora_trainer.model.plain_lora import as_plain_lora
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.model.skeleton import build_skeleton
from qlora_trainer.model.trained_tables import base_tables_of, with_updated_tables
from tests.export.made_adapters import load_base, make_adapter, model_logits, peft_logits
from tests.model.peft_oracle import load_adapter, logits, wrap
from tests.model.tiny_bases import small_config, write_base
from tests.model.tiny_models import load_for_training, packed_logits, relative_error, tiny_documents

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using Rank-Stabilized LoRA",
    "ignore:PiSSA changes the base weights",
    "ignore:.*`lora_bias=True` was passed but the targeted layer",
    "ignore:Setting `save_embedding_layers`",
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Adapter 'default'",  # PEFT takes a bias of B for a shard
)
DOCUMENTS = tiny_documents(33, 21)
TOLERANCE = 1e-5
LEAVES = ["q_proj", "o_proj", "up_proj", "down_proj"]
BLOCKS: dict[str, Any] = {
    "target_modules_bd_a": ["o_proj", "down_proj"],
    "target_modules_bd_b": ["q_proj", "layers.1.mlp.up_proj"],
}
PATTERNS: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {"o_proj": 6, r"layers\.1\.mlp\..*": 4},
    "alpha_pattern": {"q_proj": 9},
}


def _as_stored(model: nn.Module) -> None:
    """What the cache holds, linears in NF4 and the rest in bf16, without rounding anything."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear) and ".layers." in name:
            weight_OI = nf4.quantize(part.weight.detach(), double_quant=False)
            part.weight.data = nf4.dequantize(weight_OI, torch.float32)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    folder, found = tmp_path_factory.mktemp("bases"), {}
    for name in ("llama", "llama-tied", "gemma2", "phi"):
        config = small_config(name, intermediate_size=128)  # elsewhere than at multiples of 64 NF4 of NF4 is another
        path = write_base(folder / name, config, dtype=torch.float32, change=_as_stored)
        found[name] = resolve_base(str(path))
    return found


def ours(base: Base, folder: Path) -> tuple[QuantizedModel, Tensor]:
    """The adapter on our base in NF4, and the logits."""
    model = load_for_training(base, prepare_nf4_cache(base, double_quant=False))
    names, tables = list(model.linears), base_tables_of(model)
    adapter = read_adapter_folder(folder, linear_names=names, tables=tables, may_change_base=True)
    require_adapter_fits(build_skeleton(base.config, with_buffers=False), adapter, where=str(folder))
    plain = with_updated_tables(model, as_plain_lora(adapter, base.folder))
    assert plain.variant is None
    attach_adapters(model, plain.settings, plain.weights, dtype=torch.float32)
    return model, packed_logits(model, DOCUMENTS)


def require_pefts_logits(base: Base, folder: Path, **fields: Any) -> None:
    make_adapter(folder, base.folder, **{"target_modules": LEAVES, **fields})
    theirs_TV, without_TV = peft_logits(base.folder, folder, DOCUMENTS), model_logits(base.folder, DOCUMENTS)
    assert relative_error(ours(base, folder)[1], theirs_TV) <= TOLERANCE
    assert relative_error(without_TV, theirs_TV) > 1e-2


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"kasa_config": KasaConfig(), **PATTERNS}),
    ("llama", {"kasa_config": KasaConfig(), "lora_bias": True}),
    ("llama", {"kasa_config": KasaConfig(), "init_lora_weights": "pissa"}),
    ("llama", {"use_bdlora": BdLoraConfig(**BLOCKS, nblocks=2, match_strict=False), "r": 4, **PATTERNS}),
    ("llama", {"use_bdlora": BdLoraConfig(**BLOCKS, nblocks=4, match_strict=False), "r": 4, "lora_bias": True}),
    ("llama", {"use_bdlora": BdLoraConfig(**BLOCKS, match_strict=False), "init_lora_weights": "olora"}),
    ("llama", {"use_bdlora": BdLoraConfig(target_modules_bd_a=[""], nblocks=2), "r": 4}),  # all of them
    ("llama", {"r": 100, "init_lora_weights": "pissa", **PATTERNS}),  # of 64 ranks at most
    ("llama", {"r": 100, "init_lora_weights": "olora", "target_modules": ["k_proj", "up_proj"], "use_dora": True}),
    ("llama", {"r": 64, "init_lora_weights": "pissa", "target_modules": ["k_proj"], "alpha_pattern": {"k_proj": 9}}),
    (  # a key as ours for that weight are written
        "llama",
        {
            "r": 100,
            "init_lora_weights": "pissa",
            "alpha_pattern": {r"model\.layers\.0\.self_attn\.q_proj": 9},
        },
    ),
    ("llama", {"monteclora_config": MontecloraConfig(), **PATTERNS}),
    ("llama", {"use_qalora": True}),  # which PEFT ignores on a linear that is not GPTQ's
]


@pytest.mark.parametrize("name, fields", CASES, ids=str)
def test_it_is_plain_lora_with_pefts_logits(
    name: str, fields: dict[str, Any], bases: dict[str, Base], tmp_path: Path
) -> None:
    require_pefts_logits(bases[name], tmp_path / "theirs", **fields)


@pytest.mark.parametrize("seed", range(12))
def test_any_of_them_is(seed: int, bases: dict[str, Base], tmp_path: Path) -> None:
    """A random variant, start, rank, scale, patterns and targets."""
    drawn = random.Random(seed)
    targets = drawn.sample(LEAVES, drawn.randint(1, 4))
    fields: dict[str, Any] = {
        "target_modules": targets,
        "r": drawn.choice([2, 4, 8]),
        "lora_alpha": drawn.choice([1, 5, 32]),
        "use_rslora": drawn.random() < 0.5,
        "rank_pattern": {drawn.choice(targets): drawn.choice([2, 4, 6])} if drawn.random() < 0.5 else {},
        "alpha_pattern": {drawn.choice(targets): drawn.choice([2, 7.5])} if drawn.random() < 0.5 else {},
        "init_lora_weights": drawn.choice([True, True, "pissa", "olora"]),
    }
    blocks = BdLoraConfig(**BLOCKS, nblocks=2, match_strict=False)
    variant = drawn.choice(["kasa_config", "use_bdlora", "monteclora_config", "target_parameters"])
    fields[variant] = {
        "kasa_config": KasaConfig(),
        "use_bdlora": blocks,
        "monteclora_config": MontecloraConfig(),
        "target_parameters": [f"layers.{layer}.self_attn.v_proj.weight" for layer in range(drawn.randint(1, 2))],
    }[variant]
    require_pefts_logits(bases["llama"], tmp_path / "theirs", **fields)


HEAD, EMBEDDING = "lm_head", "embed_tokens"
NO_TARGETS: dict[str, Any] = {"target_modules": []}
TABLE_CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", HEAD], "init_lora_weights": "pissa", "rank_pattern": {HEAD: 5}}),
    ("llama", {"target_modules": [HEAD], "init_lora_weights": "olora", "use_dora": True}),
    ("llama", {"target_modules": ["q_proj", EMBEDDING], "init_lora_weights": "pissa"}),  # of which only q_proj is begun
    ("llama", {"target_modules": ["q_proj", HEAD], "kasa_config": KasaConfig(), "rank_pattern": {HEAD: 5}}),
    ("llama", {"target_modules": [HEAD], "use_bdlora": BdLoraConfig([], [HEAD], nblocks=2), "r": 4}),
    ("llama", {"target_modules": [HEAD], "use_bdlora": BdLoraConfig([HEAD], [], nblocks=2), "r": 4}),
    ("llama-tied", {"target_modules": [HEAD], "use_bdlora": BdLoraConfig([], [HEAD], nblocks=2), "r": 4}),
    ("llama", {"target_modules": ["q_proj", HEAD], "monteclora_config": MontecloraConfig()}),
    ("llama-tied", {"target_modules": ["q_proj", HEAD], "init_lora_weights": "olora"}),
    ("llama-tied", {"target_modules": ["q_proj", HEAD], "kasa_config": KasaConfig()}),
    (
        "llama",
        {**NO_TARGETS, "target_parameters": ["embed_tokens.weight", "lm_head.weight"], "init_lora_weights": "pissa"},
    ),
    ("llama-tied", {**NO_TARGETS, "target_parameters": ["q_proj.weight", "embed_tokens.weight"]}),
    ("llama-tied", {**NO_TARGETS, "target_parameters": ["lm_head.weight"]}),
    ("gemma2", {**NO_TARGETS, "target_parameters": ["embed_tokens.weight"]}),
    ("gemma2", {"target_modules": ["q_proj", EMBEDDING], "use_dora": True}),
    ("phi", {"target_modules": ["q_proj", HEAD], "lora_bias": True, "alpha_pattern": {HEAD: 9}}),
]


@pytest.mark.parametrize("name, fields", TABLE_CASES, ids=str)
def test_tables_are_pefts(name: str, fields: dict[str, Any], bases: dict[str, Base], tmp_path: Path) -> None:
    require_pefts_logits(bases[name], tmp_path / "theirs", **fields)


@pytest.mark.parametrize("fields", [{"init_lora_weights": "pissa"}, {"kasa_config": KasaConfig()}], ids=str)
def test_a_head_that_is_not_in_the_file_is_begun_again(
    fields: dict[str, Any], bases: dict[str, Base], tmp_path: Path
) -> None:
    """`save_embedding_layers=False`: then PEFT takes the part out of the base's head, as out of any linear."""
    folder = tmp_path / "theirs"
    made = make_adapter(tmp_path / "with", bases["llama"].folder, target_modules=["q_proj", HEAD], **fields)
    made.save_pretrained(folder, save_embedding_layers=False)
    assert not any("base_layer" in name for name in load_file(folder / WEIGHTS_FILE))
    theirs_TV = peft_logits(bases["llama"].folder, folder, DOCUMENTS)
    assert relative_error(ours(bases["llama"], folder)[1], theirs_TV) <= TOLERANCE
    tied = make_adapter(tmp_path / "tied", bases["llama-tied"].folder, target_modules=["q_proj", HEAD], **fields)
    tied.save_pretrained(tmp_path / "tied", save_embedding_layers=False)
    with pytest.raises(ConfigError, match="lm_head as a start has left it, of a base that ties it"):
        ours(bases["llama-tied"], tmp_path / "tied")


@pytest.mark.parametrize("group_size", [16, 32])
def test_qalora_is_what_peft_computes_over_gptq(group_size: int, bases: dict[str, Base], tmp_path: Path) -> None:
    """PEFT's layer for GPTQ, which asks nothing of what is below it, over plain linears: there A is of means.

    Mutation tried: the mean for the mean times the number of groups.
    """
    base = bases["llama"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        lora_alpha=5,
        target_modules=LEAVES,
        use_qalora=True,
        qalora_group_size=group_size,
        **PATTERNS,
    )
    config._register_custom_module({nn.Linear: GPTQLoraLinear})
    wrapped = wrap(load_base(base.folder), config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(tmp_path / "theirs")
    path = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert load_file(tmp_path / "theirs" / WEIGHTS_FILE)[path].shape == (3, 64 // group_size)
    with torch.no_grad():
        theirs_TV = logits(wrapped, DOCUMENTS)
    assert relative_error(ours(base, tmp_path / "theirs")[1], theirs_TV) <= TOLERANCE
    assert relative_error(model_logits(base.folder, DOCUMENTS), theirs_TV) > 1e-2


def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's LoftQ asks for CUDA, to quantize there, and for SciPy, which it uses no more."""
    to_device, packed_to_device, find_spec = Tensor.to, bitsandbytes.nn.Params4bit.to, importlib.util.find_spec

    def on_cpu(to: Any) -> Any:
        return lambda self, *args, **fields: to(
            self,
            *("cpu" if own == "cuda" else own for own in args),
            **{key: "cpu" if own == "cuda" else own for key, own in fields.items()},
        )

    monkeypatch.setattr(Tensor, "to", on_cpu(to_device))
    monkeypatch.setattr(bitsandbytes.nn.Params4bit, "to", on_cpu(packed_to_device))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name == "scipy" else find_spec(name))


@pytest.mark.parametrize("num_steps", [1, 2])
def test_loftq_of_one_step_is_lora_on_nf4(
    num_steps: int, bases: dict[str, Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more steps it is not: PEFT then quantizes what is left of the weight beside the adapter."""
    path = write_base(tmp_path / "base", small_config("llama", intermediate_size=128))
    base, folder = resolve_base(str(path)), tmp_path / "theirs"
    with monkeypatch.context() as patch:
        _on_cpu(patch)
        loftq = {"loftq_bits": 4, "loftq_iter": num_steps}
        make_adapter(folder, path, target_modules=LEAVES, init_lora_weights="loftq", loftq_config=loftq, **PATTERNS)
        wrapped = load_adapter(load_base(path), folder).eval()
        with torch.no_grad():  # beside linears that have no adapter, and are in NF4 here
            for name, part in wrapped.named_modules():
                if isinstance(part, nn.Linear) and name.rpartition(".")[2] in ("k_proj", "v_proj", "gate_proj"):
                    part.weight.data = nf4.dequantize(nf4.quantize(part.weight, double_quant=False), torch.float32)
            theirs_TV = logits(wrapped, DOCUMENTS)
    if num_steps == 1:
        assert "LoftQ of one step" in str(variant_told(read_adapter_fields(folder)))
        assert relative_error(ours(base, folder)[1], theirs_TV) <= TOLERANCE
        return
    with pytest.raises(ConfigError, match="init_lora_weights = 'loftq'"):
        ours(base, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert relative_error(ours(base, folder)[1], theirs_TV) > 1e-2


def seen_by(model: Any, *, learns: bool) -> None:
    """What CorDA and LoRA-GA look at while it runs: inputs of the linears, or gradients of their weights."""
    with torch.set_grad_enabled(learns):
        loss = logits(model, DOCUMENTS).square().sum()
    if learns:
        loss.backward()


@pytest.mark.filterwarnings(
    "ignore:.*orda", "ignore:.*LoRA-GA", "ignore:.*lora_ga", "ignore:Full backward hook is firing"
)
@pytest.mark.parametrize("start", ["pissa_niter_2", "corda", "lora_ga"])
def test_what_peft_does_not_find_again_is_refused(start: str, bases: dict[str, Base], tmp_path: Path) -> None:
    """Loaded by PEFT over its base, the same file is another model, or none. Here it is none, with what to do."""
    model = load_base(bases["llama"].folder)
    asked: Any = {"init_lora_weights": start, "r": 4, "lora_alpha": 5, "target_modules": LEAVES}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **asked)
    if start == "corda":
        config.corda_config = CordaConfig(corda_method="kpm")
        preprocess_corda(model, config, run_model=lambda: seen_by(model, learns=False))
    elif start == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(model, config, lambda: seen_by(model, learns=True))
    torch.manual_seed(0)
    wrapped = wrap(model, config).eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        made_TV = logits(wrapped, DOCUMENTS)
    if start == "corda":
        with pytest.raises(ValueError, match="eigens"):
            peft_logits(bases["llama"].folder, tmp_path / "theirs", DOCUMENTS)
    else:
        assert relative_error(peft_logits(bases["llama"].folder, tmp_path / "theirs", DOCUMENTS), made_TV) > 1e-2
    with pytest.raises(ConfigError, match=f"init_lora_weights = '{start}'.*PEFT cannot load it"):
        ours(bases["llama"], tmp_path / "theirs")


def test_what_it_was_is_told(bases: dict[str, Base], tmp_path: Path) -> None:
    wanted: dict[str, dict[str, Any]] = {
        "KaSA, of twice the rank": {"kasa_config": KasaConfig()},
        "PiSSA and KaSA, of three times the rank": {"kasa_config": KasaConfig(), "init_lora_weights": "pissa"},
        "BD-LoRA, whose zeros": {"use_bdlora": BdLoraConfig(**BLOCKS, match_strict=False)},
        "MonteCLoRA as it is evaluated": {"monteclora_config": MontecloraConfig()},
        "LoRA on weights": {"target_parameters": ["v_proj.weight"]},
        "QALoRA, with a column": {"use_qalora": True},
    }
    for number, (told, fields) in enumerate(wanted.items()):
        make_adapter(tmp_path / str(number), bases["llama"].folder, target_modules=LEAVES, **fields)
        assert f"read as plain LoRA: {told}" in str(variant_told(read_adapter_fields(tmp_path / str(number))))
    make_adapter(tmp_path / "plain", bases["llama"].folder, target_modules=LEAVES)
    assert variant_told(read_adapter_fields(tmp_path / "plain")) is None


BLOCKY: dict[str, Any] = {"use_bdlora": BdLoraConfig(**BLOCKS, nblocks=2, match_strict=False), "r": 4}
ON_WEIGHTS = {"target_parameters": ["v_proj.weight"]}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"kasa_config": KasaConfig()}, {"kasa_config": True}, "kasa_config = True"),
    ({"kasa_config": KasaConfig()}, {"kasa_config": None}, "lora_diag"),
    ({"kasa_config": KasaConfig()}, {"lora_alpha": 0}, "found a scale of 0; expected a positive lora_alpha"),
    (BLOCKY, {"use_bdlora": BLOCKS | {"nblocks": 0}}, "nblocks, a positive whole number"),
    (BLOCKY, {"use_bdlora": BLOCKS | {"nblocks": "2"}}, "nblocks, a positive whole number"),
    (BLOCKY, {"use_bdlora": {"target_modules_bd_a": "o_proj"}}, "and names"),
    (BLOCKY, {"use_bdlora": BLOCKS | {"nblocks": 4}}, r"o_proj\.lora_A: adapter \(4, 32\), base \(4, 16\)"),
    (BLOCKY, {"use_bdlora": BLOCKS | {"nblocks": 10**9}}, r"o_proj\.lora_A: adapter \(4, 32\), base \(4, 0\)"),
    (BLOCKY | {"target_modules": [HEAD]}, {"use_bdlora": {"target_modules_bd_b": [HEAD], "nblocks": 128}}, "rank 4"),
    (BLOCKY, {"use_bdlora": {"target_modules_bd_a": ["q_"], "target_modules_bd_b": ["q_proj"]}}, "both"),
    (ON_WEIGHTS, {"target_parameters": ["experts.gate_up_proj"]}, "there are no experts"),
    (ON_WEIGHTS, {"target_parameters": "v_proj.weight"}, "target_parameters = 'v_proj.weight'"),
    (ON_WEIGHTS, {"target_parameters": None}, "v_proj"),
    (
        ON_WEIGHTS,
        {"target_modules": ["q_proj", "o_proj", "up_proj"]},
        r"LoRA on model\.layers\.0\.mlp\.down_proj beside",
    ),
    (ON_WEIGHTS, {"target_modules": None}, r"LoRA on model\.layers\.0\.mlp\.down_proj beside"),
    (
        ON_WEIGHTS,
        {"target_parameters": ["layers.0.self_attn.v_proj.weight"]},
        r"LoRA on model\.layers\.1\.self_attn\.v",
    ),
    (ON_WEIGHTS, {"exclude_modules": ".*o_proj"}, r"LoRA on model\.layers\.0\.self_attn\.o_proj beside"),
    (ON_WEIGHTS, {"layers_to_transform": [0]}, r"LoRA on model\.layers\.1\.mlp\.down_proj beside"),
    (ON_WEIGHTS, {"target_modules": "(q_proj"}, "a broken regular expression"),
    ({"use_qalora": True}, {"use_qalora": 16}, "use_qalora = 16"),
]


@pytest.mark.parametrize("fields, changes, message", REFUSED, ids=str)
def test_what_contradicts_itself_is_refused(
    fields: dict[str, Any], changes: dict[str, Any], message: str, bases: dict[str, Base], tmp_path: Path
) -> None:
    make_adapter(tmp_path / "theirs", bases["llama"].folder, **{"target_modules": LEAVES, **fields})
    config = tmp_path / "theirs" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        ours(bases["llama"], tmp_path / "theirs")


@pytest.mark.parametrize(
    "fields, rank, rows, message",
    [
        ({"kasa_config": {}}, 64, 64, r"q_proj\.weight: found \(64, 64\); expected more singular values than KaSA's"),
        (
            {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 4}},
            6,
            6,
            "found 6 rows; expected 4 equal blocks",
        ),
    ],
    ids=str,
)
def test_what_peft_would_not_make_is_refused(
    fields: dict[str, Any], rank: int, rows: int, message: str, bases: dict[str, Base], tmp_path: Path
) -> None:
    """Files that only a hand can write: the rank of a whole weight, blocks of a rank that they do not divide."""
    make_adapter(tmp_path / "a", bases["llama"].folder, target_modules=["layers.0.self_attn.q_proj"])
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields | {"r": rank}))
    prefix, width = "base_model.model.model.layers.0.self_attn.q_proj", 16 if "use_bdlora" in fields else 64
    shapes: dict[str, tuple[int, ...]] = {"lora_A.weight": (rows, width), "lora_B.weight": (64, rank)}
    shapes |= {"lora_diag": (rank,)} if "kasa_config" in fields else {}
    save_file({f"{prefix}.{leaf}": torch.ones(shape) for leaf, shape in shapes.items()}, tmp_path / "a" / WEIGHTS_FILE)
    with pytest.raises(ConfigError, match=message):
        ours(bases["llama"], tmp_path / "a")


def test_a_diagonal_of_another_size_is_refused(bases: dict[str, Base], tmp_path: Path) -> None:
    make_adapter(tmp_path / "theirs", bases["llama"].folder, target_modules=LEAVES, kasa_config=KasaConfig())
    path = tmp_path / "theirs" / WEIGHTS_FILE
    tensors = load_file(path)
    for wrong in (torch.ones(1), torch.ones(3, 1)):  # which would be broadcast
        first = next(name for name in tensors if name.endswith(".lora_diag"))
        save_file(tensors | {first: wrong}, path)
        with pytest.raises(ConfigError, match=r"lora_diag \(.*KaSA's diagonal beside a B of as many columns"):
            ours(bases["llama"], tmp_path / "theirs")
    save_file({name: own for name, own in tensors.items() if name != first}, path)
    with pytest.raises(ConfigError, match=r"lora_B, and no .*lora_diag; expected KaSA's diagonal beside each B"):
        ours(bases["llama"], tmp_path / "theirs")
