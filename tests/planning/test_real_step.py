"""Predicted bytes against what torch's profiler counts in a real step on a CPU, where no tracker is looking."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import PreTrainedConfig

from qlora_trainer.config.levers import NO_LEVERS, Levers
from qlora_trainer.hardware.device_memory import cpu_memory
from qlora_trainer.hardware.input_store import FileInputs
from qlora_trainer.model.adapters import attach_new_adapters, trainable_parameters
from qlora_trainer.model.base import Base
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.offload import keep_least
from qlora_trainer.model.pull_levers import pull_levers
from qlora_trainer.model.trained_tables import base_tables_of
from qlora_trainer.model.trained_vectors import biased_modules
from qlora_trainer.planning.dry_model import DryModel, build_dry_model
from qlora_trainer.planning.full_trace import trace_training
from qlora_trainer.planning.price import Layout, Prices, evaluation_level
from qlora_trainer.planning.pulled import pulled
from qlora_trainer.planning.rungs import pulled_levers
from qlora_trainer.planning.shallow_trace import trace_step
from qlora_trainer.planning.state_trace import StateForm, trace_state
from qlora_trainer.step.batch import MicroBatch, make_micro_batch
from qlora_trainer.step.document import Document
from qlora_trainer.step.optimizer import AdapterOptimizer, OptimizerSettings, num_flat_elements
from qlora_trainer.step.state import first_non_finite
from qlora_trainer.step.train_step import accumulate_gradients, evaluate
from tests.hardware.profiled_memory import allocated_by
from tests.model.tiny_bases import small_config
from tests.model.tiny_models import load_for_training, prepare

CPU = torch.device("cpu")
VOCABULARY, NUM_LAYERS, NUM_TOKENS, CHUNK = 4096, 4, 512, 128
MODELS = ("llama", "gemma2", "qwen3", "phi3")
# The peak of this one is not in its loss, but in a linear.
OTHER_SIZES = {"llama-biases": {"hidden_size": 128, "intermediate_size": 1024, "vocab_size": 256}}
MAX_OFF, MAX_LOW = 0.02, 0.01


@dataclass(frozen=True, slots=True)
class Case:
    """One step; the micro-batch has `NUM_TOKENS` tokens in documents of `seq_len`, all in one row or one a row."""

    name: str
    num_recomputed: int
    dropout: float
    dtype: torch.dtype
    seq_len: int
    packing: bool = True
    dora: bool = False
    levers: Levers = NO_LEVERS
    num_offloaded: int = 0
    tables: tuple[str, ...] = ()
    tied_head: str | None = None
    biases: bool = False
    norms: bool = False
    lora_bias: bool = False
    has_lora: bool = True

    def __str__(self) -> str:
        rows = "row" if self.packing else "rows"
        dtype = str(self.dtype).rpartition(".")[2]
        policy = f"recompute{self.num_recomputed}-dropout{self.dropout}{'-dora' * self.dora}"
        policy += "-tables" * bool(self.tables) + "-biases" * self.biases + "-lora_bias" * self.lora_bias
        policy += "-norms" * self.norms
        policy += "-no_lora" * (not self.has_lora)
        policy += "".join(f"-{name}={value}" for name, value in self.pulled.items())
        return f"{self.name}-{policy}-{dtype}-{self.seq_len}-{rows}"

    @property
    def pulled(self) -> dict[str, Any]:
        return pulled_levers(self.levers, num_offloaded=self.num_offloaded)

    @property
    def layout(self) -> Layout:
        return Layout(
            rank=8,
            tokens=NUM_TOKENS,
            seq_len=self.seq_len,
            rows=1 if self.packing else NUM_TOKENS // self.seq_len,
            num_recomputed=self.num_recomputed,
            loss_chunk=CHUNK,
            levers=self.levers,
            num_offloaded=self.num_offloaded,
        )

    @property
    def document_lengths(self) -> list[int]:
        return [self.seq_len] * (NUM_TOKENS // self.seq_len)


FP32, BF16 = torch.float32, torch.bfloat16
# Nearly every pair of values of two columns; a CPU without products in 16 bits takes five times as long for them.
FAST = [
    Case("llama", 0, 0.0, FP32, 128),
    Case("llama", 4, 0.1, BF16, 512),
    Case("gemma2", 4, 0.0, FP32, 512),
    Case("gemma2", 0, 0.1, FP32, 128),
    Case("qwen3", 2, 0.1, FP32, 128, packing=False),
    Case("phi3", 0, 0.1, FP32, 512),
    Case("llama", 0, 0.0, FP32, 128, dora=True),
    Case("llama", 4, 0.1, BF16, 512, dora=True),
    Case("llama", 4, 0.0, FP32, 512, levers=Levers(tile_tokens=64)),
    Case("gemma2", 4, 0.1, FP32, 128, levers=Levers(tile_tokens=128)),
    Case("qwen3", 2, 0.0, BF16, 128, packing=False, levers=Levers(tile_tokens=200)),
    Case("llama", 4, 0.1, FP32, 512, dora=True, levers=Levers(tile_tokens=128)),
    Case("phi3", 2, 0.0, FP32, 128, levers=Levers(embedding_residency="host")),
    Case("llama", 4, 0.0, BF16, 512, levers=Levers(tile_tokens=64, embedding_residency="host")),
    Case("llama", 4, 0.1, FP32, 512, num_offloaded=4),
    Case("gemma2", 3, 0.0, FP32, 128, num_offloaded=2, levers=Levers(base_residency="streamed")),
    Case("phi3", 4, 0.0, BF16, 512, num_offloaded=3, levers=Levers(base_residency="streamed", tile_tokens=128)),
    Case("llama", 0, 0.0, FP32, 128, tables=("model.embed_tokens", "lm_head")),
    Case("qwen3", 4, 0.0, BF16, 512, tables=("model.embed_tokens",), tied_head="lm_head"),
    Case("qwen3", 4, 0.0, BF16, 512, tables=("lm_head",)),  # which it ties: the base's stays, as the embedding
    Case("qwen3", 4, 0.0, FP32, 128, tables=("model.embed_tokens", "lm_head")),
    Case("llama", 4, 0.0, FP32, 512, levers=Levers(nf4_head=True)),
    Case("phi3", 2, 0.0, BF16, 128, levers=Levers(nf4_head=True, tile_tokens=128, embedding_residency="host")),
    # Gradients of 16 bits are added up in fp32. DoRA: 3.7 % low where that makes a copy that is not seen.
    Case("llama-biases", 4, 0.0, BF16, 512, dora=True),
    Case("llama-biases", 4, 0.0, BF16, 512, biases=True),
    Case("llama", 0, 0.1, BF16, 128, lora_bias=True),
    Case("llama", 4, 0.0, FP32, 512, lora_bias=True, levers=Levers(tile_tokens=64)),
    # Tables and biases alone; of a head alone no gradient goes through any layer. Biases of norms.
    Case("llama", 4, 0.0, FP32, 512, tables=("lm_head",), has_lora=False),
    Case("llama", 2, 0.0, BF16, 128, tables=("lm_head",), has_lora=False, levers=Levers(tile_tokens=128)),
    Case("llama", 2, 0.0, FP32, 128, tables=("model.embed_tokens",), has_lora=False),
    Case("phi", 2, 0.0, FP32, 512, biases=True),
    Case("phi", 4, 0.0, BF16, 128, biases=True, has_lora=False, levers=Levers(tile_tokens=128)),
    Case("qwen3", 4, 0.0, BF16, 512, norms=True),
    Case("qwen3", 2, 0.0, FP32, 128, norms=True, has_lora=False, levers=Levers(tile_tokens=128)),
    Case("gemma2", 4, 0.0, BF16, 128, norms=True),
    Case("phi", 0, 0.0, BF16, 128, norms=True, has_lora=False),
]
EVERY = [
    Case(name, num_recomputed, dropout, dtype, seq_len)
    for name, num_recomputed, dropout, dtype, seq_len in itertools.product(
        MODELS, (0, NUM_LAYERS), (0.0, 0.1), (FP32, BF16), (128, 512)
    )
]


def config_of(name: str) -> PreTrainedConfig:
    changes: dict[str, Any] = {
        "num_hidden_layers": NUM_LAYERS,
        "hidden_size": 256,
        "intermediate_size": 512,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2 * NUM_TOKENS,
        **OTHER_SIZES.get(name, {}),
    }
    kinds = getattr(small_config(name), "layer_types", None)
    if kinds:
        changes["layer_types"] = kinds * (NUM_LAYERS // 2)
    return small_config(name, **changes)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], tuple[Base, NF4Cache]]:
    """A base of each architecture, made once, its head in NF4 or not."""

    @cache
    def make(name: str, nf4_head: bool) -> tuple[Base, NF4Cache]:
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            return prepare(folder / "base", config_of(name), nf4_head=nf4_head, max_shard_size="1GB")

    return lambda case: make(case.name, case.levers.nf4_head)


def micro_batch(case: Case) -> MicroBatch:
    """Every token but the first of a document is trained on."""
    rng = np.random.default_rng(0)
    documents = []
    for index, length in enumerate(case.document_lengths):
        vocabulary = OTHER_SIZES.get(case.name, {}).get("vocab_size", VOCABULARY)
        input_ids_T = rng.integers(3, vocabulary, length, dtype=np.int32)
        documents.append(Document(index, input_ids_T, input_ids_T.copy()))
    return make_micro_batch(documents, seed=0, step=0, packing=case.packing)


def dry_model(case: Case, base: Base) -> DryModel:
    return build_dry_model(base.config, double_quant=True, compute_dtype=case.dtype, device=CPU, alignment_bytes=1)


def require_close(predicted_bytes: int, counted_bytes: int) -> None:
    assert predicted_bytes >= (1 - MAX_LOW) * counted_bytes
    assert predicted_bytes <= (1 + MAX_OFF) * counted_bytes


def check_training(case: Case, base: Base, cache: NF4Cache, folder: Path) -> None:
    model = load_for_training(base, cache, case.dtype)
    settings = LoraSettings(
        8,
        16.0,
        case.dropout,
        tuple(model.linears) if case.has_lora else (),
        use_dora=case.dora,
        modules_to_save=case.tables,
        tied_head=case.tied_head,
        norms=base_tables_of(model).norms if case.norms else (),
        biases=biased_modules(model) if case.biases else (),
        lora_bias=case.lora_bias,
    )
    attach_new_adapters(model, settings, dtype=torch.bfloat16, seed=0)
    optimizer_settings = OptimizerSettings(bits=32, residency="device", weight_decay=0.0, paging_folder=Path())
    optimizer = AdapterOptimizer(trainable_parameters(model), optimizer_settings)
    pull_levers(model, case.levers)
    keep_least(model, case.num_recomputed, case.num_offloaded, FileInputs(folder))
    batch = micro_batch(case)
    counted = allocated_by(
        lambda: accumulate_gradients(
            model, [batch], num_supervised_tokens=batch.targets_N.numel(), loss_chunk_tokens=CHUNK
        )
    )
    assert counted.net_bytes == 4  # the loss
    assert float(optimizer.clip_gradients(None)) > 0.0
    dry = dry_model(case, base)
    with pulled(dry, case.levers):
        traced = trace_training(
            dry,
            settings,
            adapter_dtype=torch.bfloat16,
            num_tokens=NUM_TOKENS,
            document_lengths=(case.seq_len,),
            rows=case.layout.rows,
            num_recomputed=case.num_recomputed,
            num_offloaded=case.num_offloaded,
            loss_chunk_tokens=CHUNK,
            alignment_bytes=1,
        )
    require_close(max(level.peak_bytes for level in traced.levels), counted.peak_bytes)


@pytest.mark.parametrize("case", FAST, ids=str)
def test_a_training_step(case: Case, prepared: Callable[[Case], tuple[Base, NF4Cache]], disk_folder: Path) -> None:
    check_training(case, *prepared(case), disk_folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_any_training_step(case: Case, prepared: Callable[[Case], tuple[Base, NF4Cache]], disk_folder: Path) -> None:
    check_training(case, *prepared(case), disk_folder)


@pytest.mark.parametrize(
    "case",
    [
        Case("llama", 0, 0.1, FP32, 512),
        Case("gemma2", 0, 0.0, FP32, 128),
        Case("llama", 0, 0.0, FP32, 512, levers=Levers(tile_tokens=128)),
        Case("llama", 0, 0.0, FP32, 128, levers=Levers(embedding_residency="host")),
        Case("llama", 0, 0.0, FP32, 128, levers=Levers(nf4_head=True)),
    ],
    ids=str,
)
def test_an_evaluation(case: Case, prepared: Callable[[Case], tuple[Base, NF4Cache]]) -> None:
    base, cache_ = prepared(case)
    model = load_for_training(base, cache_, case.dtype)
    settings = LoraSettings(rank=8, alpha=16.0, dropout=case.dropout, targets=tuple(model.linears))
    attach_new_adapters(model, settings, dtype=torch.bfloat16, seed=0)
    pull_levers(model, case.levers)
    batch = micro_batch(case)
    counted = allocated_by(lambda: evaluate(model, [batch], loss_chunk_tokens=CHUNK))
    dry = dry_model(case, base)
    with pulled(dry, case.levers):
        parts = trace_step(dry, settings, adapter_dtype=torch.bfloat16)
    require_close(evaluation_level(Prices(parts, cpu_memory()), case.layout).peak_bytes, counted.peak_bytes)


ONE, SEVERAL = [(32, 50_001)], [(32, 20_000), (32, 30_000), (5, 33)]


@pytest.mark.parametrize(
    "bits, dtype, shapes",
    [(32, FP32, ONE), (32, BF16, SEVERAL), (8, BF16, ONE), (8, FP32, SEVERAL)],
    ids=["32-one", "32-several", "8-one", "8-several"],
)
def test_an_update_a_save_and_a_resume(bits: Literal[8, 32], dtype: torch.dtype, shapes: list[tuple[int, int]]) -> None:
    """Over more elements than the optimizer updates at once; a plan takes all parameters together for one."""
    generator = torch.Generator().manual_seed(0)
    parameters = {}
    for number, shape in enumerate(shapes):
        parameter = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        parameter.grad_dtype = torch.float32
        parameters[str(number)] = parameter
    settings = OptimizerSettings(bits=bits, residency="device", weight_decay=0.0, paging_folder=Path())
    optimizer = AdapterOptimizer(parameters, settings)
    optimizer.gradient.normal_(generator=generator)

    def update() -> None:
        optimizer.clip_gradients(1.0)
        optimizer.update(1e-4)

    def resume() -> None:
        """From files that are mapped, as the clones stand for."""
        adapters = [parameter.data.clone() for parameter in parameters.values()]
        optimizer.load_state_dict({name: tensor.clone() for name, tensor in optimizer.state_dict().items()})
        assert len(adapters) == len(shapes)

    form = StateForm(bits=bits, adapter_dtype=dtype, device=CPU, alignment_bytes=1)
    trace = trace_state(num_flat_elements(shapes), form)
    predicted = {phase: level.peak_bytes for phase, level in trace.levels.items()}
    counted = {
        "optimizer": allocated_by(update).peak_bytes,
        "save": allocated_by(lambda: first_non_finite(optimizer.state_dict())).peak_bytes,
        "resume": allocated_by(resume).peak_bytes,
    }
    assert {"gradient": sum(trace.gradient), "optimizer": sum(trace.optimizer)} == optimizer.num_bytes
    require_close(predicted["optimizer"], counted["optimizer"])
    require_close(predicted["resume"], counted["resume"])
    assert max(predicted["save"], counted["save"]) <= 4096, "nothing is copied to be looked at"
