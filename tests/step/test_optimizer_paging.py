"""Paged optimizer state on a CPU leaves memory: asked to, and because there is not enough."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.step.optimizer import AdapterOptimizer
from tests.hardware.kernel_memory import page_out, share_in_memory
from tests.hardware.memory_group import can_limit_memory, memory_group
from tests.step.paged_updates import NUM_ELEMENTS, STATE_BYTES, digest_of_updates
from tests.step.recorded import differing, make_parameters, make_settings, run_steps

REPOSITORY = Path(__file__).parents[2]
RATE = 1e-3
# In memory must be: weights, gradients, and the temporaries of one piece (20 MiB) with its pages.
LIMIT_BYTES = (2 + 4) * NUM_ELEMENTS + 2**26


@pytest.mark.parametrize("bits", [32, 8])
def test_state_leaves_memory_and_the_next_updates_are_the_same(disk_folder: Path, bits: int) -> None:
    shapes = {"weight": (512, 1024)}
    expected = make_parameters(torch.bfloat16, shapes)
    resident = AdapterOptimizer(expected, make_settings(bits=bits))
    run_steps(resident, expected, range(6), RATE)

    parameters = make_parameters(torch.bfloat16, shapes)
    paged = AdapterOptimizer(parameters, make_settings(bits=bits, residency="paged", paging_folder=disk_folder))
    buffers = [paged.state_dict()[f"weight.{name}"] for name in ("master", "state1", "state2")]
    for step in range(6):
        run_steps(paged, parameters, [step], RATE)
        assert [share_in_memory(buffer) for buffer in buffers] == [1.0, 1.0, 1.0]
        for buffer in buffers:
            page_out(buffer)
        # Not exactly none: the kernel keeps the last few pages of each processor in a batch that it does not touch.
        assert max(share_in_memory(buffer) for buffer in buffers) < 0.1

    assert differing(paged.state_dict(), resident.state_dict()) == []
    assert torch.equal(parameters["weight"], expected["weight"])


def test_a_loaded_state_is_still_paged(disk_folder: Path) -> None:
    shapes = {"weight": (512, 1024)}
    parameters = make_parameters(torch.bfloat16, shapes)
    paged = AdapterOptimizer(parameters, make_settings(residency="paged", paging_folder=disk_folder))
    run_steps(paged, parameters, range(2), RATE)

    paged.load_state_dict({name: tensor.clone() for name, tensor in paged.state_dict().items()})
    run_steps(paged, parameters, range(2, 4), RATE)

    for name in ("master", "state1", "state2"):
        buffer = paged.state_dict()[f"weight.{name}"]
        page_out(buffer)
        assert share_in_memory(buffer) == 0.0


def start(residency: str, folder: Path) -> subprocess.Popen[str]:
    command: list[Any] = [sys.executable, "-m", "tests.step.paged_updates", residency, folder]
    return subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(not can_limit_memory(), reason="this machine lets this user make no memory-limited control group")
def test_a_process_with_less_memory_than_its_state_still_updates_it(disk_folder: Path) -> None:
    assert LIMIT_BYTES < 6 * NUM_ELEMENTS + STATE_BYTES
    expected = digest_of_updates("device", disk_folder)

    with memory_group(LIMIT_BYTES) as group_of_paged, memory_group(LIMIT_BYTES) as group_of_resident:
        paged, resident = start("paged", disk_folder), start("device", disk_folder)
        for process, group in ((paged, group_of_paged), (resident, group_of_resident)):
            assert process.stdout is not None
            assert process.stdout.readline() == "imported\n"
            group.add(process.pid)
        printed, _ = paged.communicate("go\n", timeout=120)
        resident.communicate("go\n", timeout=120)

    assert paged.returncode == 0
    assert printed.strip() == expected
    assert resident.returncode == -signal.SIGKILL  # the same limit is too little for state that cannot leave
    assert list(disk_folder.iterdir()) == []
