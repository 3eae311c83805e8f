"""The loss over tiles, norm included, against the norm and the loss over all positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.model.final_norm import FinalNorm, deferred
from qlora_trainer.model.frozen import FrozenHead
from qlora_trainer.model.quantized import LogitShape
from qlora_trainer.step.loss import chunked_cross_entropy
from qlora_trainer.step.tiled_loss import tiled_cross_entropy
from tests.hardware.profiled_memory import allocated_by
from tests.model.tiny_models import relative_error

NUM_TOKENS, NUM_HIDDEN, VOCABULARY = 200, 32, 96


def inputs(num_tokens: int = NUM_TOKENS) -> tuple[Tensor, Tensor, Tensor, FinalNorm, FrozenHead]:
    """Every third position is not learned from."""
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(num_tokens, NUM_HIDDEN, generator=generator)
    positions_N = torch.tensor([place for place in range(num_tokens) if place % 3])
    targets_N = torch.randint(0, VOCABULARY, positions_N.shape, generator=generator)
    norm = nn.RMSNorm(NUM_HIDDEN)
    norm.weight.data.uniform_(0.5, 2.0, generator=generator)
    head = FrozenHead(torch.randn(VOCABULARY, NUM_HIDDEN, generator=generator).bfloat16(), None)
    return hidden_TH.requires_grad_(), positions_N, targets_N, FinalNorm(norm.requires_grad_(False)), head


@pytest.mark.parametrize("tile_tokens", [7, 16, 48, 1000])
@pytest.mark.parametrize("shape", [LogitShape(1.0, 0.0), LogitShape(0.5, 20.0)])
@pytest.mark.parametrize("gradient_scale", [None, 3.0])
def test_loss_and_gradient_are_those_of_all_at_once(
    tile_tokens: int, shape: LogitShape, gradient_scale: float | None
) -> None:
    hidden_TH, positions_N, targets_N, norm, head = inputs()
    scale = None if gradient_scale is None else torch.tensor(gradient_scale)
    whole = chunked_cross_entropy(
        norm(hidden_TH).index_select(0, positions_N), targets_N, head, shape, chunk_tokens=16, gradient_scale=scale
    )
    (expected_TH,) = torch.autograd.grad(whole / 7, hidden_TH)
    tiled = tiled_cross_entropy(
        hidden_TH,
        positions_N,
        targets_N,
        norm,
        head,
        shape,
        tile_tokens=tile_tokens,
        chunk_tokens=16,
        gradient_scale=scale,
    )
    (found_TH,) = torch.autograd.grad(tiled / 7, hidden_TH)
    assert relative_error(tiled.detach(), whole.detach()) <= 1e-6
    assert relative_error(found_TH, expected_TH) <= 1e-6
    assert bool((found_TH[::3] == 0).all())  # what is not learned from
    if tile_tokens % 16 == 0:
        assert torch.equal(tiled, whole)


def test_without_gradients_none_are_made() -> None:
    hidden_TH, positions_N, targets_N, norm, head = inputs()
    with torch.no_grad():
        loss = tiled_cross_entropy(
            hidden_TH, positions_N, targets_N, norm, head, LogitShape(1.0, 0.0), tile_tokens=16, chunk_tokens=16
        )
    assert not loss.requires_grad


def test_beside_the_hidden_states_there_is_their_gradient_and_a_tile() -> None:
    hidden_TH, positions_N, targets_N, norm, head = inputs(num_tokens=30_000)

    def step() -> None:
        loss = tiled_cross_entropy(
            hidden_TH, positions_N, targets_N, norm, head, LogitShape(1.0, 0.0), tile_tokens=64, chunk_tokens=64
        )
        loss.backward()
        hidden_TH.grad = None

    assert allocated_by(step).peak_bytes < 1.1 * hidden_TH.nbytes


def fail_meanwhile(norm: FinalNorm, hidden_TH: Tensor) -> None:
    with deferred(norm):
        assert norm(hidden_TH) is hidden_TH
        raise MemoryError


def test_a_norm_is_deferred_for_as_long_as_it_is_asked_for() -> None:
    hidden_TH, *_, norm, _head = inputs()
    assert [name for name, _ in norm.named_parameters()] == ["weight"]  # as in a checkpoint
    with pytest.raises(MemoryError):
        fail_meanwhile(norm, hidden_TH)
    assert torch.equal(norm(hidden_TH), norm.apply_to(hidden_TH))
    assert not torch.equal(norm(hidden_TH), hidden_TH)
