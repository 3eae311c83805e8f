"""A few updates of 8 million adapter elements, as a process of their own: see `test_optimizer_paging`.

    python -m tests.step.paged_updates device|paged FOLDER

Says so when the imports are done and waits for a line on stdin, so that the caller can limit what this process takes
from then on; then prints a digest of the weights and of the optimizer state.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from qlora_trainer.step.optimizer import AdapterOptimizer, OptimizerSettings

NUM_ELEMENTS = 8 * 2**20
NUM_UPDATES = 2
STATE_BYTES = 3 * 4 * NUM_ELEMENTS  # master and two moments, fp32


def digest_of_updates(residency: Literal["device", "paged"], folder: Path) -> str:
    """SHA-256 of weights and state after two updates in 32 bits."""
    parameter = nn.Parameter(torch.linspace(-1, 1, NUM_ELEMENTS).bfloat16())
    parameter.grad_dtype = torch.float32
    settings = OptimizerSettings(bits=32, residency=residency, weight_decay=0.01, paging_folder=folder)
    optimizer = AdapterOptimizer({"weight": parameter}, settings)
    for step in range(NUM_UPDATES):
        optimizer.gradient.fill_(0.5 - step).mul_(1e-3)
        optimizer.update(1e-3)
    digest = hashlib.sha256(parameter.detach().view(torch.int16).numpy().data)
    for tensor in optimizer.state_dict().values():
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("imported", flush=True)
    sys.stdin.readline()
    chosen: Literal["device", "paged"] = "paged" if sys.argv[1] == "paged" else "device"
    print(digest_of_updates(chosen, Path(sys.argv[2])))
