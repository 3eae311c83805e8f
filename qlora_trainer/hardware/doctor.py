"""What this machine is, what works on it and what does not, and what to do about it.

Nothing here fails: what is wrong is a finding. No network is asked, and no token is shown.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import psutil
import torch
from huggingface_hub import constants, get_token

from qlora_trainer.config.paths import file_system_kind
from qlora_trainer.errors import StorageError
from qlora_trainer.hardware.cache_folder import cache_folder
from qlora_trainer.hardware.control_group import memory_limit_bytes
from qlora_trainer.hardware.device import (
    BF16_COMPUTE_CAPABILITY,
    best_gemm_gflops,
    choose_compute_dtype,
    choose_cpu_dtype,
    choose_device,
    num_cpu_threads,
)
from qlora_trainer.hardware.memory import available_memory_bytes, total_memory_bytes
from qlora_trainer.hardware.row_kernels import NOT_INSTALLED, why_no_row_kernels
from qlora_trainer.hardware.trials import (
    NF4_ERROR,
    attention_error,
    is_paged_update_equal,
    nf4_error,
    row_kernel_error,
    update_error,
)
from qlora_trainer.hardware.unused_folders import num_bytes_of

Verdict = Literal["ok", "warn", "bad"]

PACKAGES = (
    "torch",
    "bitsandbytes",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "gguf",
    "pydantic",
)
QUICKSTART_MEMORY_BYTES = 2 * 2**30
QUICKSTART_DISK_BYTES = 2**30
ROOMY_DISK_BYTES = 20 * 2**30  # a 7B base in 16 bits (12.6 GiB) and its NF4 form (3.6 GiB)
FP32_ERROR = 1e-4  # relative; what is wrong is wrong by far more, what is right by 1e-6
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        value: what was found.
        verdict: "ok", "warn" (training works, with a drawback) or "bad" (it will not work).
        note: what follows from it, or what to do; empty where there is nothing to say.
    """

    name: str
    value: str
    verdict: Verdict
    note: str = ""


def examine() -> list[Finding]:
    """Look at versions, machine, memory, disks and speed, and try what training stands on; takes a few seconds."""
    device = choose_device()
    return [
        *_software(),
        *_machine(device),
        *_memory(device),
        *_disks(),
        *_speed(device),
        *_trials(device),
        _hub(),
    ]


def _software() -> Iterator[Finding]:
    yield Finding("python", platform.python_version(), "ok")
    for name in PACKAGES:
        try:
            yield Finding(name, version(name), "ok")
        except PackageNotFoundError:
            yield Finding(name, "not installed", "bad", f"Run: pip install {name}")


def _machine(device: torch.device) -> Iterator[Finding]:
    system = f"{platform.system()} {platform.release()}"
    if platform.system() != "Linux":
        yield Finding("system", system, "bad", "Linux is needed; on Windows, use WSL2.")
    elif "microsoft" in platform.release().lower():
        yield Finding("system", f"{system} (WSL)", "warn", "It pages badly: use a resident optimizer.")
    else:
        yield Finding("system", system, "ok")
    num_threads, num_cores = num_cpu_threads(), os.cpu_count() or 1
    note = "" if num_threads == num_cores else f"Of {num_cores} in the machine."
    yield Finding("processors", str(num_threads), "ok", note)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        value = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
        if (major, minor) >= BF16_COMPUTE_CAPABILITY:
            yield Finding("device", value, "ok", f"CUDA {torch.version.cuda}")
        else:
            yield Finding("device", value, "warn", "Before sm_80: float16, since bfloat16 is emulated.")
    elif _NVIDIA_DRIVER.exists():
        yield Finding("device", "CPU", "bad", "torch misses the GPU: install its CUDA build (pytorch.org).")
    else:
        yield Finding("device", "CPU", "ok", "No GPU: for small models.")


def _memory(device: torch.device) -> Iterator[Finding]:
    cpu = torch.device("cpu")
    yield _judge_memory("memory", available_memory_bytes(cpu), total_memory_bytes(cpu))
    limit_bytes = memory_limit_bytes()
    if limit_bytes is None:
        yield Finding("memory limit", "none", "ok")
    elif limit_bytes >= QUICKSTART_MEMORY_BYTES:
        yield Finding("memory limit", _gib(limit_bytes), "warn", "All that this process may take (control group).")
    else:
        note = f"Raise it (control group): the quickstart needs {_gib(QUICKSTART_MEMORY_BYTES)}."
        yield Finding("memory limit", _gib(limit_bytes), "bad", note)
    swap = psutil.swap_memory()
    value = f"{_gib(swap.used)} of {_gib(swap.total)} used" if swap.total else "none"
    if swap.used > swap.total / 2:
        yield Finding("swap", value, "warn", "Memory is short: close other programs.")
    else:
        yield Finding("swap", value, "ok")
    if device.type == "cuda":
        yield _judge_memory("device memory", available_memory_bytes(device), total_memory_bytes(device))


def _judge_memory(name: str, available_bytes: int, total_bytes: int) -> Finding:
    value = f"{_gib(available_bytes)} of {_gib(total_bytes)} free"
    if available_bytes >= QUICKSTART_MEMORY_BYTES:
        return Finding(name, value, "ok")
    note = f"Close other programs: the quickstart needs {_gib(QUICKSTART_MEMORY_BYTES)}."
    return Finding(name, value, "bad", note)


def _disks() -> Iterator[Finding]:
    try:
        yield _judge_disk("cache folder", cache_folder(), "Set XDG_CACHE_HOME to a larger disk.")
        value = f"{_gib(num_bytes_of(cache_folder()))} of bases, NF4 weights and tokens"
        yield Finding(
            "cache size", value, "ok", f"To empty it: rm -r {cache_folder()} (all is made again when needed)."
        )
    except StorageError as error:
        yield Finding("cache folder", error.short, "bad", error.fix)
    yield _judge_disk("this folder", Path.cwd(), "Set output.dir to a larger disk.")


def _judge_disk(name: str, folder: Path, fix: str) -> Finding:
    free_bytes = shutil.disk_usage(folder).free
    value = f"{_gib(free_bytes)} free on {file_system_kind(folder)}"
    if free_bytes < QUICKSTART_DISK_BYTES:
        return Finding(name, value, "bad", f"{folder}: the quickstart takes {_gib(QUICKSTART_DISK_BYTES)}. {fix}")
    if free_bytes < ROOMY_DISK_BYTES:
        return Finding(name, value, "warn", f"{folder}: a 7B base takes {_gib(ROOMY_DISK_BYTES)}. {fix}")
    return Finding(name, value, "ok", str(folder))


def _speed(device: torch.device) -> Iterator[Finding]:
    if device.type == "cuda":
        yield Finding("compute dtype", choose_compute_dtype(device), "ok", "What auto takes on this GPU.")
        return
    gflops = best_gemm_gflops()
    for name, speed in gflops.items():
        yield Finding(f"{name} products", f"{speed:.0f} GFLOP/s", "ok")
    dtype, reason = choose_cpu_dtype(gflops)
    if reason is None:
        yield Finding("compute dtype", dtype, "ok", "What auto takes: the faster one.")
    else:
        yield Finding("compute dtype", dtype, "warn", f"What auto takes: the faster one computes wrongly, {reason}.")


def _trials(device: torch.device) -> Iterator[Finding]:
    trials: dict[str, Callable[[], tuple[str, Verdict, str]]] = {
        "NF4": lambda: _try_nf4(device),
        "attention": lambda: _judge_error(attention_error(device, window=0, softcap=0.0)),
        "windowed attention": lambda: _judge_error(attention_error(device, window=8, softcap=5.0)),
        "AdamW 32 bits": lambda: _judge_error(update_error(device, bits=32)),
        "AdamW 8 bits": lambda: _judge_error(update_error(device, bits=8)),
        "paged AdamW 32 bits": lambda: _try_paging(device, bits=32),
        "paged AdamW 8 bits": lambda: _try_paging(device, bits=8),
    }
    if device.type == "cuda":
        trials["fused kernels"] = lambda: _try_row_kernels(device)
    for name, attempt in trials.items():
        try:
            value, verdict, note = attempt()
        # What a library that does not fit this machine raises: a missing symbol, a missing file, a failing kernel.
        except (AttributeError, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            value, verdict, note = f"fails: {reason}", "bad", "Reinstall torch and bitsandbytes for this machine."
        yield Finding(name, value, verdict, note)


def _try_nf4(device: torch.device) -> tuple[str, Verdict, str]:
    error = nf4_error(device)
    if abs(error - NF4_ERROR) <= 0.05 * NF4_ERROR:
        return f"works (loses {error:.1%})", "ok", ""
    return f"loses {error:.1%}, not {NF4_ERROR:.1%}", "bad", "Computed wrongly: reinstall bitsandbytes."


def _judge_error(error: float) -> tuple[str, Verdict, str]:
    if error <= FP32_ERROR:  # a NaN is not
        return f"works (error {error:.0e})", "ok", ""
    return f"relative error {error:.0e}", "bad", "Computed wrongly: reinstall torch and bitsandbytes."


def _try_paging(device: torch.device, *, bits: int) -> tuple[str, Verdict, str]:
    try:
        is_equal = is_paged_update_equal(device, bits=bits, folder=Path.cwd())
    except StorageError as error:
        return f"not here: {error.found}", "warn", error.fix
    if is_equal:
        return "works (bit-equal)", "ok", ""
    return "differs from resident", "bad", f"Set training.optimizer to adamw_{bits}bit."


def _try_row_kernels(device: torch.device) -> tuple[str, Verdict, str]:
    reason = why_no_row_kernels(device)
    if reason is None:
        return _judge_error(row_kernel_error(device))
    needed = "a C compiler and Python's headers (such as gcc and python3-dev)"
    if reason == NOT_INSTALLED:
        needed = next((name for name in requires("torch") or () if name.startswith("triton")), "triton").split(";")[0]
    return f"not here: {reason}", "warn", f"Steps are slower and take more memory; install {needed.strip()}."


def _hub() -> Finding:
    has_token = get_token() is not None
    value = "a token is set" if has_token else "no token"
    if constants.HF_HUB_OFFLINE:
        return Finding("model hub", f"offline, {value}", "warn", "HF_HUB_OFFLINE: only what is cached.")
    return Finding("model hub", value, "ok", "" if has_token else "For gated models only: hf auth login")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
