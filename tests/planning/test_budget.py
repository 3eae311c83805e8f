"""What a plan may use: of a card that is not here, of this machine, of a GPU that is faked."""

from __future__ import annotations

import mmap

import pytest
import torch

from qlora_trainer.config.load import load_config
from qlora_trainer.errors import ConfigError, DoesNotFitError
from qlora_trainer.hardware.cpu_speed import CpuSpeed
from qlora_trainer.hardware.device import ComputeDtype
from qlora_trainer.hardware.gpu_catalogue import find_gpu
from qlora_trainer.planning import budget, throughput
from qlora_trainer.planning.budget import cpu_budget, gpu_budget, machine_budget
from qlora_trainer.run import plan_command

MIB, GIB = 2**20, 2**30


def test_a_card_gives_what_its_driver_leaves() -> None:
    usable = find_gpu("rtx-4060").memory_bytes
    assert usable < 8 * GIB
    for vram_bytes, expected in ((None, usable), (8 * GIB, usable), (6 * GIB, 6 * GIB)):
        found = gpu_budget("rtx-4060", vram_bytes)
        assert (found.budget_bytes, found.most_bytes) == (expected, usable)
    unnamed = gpu_budget(None, 8 * GIB)
    assert (unnamed.budget_bytes, unnamed.most_bytes) == (8 * GIB, 192 * GIB)


@pytest.mark.parametrize("vram_bytes, where", [(None, "memory.budget"), (9 * GIB, "--vram")])
def test_who_asks_for_more_than_the_card_has_is_named(vram_bytes: int | None, where: str) -> None:
    config = load_config(None, ["model.base=tiny", "data.train=x.jsonl", "memory.budget=9GiB"])
    with pytest.raises(ConfigError, match=f"^{where}: found 9GiB; expected at most the 8 GiB .* Lower {where} or"):
        plan_command._budget(config, "rtx-4060", vram_bytes, None)


def test_more_than_this_machine_has_is_refused() -> None:
    too_much = 2**50
    with pytest.raises(ConfigError, match=r"^--ram: found 1024TiB; expected at most the .* GiB of this machine's cpu"):
        cpu_budget(too_much)
    with pytest.raises(ConfigError, match=r"^memory\.host_budget: found 1024TiB; expected at most"):
        machine_budget(None, too_much)
    with pytest.raises(ConfigError, match=r"^memory\.budget: found 1024TiB; expected at most"):
        machine_budget(too_much, None)


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
@pytest.mark.parametrize("ram_bytes", [None, GIB])
def test_a_plan_for_this_cpu_is_timed_in_the_dtype_that_is_pinned(
    asked: str, ram_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where a plan leaves the dtype to the machine: the choice is then measured in another one."""
    measured: list[str] = []

    def measure(dtype: str) -> CpuSpeed:
        measured.append(dtype)
        return CpuSpeed(flops=1e9, bytes=1e9, unpacked_elements=1e9, launch_seconds=1e-6, file_bytes=1e9)

    monkeypatch.setattr(throughput, "measure_cpu_speed", measure)
    monkeypatch.setattr(budget, "choose_device", lambda: torch.device("cpu"))
    config = load_config(None, ["model.base=tiny", "data.train=x.jsonl", f"quantization.compute_dtype={asked}"])
    assert plan_command._budget(config, None, None, ram_bytes).compute_dtype == asked
    assert measured == [asked]


@pytest.mark.parametrize("host, expected", [("auto", 2 * GIB), ("1GiB", GIB), ("3GiB", 2 * GIB)])
def test_a_pinned_host_budget_counts_beside_an_option(host: str, expected: int) -> None:
    """And `memory.budget` does not: the option takes its place. Fails where --ram is all that is looked at."""
    pins = ["memory.budget=512MiB", f"memory.host_budget={host}", "quantization.compute_dtype=float32"]
    config = load_config(None, ["model.base=tiny", "data.train=x.jsonl", *pins])
    found = plan_command._budget(config, None, None, 2 * GIB)
    assert (found.budget_bytes, found.host_budget_bytes, found.device_key) == (expected, expected, "--ram")
    assert found.limiting_key == ("memory.host_budget" if host == "1GiB" else "--ram")


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An RTX 4060 in this machine, of which 5 GiB are free, beside a host with 16 of 32 GiB."""
    free = {"cuda": 5 * GIB, "cpu": 16 * GIB}
    total = {"cuda": 8 * GIB, "cpu": 32 * GIB}
    monkeypatch.setattr(budget, "choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(budget, "available_memory_bytes", lambda device: free[device.type])
    monkeypatch.setattr(budget, "total_memory_bytes", lambda device: total[device.type])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 4060")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))


def test_a_container_may_be_used_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the kernel has rounded down to whole pages. Mutation tried: compared to the byte."""
    limit = 8 * 2**30
    monkeypatch.setattr(budget, "total_memory_bytes", lambda device: limit)
    assert cpu_budget(limit + 100, compute_dtype="float32").budget_bytes == limit + 100
    with pytest.raises(ConfigError, match=r"^--ram: found"):
        cpu_budget(limit + mmap.PAGESIZE, compute_dtype="float32")


@pytest.mark.parametrize("available_mib, expected_mib", [(900, 1024), (500, 800)])
def test_what_is_free_in_a_container_is_no_more_than_its_limit(
    available_mib: int, expected_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File pages of this process are resident, but do not count against the limit. Mutation tried: the bare sum."""
    monkeypatch.setattr(budget, "total_memory_bytes", lambda _: GIB)
    monkeypatch.setattr(budget, "available_memory_bytes", lambda _: available_mib * MIB)
    monkeypatch.setattr(budget, "resident_bytes", lambda: 300 * MIB)
    assert cpu_budget(None, compute_dtype="float32").budget_bytes == expected_mib * MIB
    assert cpu_budget(None, 100 * MIB, compute_dtype="float32").limiting_key == "memory.host_budget"


@pytest.mark.usefixtures("_gpu")
def test_a_gpu_of_this_machine_gives_what_is_free() -> None:
    found = machine_budget(None, None)
    assert (found.budget_bytes, found.host_budget_bytes) == (5 * GIB, 16 * GIB)
    assert (found.most_bytes, found.most_host_bytes) == (5 * GIB, 32 * GIB)
    assert machine_budget(3 * GIB, 8 * GIB).budget_bytes == 3 * GIB
    assert machine_budget(7 * GIB, 8 * GIB).budget_bytes == 5 * GIB
    assert found.speed == gpu_budget("rtx-4060", None).speed


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("pinned", ["bfloat16", "float16", "float32", None])
def test_a_gpu_that_has_no_bf16_is_not_asked_for_it(
    pinned: ComputeDtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products would be emulated, and torch has no attention for it there but T x T matrices. A resume asks, too."""
    assert machine_budget(None, None, pinned).compute_dtype == (pinned or "bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    if pinned == "bfloat16":
        with pytest.raises(
            ConfigError, match=r"^quantization\.compute_dtype: found bfloat16, which NVIDIA GeForce RTX"
        ):
            machine_budget(None, None, pinned)
    else:
        assert machine_budget(None, None, pinned).compute_dtype == (pinned or "float16")


def test_a_card_that_has_no_bf16_is_not_planned_in_it() -> None:
    pins = ["model.base=tiny", "data.train=x.jsonl", "quantization.compute_dtype=bfloat16"]
    config = load_config(None, pins)
    with pytest.raises(ConfigError, match=r"^quantization\.compute_dtype: found bfloat16, which Tesla T4 has not"):
        plan_command._budget(config, "t4", None, None)
    plan_command._budget(config, "rtx-3060", None, None)
    plan_command._budget(config, None, 6 * GIB, None)  # which any card of that size may have


@pytest.mark.usefixtures("_gpu")
def test_a_gpu_without_free_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "available_memory_bytes", lambda _: 20 * MIB)
    with pytest.raises(DoesNotFitError, match=r"found 20 MiB free on the GPU; .*nvidia-smi") as caught:
        machine_budget(None, None)
    assert caught.value.exit_code == 3
    assert str(caught.value).count("\n") == 0
