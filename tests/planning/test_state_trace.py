"""Many pieces of an optimizer's state are a line through two numbers of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch

from qlora_trainer.hardware.python_accelerator import python_accelerator
from qlora_trainer.planning.state_trace import SOME_PIECES, StateTrace, trace_state, trace_whole_state
from qlora_trainer.step.optimizer import CPU_PIECE_ELEMENTS, GPU_PIECE_ELEMENTS


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("kind, is_on_host", [("cpu", False), ("accelerator", False), ("accelerator", True)])
def test_the_line_meets_what_a_whole_trace_finds(bits: Literal[8, 32], kind: str, is_on_host: bool) -> None:
    """Three times as many pieces as were traced, and a part of one.

    Mutations tried: a number of pieces of the other device; the peak's categories taken from the larger trace.
    """
    device = torch.device("cpu") if kind == "cpu" else python_accelerator()
    assert device is not None
    piece_elements = CPU_PIECE_ELEMENTS if is_on_host or kind == "cpu" else GPU_PIECE_ELEMENTS
    num_elements = 3 * SOME_PIECES * piece_elements + 256 * 77

    def found(trace: Callable[..., StateTrace]) -> StateTrace:
        return trace(
            num_elements,
            bits=bits,
            adapter_dtype=torch.bfloat16,
            device=device,
            alignment_bytes=512,
            is_on_host=is_on_host,
        )

    assert found(trace_state) == found(trace_whole_state)
