"""Many pieces of an optimizer's state are a line through two numbers of them."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from qlora_trainer.hardware.python_accelerator import python_accelerator
from qlora_trainer.planning.state_trace import SOME_PIECES, StateForm, trace_state, trace_whole_state


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("kind, is_on_host", [("cpu", False), ("accelerator", False), ("accelerator", True)])
def test_the_line_meets_what_a_whole_trace_finds(bits: Literal[8, 32], kind: str, is_on_host: bool) -> None:
    """Three times as many pieces as were traced, and a part of one.

    Mutations tried: a number of pieces of the other device; the peak's categories taken from the larger trace.
    """
    device = torch.device("cpu") if kind == "cpu" else python_accelerator()
    assert device is not None
    form = StateForm(bits=bits, adapter_dtype=torch.bfloat16, device=device, alignment_bytes=512, is_on_host=is_on_host)
    num_elements = 3 * SOME_PIECES * form.piece_elements + 256 * 77
    assert trace_state(num_elements, form) == trace_whole_state(num_elements, form)
