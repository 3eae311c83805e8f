"""The catalogue of GPUs: plausible numbers, and names as people and drivers write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.config.known_models import known_names
from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.gpu_catalogue import CATALOGUE, Gpu, find_gpu, nearest_by_name

GIB = 2**30
# Of NVIDIA's product pages: tensor cores, boost clock in GHz.
TENSOR_CORES_AND_CLOCK = {
    "rtx-2060": (240, 1.68),
    "rtx-2070": (288, 1.62),
    "rtx-2080": (368, 1.71),
    "rtx-2080-ti": (544, 1.545),
    "rtx-3050": (80, 1.777),
    "rtx-3060": (112, 1.777),
    "rtx-3060-ti": (152, 1.665),
    "rtx-3070": (184, 1.725),
    "rtx-3070-ti": (192, 1.77),
    "rtx-3080": (272, 1.71),
    "rtx-3080-12gb": (280, 1.71),
    "rtx-3080-ti": (320, 1.665),
    "rtx-3090": (328, 1.695),
    "rtx-3090-ti": (336, 1.86),
    "rtx-4050-laptop": (80, 2.37),
    "rtx-4060-laptop": (96, 2.37),
    "rtx-4070-laptop": (144, 2.175),
    "rtx-4080-laptop": (232, 2.28),
    "rtx-4090-laptop": (304, 2.04),
    "rtx-4060": (96, 2.46),
    "rtx-4060-ti": (136, 2.535),
    "rtx-4060-ti-16gb": (136, 2.535),
    "rtx-4070": (184, 2.475),
    "rtx-4070-super": (224, 2.475),
    "rtx-4070-ti": (240, 2.61),
    "rtx-4070-ti-super": (264, 2.61),
    "rtx-4080": (304, 2.505),
    "rtx-4080-super": (320, 2.55),
    "rtx-4090": (512, 2.52),
    "rtx-5050": (80, 2.572),
    "rtx-5060": (120, 2.497),
    "rtx-5060-ti": (144, 2.572),
    "rtx-5060-ti-16gb": (144, 2.572),
    "rtx-5070": (192, 2.512),
    "rtx-5070-ti": (280, 2.452),
    "rtx-5080": (336, 2.617),
    "rtx-5090": (680, 2.407),
}


def refusal(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        find_gpu(name)
    return str(caught.value)


def test_it_covers_what_people_train_on() -> None:
    assert len(CATALOGUE) >= 28
    assert len({gpu.key for gpu in CATALOGUE}) == len(CATALOGUE)
    assert len({gpu.name for gpu in CATALOGUE}) == len(CATALOGUE)
    assert min(gpu.nominal_gib for gpu in CATALOGUE) == 6
    assert max(gpu.nominal_gib for gpu in CATALOGUE) == 192


def test_the_readme_counts_cards_and_models() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"{len(CATALOGUE)} GPUs, {len(known_names())} models by name" in readme


@pytest.mark.parametrize("gpu", CATALOGUE, ids=lambda gpu: gpu.key)
def test_the_numbers_are_plausible(gpu: Gpu) -> None:
    assert 0.9 * gpu.nominal_gib * GIB < gpu.memory_bytes < gpu.nominal_gib * GIB
    assert 15 < gpu.tensor_tflops < 3000
    assert 150 < gpu.bandwidth_gbps <= 8000
    assert 20 < gpu.tensor_tflops * 1000 / gpu.bandwidth_gbps < 500  # FLOP a byte
    assert (7, 0) <= gpu.compute_capability <= (12, 1)
    assert gpu.host_link_gbps in {15.75, 31.5, 63.0}


@pytest.mark.parametrize("key", TENSOR_CORES_AND_CLOCK)
def test_geforce_throughput_is_that_of_fp32_accumulation(key: str) -> None:
    """A figure with fp16 accumulation is twice, a sparse one four times as high."""
    gpu = find_gpu(key)
    tensor_cores, boost_ghz = TENSOR_CORES_AND_CLOCK[key]
    flop_a_clock = 64 if gpu.compute_capability == (7, 5) else 128

    assert gpu.tensor_tflops == pytest.approx(tensor_cores * flop_a_clock * boost_ghz / 1000, rel=0.005)


def test_every_geforce_is_checked() -> None:
    assert {gpu.key for gpu in CATALOGUE if gpu.name.startswith("GeForce")} == set(TENSOR_CORES_AND_CLOCK)


@pytest.mark.parametrize("gpu", CATALOGUE, ids=lambda gpu: gpu.key)
def test_a_card_is_found_by_its_key_and_by_its_name(gpu: Gpu) -> None:
    assert find_gpu(gpu.key) is gpu
    assert find_gpu(gpu.key.upper()) is gpu
    assert find_gpu(gpu.key.replace("-", " ")) is gpu
    assert find_gpu(gpu.key.replace("-", "_").title()) is gpu
    assert find_gpu(gpu.name) is gpu
    assert find_gpu(f"NVIDIA {gpu.name}".replace("NVIDIA AMD", "AMD")) is gpu


@pytest.mark.parametrize(
    "name, key",
    [
        ("RTX 4060", "rtx-4060"),
        ("rtx4060", "rtx-4060"),
        ("geforce rtx 4060", "rtx-4060"),
        ("4060", "rtx-4060"),
        (" rtx_4060 8 GB ", "rtx-4060"),
        ("4060ti", "rtx-4060-ti"),
        ("rtx 4060 ti 16 GB", "rtx-4060-ti-16gb"),
        ("rtx4060ti-16GiB", "rtx-4060-ti-16gb"),
        ("3080", "rtx-3080"),
        ("4090 laptop", "rtx-4090-laptop"),
        ("a6000", "rtx-a6000"),
        ("a100", "a100-40gb"),
        ("A100 80GB", "a100-80gb"),
        ("h100", "h100"),
        ("H100 PCIe", "h100-pcie"),
        ("h100-80gb", "h100"),
        ("v100", "v100-16gb"),
        ("MI300X", "mi300x"),
    ],
)
def test_loose_spellings(name: str, key: str) -> None:
    assert find_gpu(name).key == key


@pytest.mark.parametrize(
    "name, suggestion",
    [
        ("rtx-4061", "rtx-4060"),
        ("GeForce RTX 4095", "rtx-4090"),
        ("rtx-407", "rtx-4070"),
        ("rtx 4060 12gb", "rtx-4060"),
        ("4060 ti 12gb", "rtx-4060-ti or rtx-4060-ti-16gb"),
        ("a100-60gb", "a100-40gb or a100-80gb"),
        ("h1000", "h100"),
    ],
)
def test_did_you_mean(name: str, suggestion: str) -> None:
    message = refusal(name)
    assert message.startswith(f'--gpu: found "{name}"; expected a card of the catalogue')
    assert f"Did you mean {suggestion}" in message


@pytest.mark.parametrize("name", ["", "zzz", "7900 xtx", "gpu", "16gb", "rtx"])
def test_what_nothing_comes_close_to_gets_the_list(name: str) -> None:
    message = refusal(name)
    assert message.startswith(f'--gpu: found "{name}"')
    assert all(gpu.key in message for gpu in CATALOGUE)


@given(st.text(max_size=40))
def test_any_text_is_a_card_or_a_refusal(name: str) -> None:
    try:
        found = find_gpu(name)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert found in CATALOGUE
    assert nearest_by_name(name) in {None, *CATALOGUE}


@pytest.mark.parametrize(
    "device_name, key",
    [
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx-4070-ti-super"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "rtx-4060-laptop"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("Tesla V100-PCIE-32GB", "v100-32gb"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Instinct MI300X VF", "mi300x"),
    ],
)
def test_names_that_torch_gives(device_name: str, key: str) -> None:
    found = nearest_by_name(device_name)
    assert found is not None
    assert found.key == key


@pytest.mark.parametrize(
    "device_name",
    [
        "",
        "NVIDIA Graphics Device",
        "NVIDIA GeForce GTX 1080 Ti",
        "NVIDIA GeForce RTX 3080 Laptop GPU",  # a smaller chip than the card of that number
        "NVIDIA GeForce RTX 4090 D",
        "Quadro RTX 6000",  # Turing, not Ada
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 NVL",
        "NVIDIA GH200 480GB",
        "GRID A100-7-40C",
    ],
)
def test_other_cards_are_not_mistaken_for_one_of_these(device_name: str) -> None:
    assert nearest_by_name(device_name) is None


@pytest.mark.parametrize(
    "device_name, total_gib, key",
    [
        ("NVIDIA GeForce RTX 4060 Ti", None, "rtx-4060-ti"),
        ("NVIDIA GeForce RTX 4060 Ti", 8.0, "rtx-4060-ti"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.6, "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 3080", 9.65, "rtx-3080"),
        ("NVIDIA GeForce RTX 3080", 11.77, "rtx-3080-12gb"),
    ],
)
def test_memory_tells_cards_of_one_name_apart(device_name: str, total_gib: float | None, key: str) -> None:
    found = nearest_by_name(device_name, total_bytes=None if total_gib is None else int(total_gib * GIB))
    assert found is not None
    assert found.key == key
