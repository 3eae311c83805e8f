"""The row kernels compute what the CPU's operations do, each in one launch, and compile for GPUs without spilling.

Triton reads TRITON_INTERPRET when it is imported, and importing it enlarges a process whose memory other tests measure:
both are done in children.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("75", "80", "86", "89", "90", "120")
WIDTHS = "576,4096,8192,14336,16384"
# The interpreter cuts fp32 off where a GPU rounds it to bf16: then one rounding is a whole spacing.
MOST_ERROR = {"torch.float32": 1e-6, "torch.bfloat16": 1.0, "torch.float16": 0.5}
# Rows that each program of width 4096 loads and stores (of a flat kernel, blocks); more would be read or written twice.
LOADED_AND_STORED = {
    "rms_norm": (2, 1),
    "rms_norm_again": (2, 1),
    "rms_norm_backward": (3, 1),
    "rms_norm_backward added": (4, 1),
    **{f"gated {name}": (2, 1) for name in ("silu", "gelu", "gelu_tanh")},
    **{f"gated_backward {name}": (3, 3) for name in ("silu", "gelu", "gelu_tanh")},
}


def run(module: str, *arguments: str, **environment: str) -> Any:
    """What a child prints as JSON."""
    child = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout)


def compiled(folder: Path, architectures: str, widths: str, dtypes: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run(
        "tests.hardware.compiled_rows", architectures, widths, dtypes, TRITON_CACHE_DIR=str(folder)
    )
    return found


def test_kernels_compute_what_the_cpu_does_and_round_once(tmp_path: Path) -> None:
    results = run("tests.hardware.computed_rows", "cpu", TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(tmp_path))

    assert len(results) > 500
    assert [result for result in results if not result["error"] <= MOST_ERROR[result["dtype"]]] == []


@pytest.mark.gpu
def test_a_gpu_computes_what_the_cpu_does_and_rounds_once_to_the_nearest(tmp_path: Path) -> None:
    results = run("tests.hardware.computed_rows", "cuda", TRITON_CACHE_DIR=str(tmp_path))

    most_error = MOST_ERROR | {"torch.bfloat16": 0.5}
    assert [result for result in results if not result["error"] <= most_error[result["dtype"]]] == []


def test_kernels_compile_without_a_gpu_and_read_and_write_once(tmp_path: Path) -> None:
    found = compiled(tmp_path, "80", "4096", "bf16")

    assert [kernel for kernel in found if kernel["spilled_bytes"] or kernel["truncates"]] == []
    accessed = {kernel["operation"]: kernel["accessed"] for kernel in found}
    for operation, (num_loaded, num_stored) in LOADED_AND_STORED.items():
        row_bytes = 2 * (1024 if operation.startswith("gated") else 4096)
        assert accessed[operation] == {"ld": num_loaded * row_bytes, "st": num_stored * row_bytes}, operation


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_on_any_gpu(tmp_path: Path, architecture: str) -> None:
    found = compiled(tmp_path, architecture, WIDTHS, "bf16,fp16,fp32")

    assert len(found) == 5 * 3 * 11
    assert [kernel for kernel in found if kernel["spilled_bytes"] or kernel["truncates"]] == []


@pytest.mark.slow
def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    """Rows of twice the widest are too much for the registers."""
    found = compiled(tmp_path, "80", "32768", "fp32")

    assert [kernel["operation"] for kernel in found if kernel["spilled_bytes"]] == [
        "rms_norm",
        "rms_norm_backward",
        "rms_norm_backward added",
    ]
