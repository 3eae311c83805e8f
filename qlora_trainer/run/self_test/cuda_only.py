"""What only a CUDA device can show: kernels that are compiled for it, managed memory, copies beside its work."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qlora_trainer.hardware.paging import is_paged, zeros_paged
from qlora_trainer.hardware.row_kernels import has_row_kernels
from qlora_trainer.hardware.side_stream import SideStream
from qlora_trainer.model import row_ops
from qlora_trainer.run.self_test.check import Check, attempted, judged

_EPS, _MAX_ERROR = 1e-6, 1e-6
_ROWS_SHAPE = (37, 1000)  # no powers of two
_NUM_ELEMENTS = 2**20  # of what is paged and copied: 4 MiB
_NUM_PRODUCTS, _PRODUCT_SIZE = 20, 1024  # some milliseconds of a device, a thousand times what queueing them takes


def cuda_checks(device: torch.device, folder: Path) -> Iterator[Check]:
    """One check each; on a CPU they are named all the same, so that nobody takes its report for more than it is.

    Args:
        device: that trains.
        folder: on a disk, for what stands for managed memory elsewhere.
    """
    checks: dict[str, Callable[[], Check]] = {
        "CUDA kernels": lambda: check_row_kernels("CUDA kernels", device),
        "managed memory": lambda: check_managed_memory("managed memory", device, folder),
        "copies on a side stream": lambda: check_side_stream("copies on a side stream", SideStream(device)),
    }
    for name, check in checks.items():
        if device.type == "cpu":
            yield Check(name, "not on this device", "a CPU", "a CUDA device")
        else:
            yield from attempted(name, check)


def check_row_kernels(name: str, device: torch.device) -> Check:
    """A norm of rows as layers take it, by the compiled kernel where there is one, against its formula in fp64."""
    x_TH, weight_H = _numbers(_ROWS_SHAPE[0] * _ROWS_SHAPE[1]).view(_ROWS_SHAPE), _numbers(_ROWS_SHAPE[1])
    found_TH, _ = row_ops.rms_norm(x_TH.to(device), weight_H.to(device), _EPS, 0.0)
    rms_T1 = (x_TH.double().square().mean(-1, keepdim=True) + _EPS).sqrt()
    expected_TH = x_TH.double() / rms_T1 * weight_H.double()
    error = float(
        torch.linalg.vector_norm(found_TH.cpu().double() - expected_TH) / torch.linalg.vector_norm(expected_TH)
    )
    how = "one kernel" if has_row_kernels(device) else "several kernels"
    return judged(
        name, is_right=error <= _MAX_ERROR, found=f"{how}, error {error:.1e}", expected=f"at most {_MAX_ERROR:.0e}"
    )


def check_managed_memory(name: str, device: torch.device, folder: Path) -> Check:
    """The device computes in it, and the driver says that it is managed; of other memory it does not."""
    paged = zeros_paged(_NUM_ELEMENTS, dtype=torch.float32, device=device, folder=folder)
    numbers = _numbers(_NUM_ELEMENTS)
    paged.add_(numbers.to(device)).mul_(2.0)
    is_equal = torch.equal(paged.cpu(), 2.0 * numbers)
    is_told = is_paged(paged) and not is_paged(numbers.to(device))
    found = f"{'managed' if is_told else 'not managed'}, values {'equal' if is_equal else 'differ'}"
    return judged(name, is_right=is_told and is_equal, found=found, expected="managed, values equal")


def check_side_stream(name: str, stream: SideStream) -> Check:
    """There and back between device and pinned host memory, without a wait of the host.

    What is copied is written only behind a row of products, and written over as soon as it was sent: a copy that does
    not wait for the device, or for which the device does not wait, takes other values along.
    """
    device = stream.device
    numbers, busy = _numbers(_NUM_ELEMENTS).to(device), torch.ones(_PRODUCT_SIZE, _PRODUCT_SIZE, device=device)
    leaving, arrived = torch.zeros_like(numbers), torch.zeros_like(numbers)
    host = stream.host_memory(_NUM_ELEMENTS, numbers.dtype)
    with _no_wait(device):
        for _ in range(_NUM_PRODUCTS):
            busy = busy @ busy / _PRODUCT_SIZE
        torch.mul(numbers, busy.view(-1)[:1], out=leaving)  # by 1
        stream.copy(host, leaving)
        stream.join()
        leaving.zero_()
        stream.copy(arrived, host)
        stream.join()
        found = arrived.clone()
    is_equal = torch.equal(found, numbers)
    is_pinned = device.type != "cuda" or host.is_pinned()
    told = f"{'pinned' if is_pinned else 'pageable'} host memory, values {'equal' if is_equal else 'differ'}"
    return judged(name, is_right=is_equal and is_pinned, found=told, expected="pinned host memory, values equal")


@contextmanager
def _no_wait(device: torch.device) -> Iterator[None]:
    """While active, torch raises (RuntimeError) where it would let the host wait for a CUDA device."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # Once a process it says of itself that it does not see every wait; it sees blocking copies.
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _numbers(count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count))
