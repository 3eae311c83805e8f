"""Side streams: the one of a CPU copies at once, and the late one of the tests shows whoever does not wait for it."""

from __future__ import annotations

import pytest
import torch

from qlora_trainer.hardware.side_stream import SideStream
from tests.hardware.late_stream import LateStream

CPU = torch.device("cpu")


def test_on_a_cpu_a_copy_is_done_at_once() -> None:
    stream, to = SideStream(CPU), torch.zeros(3)
    stream.copy(to, torch.ones(3))
    assert to.tolist() == [1.0, 1.0, 1.0]
    stream.join()
    assert not stream.host_memory(5, torch.float16).is_pinned()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_late_copy_is_nan_before_it_is_joined(dtype: torch.dtype) -> None:
    stream, to, source = LateStream(CPU), torch.zeros(2, 4, dtype=dtype), torch.arange(8).to(dtype).view(4, 2).T
    stream.copy(to, source)
    assert bool(to.isnan().all())
    stream.join()
    assert torch.equal(to, source)


def test_a_late_copy_takes_what_is_there_when_it_is_done() -> None:
    stream, to, source = LateStream(CPU), torch.zeros(4), torch.ones(6)
    stream.copy(to, source[2:])
    source.fill_(7.0)
    stream.join()
    assert to.tolist() == [7.0] * 4
    stream.copy(to, source[:4])
    del source
    stream.join()
    assert bool(to.isnan().all())
