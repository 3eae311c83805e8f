"""LoRA+: B has its own learning rate, in pieces that never mix the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

from qlora_trainer.step import optimizer as optimizer_module
from qlora_trainer.step.optimizer import BLOCK_ELEMENTS, AdapterOptimizer
from tests.step.recorded import SHAPES, copied_state, differing, make_parameters, make_settings, run_steps

RATE, RATIO, DECAY = 1e-3, 16.0, 0.1
# A and B in turns, as in a model; the last is DoRA's.
ALL_SHAPES: dict[str, tuple[int, ...]] = {**SHAPES, "up.lora_magnitude_vector": (512,)}
FAST = [name for name in ALL_SHAPES if not name.endswith("lora_A")]


def trained(
    folder: Path, ratio: float, rate: float, bits: int, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], AdapterOptimizer]:
    parameters = make_parameters(dtype, ALL_SHAPES)
    settings = make_settings(bits=bits, weight_decay=0.1, paging_folder=folder, rate_ratio=ratio)
    optimizer = AdapterOptimizer(parameters, settings)
    run_steps(optimizer, parameters, range(5), rate)
    state = copied_state(optimizer)
    return state | {name: own.detach().clone() for name, own in parameters.items()}, optimizer


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks_in_a_piece", [1, 3, 4096])
def test_each_matrix_goes_as_if_all_had_its_rate(
    tmp_path: Path, bits: int, dtype: torch.dtype, blocks_in_a_piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_module, "CPU_PIECE_ELEMENTS", blocks_in_a_piece * BLOCK_ELEMENTS)
    found, _ = trained(tmp_path, RATIO, RATE, bits, dtype)
    slow, _ = trained(tmp_path, 1.0, RATE, bits, dtype)
    fast, _ = trained(tmp_path, 1.0, RATE * RATIO, bits, dtype)
    expected = {name: (fast if name.startswith(tuple(FAST)) else slow)[name] for name in found}
    assert differing(found, expected) == []
    assert set(differing(found, slow)) >= set(FAST)


def test_pieces_stay_large(tmp_path: Path) -> None:
    _, one_rate = trained(tmp_path, 1.0, RATE, 32)
    _, two_rates = trained(tmp_path, RATIO, RATE, 32)
    assert len(one_rate._pieces) == 1
    assert [piece.rate_ratio for piece in two_rates._pieces] == [1.0, RATIO]
    assert one_rate.num_bytes == two_rates.num_bytes


def test_a_state_goes_from_one_ratio_to_another(tmp_path: Path) -> None:
    """State is by name, so that a resume may ask for another ratio: it lies elsewhere then."""
    _, before = trained(tmp_path, 1.0, RATE, 8)
    parameters = make_parameters(torch.bfloat16, ALL_SHAPES)
    after = AdapterOptimizer(parameters, make_settings(bits=8, paging_folder=tmp_path, rate_ratio=RATIO))
    after.load_state_dict(before.state_dict())
    assert differing(after.state_dict(), before.state_dict()) == []


@pytest.mark.parametrize("ratio", [1.0, RATIO])
@pytest.mark.parametrize("bits", [32, 8])
def test_trained_biases_and_norms_do_not_decay_and_all_else_does(tmp_path: Path, bits: int, ratio: float) -> None:
    """Some among the others, as in a model; a pretrained one is lost where it is pulled to 0."""
    shapes = {
        "q.lora_A": (4, 300),
        "q.bias": (257,),
        **ALL_SHAPES,
        "q.lora_B_bias": (5,),
        "lm_head.bias": (3,),
        "norm.weight": (9,),
    }
    vectors = {"q.bias", "q.lora_B_bias", "lm_head.bias", "norm.weight"}
    found = {}
    for decay in (0.0, 0.5):
        parameters = make_parameters(torch.float32, shapes)
        settings = make_settings(bits=bits, weight_decay=decay, paging_folder=tmp_path, rate_ratio=ratio)
        optimizer = AdapterOptimizer(parameters, settings)
        assert [piece.weight_decay for piece in optimizer._pieces][-1] == 0.0
        run_steps(optimizer, parameters, range(3), RATE)
        found[decay] = {name: own.detach().clone() for name, own in parameters.items()}
    assert set(differing(found[0.5], found[0.0])) == shapes.keys() - vectors
    begun = {name: own.detach() for name, own in make_parameters(torch.float32, shapes).items()}
    assert set(differing(found[0.5], begun)) == shapes.keys()


@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_which_weights_have_their_own_rate_and_no_decay_is_as_in_peft(variant: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)
            self.norm = nn.LayerNorm(8, bias=False)
            self.lm_head = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.lm_head(self.norm(self.up(x)))
            return out

    asked: dict[str, Any] = {"target_modules": ["up"], "modules_to_save": ["lm_head", "norm"]}
    asked |= {"bias": "lora_only"}
    asked[variant] = True
    wrapped = peft.get_peft_model(Model(), peft.LoraConfig(**asked))
    theirs = create_loraplus_optimizer(
        wrapped,
        optimizer_cls=torch.optim.AdamW,
        lr=RATE,
        loraplus_lr_ratio=RATIO,
        loraplus_weight_decay=DECAY,
    )
    terms = {
        id(own): (group["lr"] / RATE, group["weight_decay"]) for group in theirs.param_groups for own in group["params"]
    }
    names = {name: own for name, own in wrapped.named_parameters() if own.requires_grad}
    assert len(names) == 7
    settings = make_settings(weight_decay=DECAY, rate_ratio=RATIO)
    for name, parameter in names.items():
        ours = optimizer_module._terms_of(
            name.removesuffix(".default.weight").replace(".lora_B.default.bias", ".lora_B_bias"),
            parameter.shape,
            settings,
        )
        assert ours == pytest.approx(terms[id(parameter)]), name
