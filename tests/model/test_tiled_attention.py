"""A layer's attention over tiles of tokens: the same step, and what of it is there at once.

That whole steps are the same, of every architecture and adapter, is in `test_tiled.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_trainer.config.levers import Levers
from qlora_trainer.config.load import load_config
from qlora_trainer.model import nf4
from qlora_trainer.model.activation_policy import decoder_layers, recompute_layers, tile_layers
from qlora_trainer.model.base import Base
from qlora_trainer.model.fused_layer import FusedLayer
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.planning.document_lengths import DocumentLengths
from qlora_trainer.planning.full_trace import without_collector
from qlora_trainer.planning.planner import Planner
from qlora_trainer.planning.price import Layout
from tests.model.tiny_bases import CONFIGS, small_config
from tests.model.tiny_models import RANK as LOW_RANK
from tests.model.tiny_models import attach_random_adapter, load_for_training, prepare, relative_error
from tests.planning.test_price import GPU, NUM_LAYERS, RANK

Prepare = Callable[[str], tuple[Base, NF4Cache]]
NUM_ROWS, LENGTHS = 3, (9, 4, 20)
FUSED = ("llama", "llama-biases", "mistral", "qwen2-window", "qwen3", "gemma")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    @cache
    def make(name: str) -> tuple[Base, NF4Cache]:
        folder: Path = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            return prepare(folder / "base", CONFIGS[name])

    return make


def through_a_layer(made: tuple[Base, NF4Cache], tile_tokens: int) -> list[Tensor]:
    """Output, gradient of the input and of the adapters of one layer, over several rows."""
    model = load_for_training(*made)
    attach_random_adapter(model)
    recompute_layers(model, 1)
    tile_layers(model, tile_tokens)
    layer = decoder_layers(model)[0]
    assert isinstance(layer, FusedLayer)
    generator = torch.Generator().manual_seed(0)
    config: Any = model.module.config
    shape = (NUM_ROWS, sum(LENGTHS), config.hidden_size)
    hidden, grad = torch.randn(2, *shape, generator=generator)
    hidden.requires_grad_()
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    owner: Any = next(part for part in model.module.modules() if hasattr(part, "rotary_emb"))
    tables = owner.rotary_emb(hidden, positions)
    out = layer(hidden, position_embeddings=tables, document_lengths=LENGTHS)
    kept = grad.clone()
    parameters = [part for part in layer.parameters() if part.requires_grad]
    found = list(torch.autograd.grad(out, [hidden, *parameters], grad))
    assert torch.equal(grad, kept), "somebody else may have it"
    return [out.detach(), *found]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("tile_tokens", [8, 16, 128])
def test_rows_of_documents_are_the_same(name: str, tile_tokens: int, prepared: Prepare) -> None:
    """Documents longer and shorter than a tile, in runs that end with a row and do not."""
    expected = through_a_layer(prepared(name), 0)
    found = through_a_layer(prepared(name), tile_tokens)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= 1e-5


def test_each_weight_is_unpacked_once_a_pass(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    real, unpacked = nf4.dequantize, []

    def counting(weight: nf4.NF4Weight, dtype: torch.dtype, row_scale_O: Tensor | None = None) -> Tensor:
        unpacked.append(weight.packed.data_ptr())
        return real(weight, dtype, row_scale_O)

    monkeypatch.setattr(nf4, "dequantize", counting)
    through_a_layer(prepared("llama"), 8)
    times = sorted(unpacked.count(place) for place in set(unpacked))
    # Attention forward, recomputed and backward; of the MLP nothing is recomputed.
    assert times == [2, 2, 2, 3, 3, 3, 3]


@pytest.fixture(scope="module")
def planner() -> Planner:
    """Of many small heads, so that one of them is little; together they are as wide as a layer."""
    heads: dict[str, int] = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 16}
    own = small_config("llama", num_hidden_layers=NUM_LAYERS, hidden_size=256, intermediate_size=512, **heads)
    config = load_config(None, ["model.base=x", "data.train=x.jsonl", "data.seq_len=256"])
    with without_collector():
        documents = DocumentLengths.of_full_length(256, global_batch_size=16)
        return Planner.of(config, GPU, own, documents, packing=True)


def bytes_a_token(planner: Planner, phase: str) -> float:
    """Of a long document, inputs of layers being on the host."""
    peaks = []
    lengths = (2**16, 2**17)
    for tokens in lengths:
        layout = Layout(
            rank=RANK,
            tokens=tokens,
            seq_len=tokens,
            rows=1,
            num_recomputed=NUM_LAYERS,
            num_offloaded=NUM_LAYERS,
            loss_chunk=64,
            levers=Levers(tile_tokens=64),
        )
        peaks.append(planner.price(layout, "adamw_32bit").phases[phase])
    return (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])


def test_backward_holds_attention_s_tensors_once(planner: Planner) -> None:
    """By trace. Mutations tried: the gradient of attention's output made whole; gradients of queries, keys and values
    beside these; the gradient of the MLP's input not in its place; attention's output not in that of the queries."""
    config: Any = planner.dry.model.module.config
    hidden, all_heads = config.hidden_size, config.num_attention_heads * config.head_dim
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim
    # Two buffers of inputs, what went into the MLP or its gradient, the gradient behind it; q and the output; k and v.
    # Forward has the embedding's output and the layer's input, not kept, in place of the two gradients.
    elements = 4 * hidden + 2 * all_heads + keys_and_values
    for phase in ("forward", "backward"):
        assert 2 * elements <= bytes_a_token(planner, phase) < 2 * elements + 2 * hidden, phase
    elements = 3 * hidden + all_heads + keys_and_values
    assert 2 * elements <= bytes_a_token(planner, "eval") < 2 * elements + hidden


class _Rows(TorchDispatchMode):
    """The most rows that a norm or a product has made, but for low-rank ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_", "qlora_trainer::rms_norm"):
            made = out[0] if isinstance(out, tuple) else out
            if made.shape[1] > 3 * LOW_RANK and args[0].shape[0] == made.shape[0]:  # no gradient of a matrix
                self.most[name] = max(self.most.get(name, 0), made.shape[0])
        return out


def test_norms_and_products_are_of_a_tile(prepared: Prepare) -> None:
    for tile_tokens, most in ((0, NUM_ROWS * sum(LENGTHS)), (16, 16)):
        with _Rows() as rows:
            through_a_layer(prepared("llama"), tile_tokens)
        assert rows.most["qlora_trainer::rms_norm"] == most
        assert rows.most["aten::addmm_"] == most
