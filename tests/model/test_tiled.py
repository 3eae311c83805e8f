"""Layers in tiles of tokens against the same layers whole: outputs, gradients, and what is there at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_trainer.errors import ConfigError
from qlora_trainer.model import nf4, tiled
from qlora_trainer.model.activation_policy import can_tile, decoder_layers, recompute_layers, tile_layers
from qlora_trainer.model.adapters import attach_adapters, trainable_parameters
from qlora_trainer.model.base import Base
from qlora_trainer.model.linear import NF4Linear
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.quantized import QuantizedModel, hidden_states
from qlora_trainer.model.row_ops import gated
from qlora_trainer.step.batch import make_micro_batch
from qlora_trainer.step.train_step import accumulate_gradients, evaluate
from tests.model.tiny_bases import CONFIGS
from tests.model.tiny_models import (
    load_for_training,
    lora_settings,
    prepare,
    random_adapter,
    relative_error,
    tiny_documents,
)

LENGTHS = (21, 30, 9)
NUM_LAYERS = 2
Prepare = Callable[[str], tuple[Base, NF4Cache]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    made: dict[str, tuple[Base, NF4Cache]] = {}

    def base_of(name: str) -> tuple[Base, NF4Cache]:
        if name not in made:
            folder: Path = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
                made[name] = prepare(folder / "base", CONFIGS[name])
        return made[name]

    return base_of


def step_of(
    model: QuantizedModel,
    tile_tokens: int,
    *,
    targets: str = "all-linear",
    dropout: float = 0.0,
    dora: bool = False,
    dtype: torch.dtype = torch.float32,
    num_recomputed: int = NUM_LAYERS,
    lengths: tuple[int, ...] = LENGTHS,
    packing: bool = True,
) -> dict[str, Tensor]:
    """Loss, held-out loss and gradients."""
    settings = replace(lora_settings(model, targets), dropout=dropout, use_dora=dora)
    attach_adapters(model, settings, random_adapter(model, settings, b_size=0.05), dtype=dtype)
    recompute_layers(model, num_recomputed)
    tile_layers(model, tile_tokens)
    documents = tiny_documents(*lengths)
    micro_batch = make_micro_batch(documents, seed=0, step=0, packing=packing)
    count = sum(document.num_supervised_tokens for document in documents)
    parameters = trainable_parameters(model)
    for parameter in parameters.values():
        parameter.grad_dtype = torch.float32
    found = {"eval": evaluate(model, [micro_batch], loss_chunk_tokens=16)}
    found["loss"] = accumulate_gradients(model, [micro_batch], num_supervised_tokens=count, loss_chunk_tokens=16)
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        found[name] = parameter.grad
    return found


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for entry, tensor in found.items():
        assert relative_error(tensor, expected[entry]) <= 1e-5, entry


@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_is_the_same(name: str, prepared: Prepare) -> None:
    base, cache = prepared(name)
    model = load_for_training(base, cache)
    assert can_tile(model)
    require_same(step_of(model, 8), step_of(load_for_training(base, cache), 0))


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_recomputed": 1},
        {"dropout": 0.3},
        {"dora": True},
        {"dora": True, "dropout": 0.3},
        {"targets": ".*1.mlp.*"},
        {"targets": ".*self_attn.*"},
        {"targets": ".*o_proj"},
        {"lengths": (5, 9, 4, 30, 7)},
    ],
    ids=str,
)
def test_the_step_is_the_same_with(name: str, options: dict[str, object], prepared: Prepare) -> None:
    base, cache = prepared(name)
    expected = step_of(load_for_training(base, cache), 0, **options)  # type: ignore[arg-type]
    require_same(step_of(load_for_training(base, cache), 16, **options), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["qwen3", "llama-biases"])
@pytest.mark.parametrize("options", [{"dora": True, "dropout": 0.3}, {"dropout": 0.3, "packing": False}], ids=str)
def test_so_it_is_with_norms_of_heads_and_with_biases(name: str, options: dict[str, object], prepared: Prepare) -> None:
    """What is dropped of a tile is what is dropped of its tokens in a row, or in one of several."""
    base, cache = prepared(name)
    expected = step_of(load_for_training(base, cache), 0, **options)  # type: ignore[arg-type]
    require_same(step_of(load_for_training(base, cache), 8, **options), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_outputs_are_the_same_to_the_bit_where_tiles_are_large(name: str, prepared: Prepare) -> None:
    """No sum has another order; a product of a few rows may be another kernel of the library's."""
    base, cache = prepared(name)
    model = load_for_training(base, cache)
    micro_batch = make_micro_batch(tiny_documents(*LENGTHS), seed=0, step=0, packing=True)
    found = []
    for size in (0, 32):
        tile_layers(model, size)
        with torch.no_grad():
            found.append(
                hidden_states(
                    model, micro_batch.input_ids_BT, micro_batch.position_ids_BT, micro_batch.document_lengths
                )
            )
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_loss_is_the_same_to_the_bit_where_chunks_fill_tiles(name: str, prepared: Prepare) -> None:
    base, cache = prepared(name)
    found, expected = (step_of(load_for_training(base, cache), size) for size in (32, 0))
    assert found["loss"] == expected["loss"]
    assert found["eval"] == expected["eval"]


class _Made(TorchDispatchMode):
    """Notes what is made, by shape."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [out] if isinstance(out, Tensor) else out if isinstance(out, tuple | list) else []
        self.shapes |= {tuple(part.shape) for part in results if isinstance(part, Tensor) and part.ndim}
        return out


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "gemma2", "phi3", "olmo3"])
def test_nothing_of_the_intermediate_size_is_there_for_all_tokens(name: str, prepared: Prepare) -> None:
    base, cache = prepared(name)
    for size in (0, 16):
        model = load_for_training(base, cache)
        widths = {linear.out_features for entry, linear in model.linears.items() if ".mlp." in entry}
        widths -= {base.config.hidden_size}
        assert widths
        with _Made() as made:
            step_of(model, size, lengths=(70, 80, 42))
        num_rows = {torch.Size(shape[:-1]).numel() for shape in made.shapes if shape[-1] in widths}
        assert (192 in num_rows) == (size == 0)
        assert (size in num_rows) == (size > 0)


@pytest.mark.parametrize("name, num_tiled, num_whole", [("llama", 3 + 3, 9), ("phi3", 2 + 2 + 2, 6)])
def test_how_often_weights_are_unpacked(
    name: str, num_tiled: int, num_whole: int, prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a pass, whatever the number of tiles; a fused layer that is computed again leaves its MLP to backward."""
    base, cache = prepared(name)
    real, unpacked = nf4.dequantize, []

    def counting(weight: nf4.NF4Weight, dtype: torch.dtype, row_scale_O: Tensor | None = None) -> Tensor:
        unpacked.append(weight.packed.data_ptr())
        return real(weight, dtype, row_scale_O)

    monkeypatch.setattr(nf4, "dequantize", counting)
    for size, expected in ((0, num_whole), (8, num_tiled)):
        model = load_for_training(base, cache)
        mlps = {linear.packed.data_ptr() for entry, linear in model.linears.items() if ".mlp." in entry}
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], "evaluate", lambda *_, **__: torch.zeros(()))
            unpacked.clear()
            step_of(model, size)
        assert sum(place in mlps for place in unpacked) == NUM_LAYERS * expected


def test_a_tile_that_fails_leaves_nothing_behind(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory runs out: the next try draws and unpacks as the first did."""
    base, cache = prepared("llama")
    expected = step_of(load_for_training(base, cache), 8, dropout=0.3)
    model = load_for_training(base, cache)
    calls = []

    def failing(gate_TI: Tensor, up_TI: Tensor, activation: str) -> Tensor:
        calls.append(gate_TI.shape)
        if len(calls) == 20:
            raise MemoryError("planted")
        return cast(Tensor, gated(gate_TI, up_TI, activation))

    monkeypatch.setattr(tiled, "gated", failing)
    with pytest.raises(MemoryError, match="planted") as raised:
        step_of(model, 8, dropout=0.3)
    assert all(linear.unpacked is None for linear in model.linears.values())
    assert model.of_tokens.tokens is None
    del raised
    require_same(step_of(model, 8, dropout=0.3), expected)


def test_bf16_adapters_add_up_in_fp32(prepared: Prepare) -> None:
    """Tiles of one token would lose most of it otherwise: each tile's share is a rounding error of the sum."""
    base, cache = prepared("llama")
    expected = step_of(load_for_training(base, cache), 0, dtype=torch.bfloat16)
    require_same(step_of(load_for_training(base, cache), 1, dtype=torch.bfloat16), expected)


def test_a_layer_that_cannot_be_cut_is_refused_by_name(prepared: Prepare) -> None:
    model = load_for_training(*prepared("phi3"))
    layer: Any = decoder_layers(model)[1]
    layer.mlp = layer.mlp.__dict__["_whole"]
    assert not can_tile(model)
    with pytest.raises(ConfigError, match="Phi3ForCausalLM"):
        tile_layers(model, 8)
    tile_layers(model, 0)


def test_what_is_called_an_mlp_and_does_more_is_not_cut() -> None:
    weight = nf4.quantize(torch.ones(64, 64), double_quant=False)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.act = NF4Linear(weight, None), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.act(self.down(x)))

    class WithNorm(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(64)

    class WithMore(Plain):
        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            return x

    class WithWeight(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("own", torch.ones(1))

    assert tiled.is_token_wise(Plain())
    assert not any(tiled.is_token_wise(other) for other in (WithNorm(), WithMore(), WithWeight(), nn.SiLU()))
