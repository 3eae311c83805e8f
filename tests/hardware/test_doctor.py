"""`examine` sees what works, and turns what does not into a finding with something to do."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from huggingface_hub import constants

from qlora_trainer.errors import StorageError
from qlora_trainer.hardware import doctor, trials
from qlora_trainer.hardware.causal_attention import attend
from qlora_trainer.hardware.doctor import PACKAGES, Finding, examine
from qlora_trainer.hardware.paging import zeros_paged
from qlora_trainer.hardware.quant_library import bitsandbytes

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
GIB = 2**30


@pytest.fixture(autouse=True)
def quiet_machine(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder on a disk, a cache of its own, and speeds that are not measured anew in every test."""
    monkeypatch.chdir(disk_folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk_folder / "cache"))
    monkeypatch.setattr(doctor, "best_gemm_gflops", lambda: {"float32": 200.0, "bfloat16": 100.0})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "get_token", lambda: None)


def examined() -> dict[str, Finding]:
    return {finding.name: finding for finding in examine()}


def test_everything_that_training_stands_on_works_here() -> None:
    findings = examined()

    expected = {
        "python",
        "system",
        "processors",
        "device",
        "memory",
        "memory limit",
        "swap",
        "cache folder",
        "cache size",
    }
    expected |= {"this folder", "float32 products", "bfloat16 products", "compute dtype", "NF4", "attention"}
    expected |= {"windowed attention", "AdamW 32 bits", "AdamW 8 bits", "paged AdamW 32 bits", "paged AdamW 8 bits"}
    assert expected | set(PACKAGES) | {"model hub"} == findings.keys()
    for name in ("NF4", "attention", "windowed attention", "AdamW 32 bits", "AdamW 8 bits", *PACKAGES):
        assert findings[name].verdict == "ok", findings[name]
    for name in ("paged AdamW 32 bits", "paged AdamW 8 bits"):
        assert findings[name] == Finding(name, "works (bit-equal)", "ok")
    assert findings["compute dtype"].value == "float32"


def test_it_takes_seconds_and_leaves_nothing(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with real speeds
    monkeypatch.chdir(disk_folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk_folder / "cache"))
    generator_state = torch.get_rng_state()
    start = time.process_time()  # of this process: where cores are shared, the clock on the wall says little

    findings = examined()

    assert time.process_time() - start < 10
    assert [path.name for path in disk_folder.iterdir()] == ["cache"]
    assert torch.equal(torch.get_rng_state(), generator_state)
    speeds = {name: float(findings[f"{name} products"].value.split()[0]) for name in ("float32", "bfloat16")}
    assert findings["compute dtype"].value == max(speeds, key=lambda name: speeds[name])


def test_every_problem_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=2**20))
    monkeypatch.setattr(doctor, "available_memory_bytes", lambda _device: GIB)
    monkeypatch.setattr(doctor, "memory_limit_bytes", lambda: GIB)
    monkeypatch.setattr(doctor, "nf4_error", lambda _device: 0.5)
    monkeypatch.setattr(doctor, "update_error", lambda _device, bits: float("nan"))
    monkeypatch.setattr(doctor, "is_paged_update_equal", lambda _device, bits, folder: False)

    findings = examined()

    bad = {name for name, finding in findings.items() if finding.verdict == "bad"}
    expected = {"no-such-package", "cache folder", "this folder", "memory", "memory limit", "NF4"}
    expected |= {f"{kind} {bits} bits" for kind in ("AdamW", "paged AdamW") for bits in (32, 8)}
    assert bad == expected
    assert all(finding.note for finding in findings.values() if finding.verdict != "ok")
    assert "pip install no-such-package" in findings["no-such-package"].note
    assert "adamw_8bit" in findings["paged AdamW 8 bits"].note


@pytest.mark.parametrize("error", [RuntimeError("no\nkernel"), AttributeError("cadam"), OSError("lib.so")])
def test_a_trial_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_arguments: Any, **_options: Any) -> float:
        raise error

    monkeypatch.setattr(doctor, "nf4_error", fail)

    finding = examined()["NF4"]

    assert finding.verdict == "bad"
    assert finding.value == "fails: " + " ".join(str(error).split())
    assert "Reinstall" in finding.note


def test_a_folder_that_paging_is_useless_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_device: torch.device, *, bits: int, folder: Path) -> bool:
        raise StorageError(where=str(folder), found="a tmpfs", expected="a disk", fix="Set memory.paging_dir.")

    monkeypatch.setattr(doctor, "is_paged_update_equal", refuse)

    finding = examined()["paged AdamW 8 bits"]

    assert (finding.value, finding.verdict, finding.note) == ("not here: a tmpfs", "warn", "Set memory.paging_dir.")


def test_a_cache_folder_that_cannot_be_made_is_told(disk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (disk_folder / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk_folder / "file"))

    finding = examined()["cache folder"]

    assert finding.verdict == "bad"
    assert "XDG_CACHE_HOME" in finding.note


@pytest.mark.parametrize(
    "token, is_offline, verdict", [(None, False, "ok"), (TOKEN, False, "ok"), (TOKEN, True, "warn")]
)
def test_a_token_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, token: str | None, is_offline: bool, verdict: str
) -> None:
    monkeypatch.setattr(doctor, "get_token", lambda: token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)

    findings = examined()

    assert TOKEN not in str(findings)
    assert findings["model hub"].verdict == verdict
    assert ("a token is set" in findings["model hub"].value) == (token is not None)


@pytest.mark.parametrize("release, verdict", [("6.6.87-microsoft-standard-WSL2", "warn"), ("6.18.0-generic", "ok")])
def test_wsl_is_recognised(monkeypatch: pytest.MonkeyPatch, release: str, verdict: str) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)

    assert examined()["system"].verdict == verdict


def test_swap_that_is_half_full_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for used, verdict in ((GIB, "ok"), (3 * GIB, "warn")):
        swap = SimpleNamespace(total=4 * GIB, used=used)
        monkeypatch.setattr(psutil, "swap_memory", lambda swap=swap: swap)
        assert examined()["swap"].verdict == verdict


def gpu_findings(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> dict[str, Finding]:
    """What is said about a GPU that is not there; nothing is computed on it."""
    gpu = torch.device("cuda", 0)
    fakes: dict[str, Callable[..., Any]] = {
        "get_device_capability": lambda _device: capability,
        "get_device_name": lambda _device: "NVIDIA Test",
        "get_device_properties": lambda _device: SimpleNamespace(total_memory=16 * GIB),
        "mem_get_info": lambda _device: (12 * GIB, 16 * GIB),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    found = [*doctor._machine(gpu), *doctor._memory(gpu), *doctor._speed(gpu)]
    return {finding.name: finding for finding in found}


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = gpu_findings(monkeypatch, (9, 0))

    assert (findings["device"].value, findings["device"].verdict) == ("NVIDIA Test (sm_90)", "ok")
    assert findings["device memory"].value == "12.0 GiB of 16.0 GiB free"
    assert findings["compute dtype"].value == "bfloat16"


def test_an_old_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = gpu_findings(monkeypatch, (7, 5))

    assert findings["device"].verdict == "warn"
    assert findings["compute dtype"].value == "float16"


def test_a_gpu_that_torch_misses_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version").write_text("NVRM version")
    monkeypatch.setattr(doctor, "_NVIDIA_DRIVER", tmp_path / "version")

    finding = next(finding for finding in doctor._machine(torch.device("cpu")) if finding.name == "device")

    assert finding.verdict == "bad"
    assert "CUDA build" in finding.note


def test_the_trials_see_an_error(monkeypatch: pytest.MonkeyPatch, disk_folder: Path) -> None:
    cpu = torch.device("cpu")

    def dirty_zeros(num_elements: int, **options: Any) -> torch.Tensor:
        paged = zeros_paged(num_elements, **options)
        paged[7] = 1
        return paged

    monkeypatch.setattr(trials, "zeros_paged", dirty_zeros)
    assert not trials.is_paged_update_equal(cpu, bits=8, folder=disk_folder)
    monkeypatch.setattr(trials, "attend", lambda q, k, v, shape: attend(q * 1.01, k, v, shape))
    assert trials.attention_error(cpu, window=0, softcap=0.0) > doctor.FP32_ERROR
    monkeypatch.setattr(trials, "_LEARNING_RATE", 2e-3)
    monkeypatch.setattr(bitsandbytes.optim, "AdamW", lambda weights, lr, **_: torch.optim.SGD(weights, lr=lr))
    assert trials.update_error(cpu, bits=32) > doctor.FP32_ERROR


def fused_kernels(monkeypatch: pytest.MonkeyPatch) -> Finding:
    """What is said of them on a GPU that is not there."""
    for name in ("nf4_error", "attention_error", "update_error", "is_paged_update_equal"):
        monkeypatch.setattr(doctor, name, lambda *_arguments, **_options: 0.0)
    return {finding.name: finding for finding in doctor._trials(torch.device("cuda", 0))}["fused kernels"]


@pytest.mark.parametrize(
    "reason, needed",
    [("triton is not installed", "triton"), ("RuntimeError: Failed to find C compiler.", "a C compiler")],
)
def test_a_gpu_without_fused_kernels_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, reason: str, needed: str
) -> None:
    monkeypatch.setattr(doctor, "why_no_row_kernels", lambda _device: reason)
    monkeypatch.setattr(doctor, "requires", lambda _name: ["filelock", 'triton==3.7.1; platform_system == "Linux"'])

    finding = fused_kernels(monkeypatch)

    assert (finding.value, finding.verdict) == (f"not here: {reason}", "warn")
    assert f"install {needed}" in finding.note
    assert ("triton==3.7.1." in finding.note) == (needed == "triton")


def test_a_gpu_with_fused_kernels_tries_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "why_no_row_kernels", lambda _device: None)
    for error, verdict in ((1e-7, "ok"), (float("nan"), "bad")):
        monkeypatch.setattr(doctor, "row_kernel_error", lambda _device, error=error: error)

        assert fused_kernels(monkeypatch).verdict == verdict
