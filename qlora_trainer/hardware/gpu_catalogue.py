"""What GPUs that are not here can hold and do, so that a run can be planned before a card is bought or rented.

No torch. Where the numbers are from:

* Tensor throughput is dense (never the doubled "sparse" figure), bf16, or fp16 on cards without bf16 (sm_70, sm_75),
  with fp32 accumulation, as training multiplies; GeForce cards do that at half the rate of fp16 accumulation. From
  NVIDIA's whitepapers (Volta, Turing, GA102, Ada, RTX Blackwell, RTX PRO Blackwell), "Peak FP16/BF16 Tensor TFLOPS with
  FP32 Accumulate". GeForce cards that they leave out: tensor cores x 64 (Turing) or 128 (later) FLOP a clock x boost
  clock, which gives their figures for the cards that they have, and 1/8 (Ada) or 1/16 (Blackwell) of the "AI TOPS" of
  the product pages. Workstation and data center cards: NVIDIA's data sheets, for the MI300X AMD's.
* Bandwidth and PCIe generation: the same documents and product pages. The host link is what PCIe carries in one
  direction after encoding (128 of 130 bits); copies from pinned memory reach 80 to 90 % of it.
* Memory is what the driver leaves of the nominal size, `torch.cuda.get_device_properties(0).total_memory` on Linux, in
  public logs. Drivers differ by up to 0.2 GiB; the lowest total that was seen for a named card is taken, for consumer
  cards the lowest of those of that size. Windows and WSL report nearly all of it, and share it with the desktop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from qlora_trainer.config.sizes import format_size
from qlora_trainer.errors import ConfigError

# One direction, GB/s: lanes x GT/s x 128/130 / 8.
_PCIE_3_X16 = 15.75
_PCIE_4_X8 = 15.75
_PCIE_4_X16 = 31.5
_PCIE_5_X8 = 31.5
_PCIE_5_X16 = 63.0

_VOLTA, _TURING = (7, 0), (7, 5)
_AMPERE_A100, _AMPERE, _ADA = (8, 0), (8, 6), (8, 9)
_HOPPER = (9, 0)
_BLACKWELL_B200, _BLACKWELL = (10, 0), (12, 0)
_GFX_942 = (9, 4)

# Nominal GiB of a consumer card -> total GiB, read off an RTX 4050 Laptop, 2080, 3080, 2080 Ti, 4070, 5080, 4090, 5090.
_CONSUMER_GIB = {6: 5.65, 8: 7.60, 10: 9.62, 11: 10.57, 12: 11.56, 16: 15.47, 24: 23.51, 32: 31.34}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A card.

    Attributes:
        key: how it is named on the command line, such as "rtx-4060".
        name: how it is sold.
        nominal_gib: memory as it is sold. Vendors write GB and mean GiB.
        memory_bytes: memory that a process can see, as the driver reports it.
        tensor_tflops: dense bf16 (fp16 before sm_80) matrix products with fp32 accumulation, 10^12 FLOP a second.
        bandwidth_gbps: of the card's memory, 10^9 bytes a second.
        compute_capability: major and minor, as torch gives it.
        host_link_gbps: PCIe in one direction, 10^9 bytes a second.
        note: what the numbers do not say; may be empty.
    """

    key: str
    name: str
    nominal_gib: int
    memory_bytes: int
    tensor_tflops: float
    bandwidth_gbps: float
    compute_capability: tuple[int, int]
    host_link_gbps: float
    note: str = ""


def _gpu(
    key: str,
    name: str,
    nominal_gib: int,
    tensor_tflops: float,
    bandwidth_gbps: float,
    compute_capability: tuple[int, int],
    host_link_gbps: float,
    *,
    total_gib: float | None = None,
    note: str = "",
) -> Gpu:
    """A row of the catalogue; `total_gib` of a consumer card is that of all cards of its size."""
    return Gpu(
        key=key,
        name=name,
        nominal_gib=nominal_gib,
        memory_bytes=int((total_gib or _CONSUMER_GIB[nominal_gib]) * 2**30),
        tensor_tflops=tensor_tflops,
        bandwidth_gbps=bandwidth_gbps,
        compute_capability=compute_capability,
        host_link_gbps=host_link_gbps,
        note=note,
    )


_LAPTOP = "At the highest clock that NVIDIA allows; many laptops are built for less power."
_ECC = "With ECC switched on, 44.4 GiB."
_72_W = "72 W: sustains well below its peak."
_ROCM = "AMD: needs the ROCm builds of torch and bitsandbytes."

# key, name, nominal GiB, tensor TFLOPS, bandwidth GB/s, compute capability, host link GB/s
CATALOGUE: tuple[Gpu, ...] = (
    _gpu("rtx-2060", "GeForce RTX 2060", 6, 25.8, 336, _TURING, _PCIE_3_X16),
    _gpu("rtx-2070", "GeForce RTX 2070", 8, 29.9, 448, _TURING, _PCIE_3_X16),
    _gpu("rtx-2080", "GeForce RTX 2080", 8, 40.3, 448, _TURING, _PCIE_3_X16),
    _gpu("rtx-2080-ti", "GeForce RTX 2080 Ti", 11, 53.8, 616, _TURING, _PCIE_3_X16),
    _gpu("rtx-3050", "GeForce RTX 3050 8GB", 8, 18.2, 224, _AMPERE, _PCIE_4_X8),
    _gpu("rtx-3060", "GeForce RTX 3060 12GB", 12, 25.5, 360, _AMPERE, _PCIE_4_X16),
    _gpu("rtx-3060-ti", "GeForce RTX 3060 Ti", 8, 32.4, 448, _AMPERE, _PCIE_4_X16),
    _gpu("rtx-3070", "GeForce RTX 3070", 8, 40.6, 448, _AMPERE, _PCIE_4_X16),
    _gpu("rtx-3070-ti", "GeForce RTX 3070 Ti", 8, 43.5, 608, _AMPERE, _PCIE_4_X16),
    _gpu("rtx-3080", "GeForce RTX 3080 10GB", 10, 59.5, 760, _AMPERE, _PCIE_4_X16),
    _gpu("rtx-3080-12gb", "GeForce RTX 3080 12GB", 12, 61.3, 912, _AMPERE, _PCIE_4_X16),
    _gpu("rtx-3080-ti", "GeForce RTX 3080 Ti", 12, 68.2, 912, _AMPERE, _PCIE_4_X16),
    _gpu("rtx-3090", "GeForce RTX 3090", 24, 71.0, 936, _AMPERE, _PCIE_4_X16),
    _gpu("rtx-3090-ti", "GeForce RTX 3090 Ti", 24, 80.0, 1008, _AMPERE, _PCIE_4_X16),
    _gpu("rtx-4050-laptop", "GeForce RTX 4050 Laptop", 6, 24.3, 192, _ADA, _PCIE_4_X8, note=_LAPTOP),
    _gpu("rtx-4060-laptop", "GeForce RTX 4060 Laptop", 8, 29.1, 256, _ADA, _PCIE_4_X8, note=_LAPTOP),
    _gpu("rtx-4070-laptop", "GeForce RTX 4070 Laptop", 8, 40.1, 256, _ADA, _PCIE_4_X8, note=_LAPTOP),
    _gpu("rtx-4080-laptop", "GeForce RTX 4080 Laptop", 12, 67.7, 432, _ADA, _PCIE_4_X16, note=_LAPTOP),
    _gpu("rtx-4090-laptop", "GeForce RTX 4090 Laptop", 16, 79.4, 576, _ADA, _PCIE_4_X16, note=_LAPTOP),
    _gpu("rtx-4060", "GeForce RTX 4060", 8, 30.2, 272, _ADA, _PCIE_4_X8),
    _gpu("rtx-4060-ti", "GeForce RTX 4060 Ti 8GB", 8, 44.1, 288, _ADA, _PCIE_4_X8),
    _gpu("rtx-4060-ti-16gb", "GeForce RTX 4060 Ti 16GB", 16, 44.1, 288, _ADA, _PCIE_4_X8),
    _gpu("rtx-4070", "GeForce RTX 4070", 12, 58.3, 504, _ADA, _PCIE_4_X16),
    _gpu("rtx-4070-super", "GeForce RTX 4070 SUPER", 12, 71.0, 504, _ADA, _PCIE_4_X16),
    _gpu("rtx-4070-ti", "GeForce RTX 4070 Ti", 12, 80.2, 504, _ADA, _PCIE_4_X16),
    _gpu("rtx-4070-ti-super", "GeForce RTX 4070 Ti SUPER", 16, 88.2, 672, _ADA, _PCIE_4_X16),
    _gpu("rtx-4080", "GeForce RTX 4080", 16, 97.5, 717, _ADA, _PCIE_4_X16),
    _gpu("rtx-4080-super", "GeForce RTX 4080 SUPER", 16, 104.4, 736, _ADA, _PCIE_4_X16),
    _gpu("rtx-4090", "GeForce RTX 4090", 24, 165.2, 1008, _ADA, _PCIE_4_X16),
    _gpu("rtx-5050", "GeForce RTX 5050", 8, 26.3, 320, _BLACKWELL, _PCIE_5_X8),
    _gpu("rtx-5060", "GeForce RTX 5060", 8, 38.4, 448, _BLACKWELL, _PCIE_5_X8),
    _gpu("rtx-5060-ti", "GeForce RTX 5060 Ti 8GB", 8, 47.4, 448, _BLACKWELL, _PCIE_5_X8),
    _gpu("rtx-5060-ti-16gb", "GeForce RTX 5060 Ti 16GB", 16, 47.4, 448, _BLACKWELL, _PCIE_5_X8),
    _gpu("rtx-5070", "GeForce RTX 5070", 12, 61.7, 672, _BLACKWELL, _PCIE_5_X16),
    _gpu("rtx-5070-ti", "GeForce RTX 5070 Ti", 16, 87.9, 896, _BLACKWELL, _PCIE_5_X16),
    _gpu("rtx-5080", "GeForce RTX 5080", 16, 112.6, 960, _BLACKWELL, _PCIE_5_X16),
    _gpu("rtx-5090", "GeForce RTX 5090", 32, 209.5, 1792, _BLACKWELL, _PCIE_5_X16),
    # Workstations; fp32 accumulation is not halved here.
    _gpu("rtx-a4000", "RTX A4000", 16, 76.7, 448, _AMPERE, _PCIE_4_X16, total_gib=15.59),
    _gpu("rtx-a5000", "RTX A5000", 24, 111.1, 768, _AMPERE, _PCIE_4_X16, total_gib=23.57),
    _gpu("rtx-a6000", "RTX A6000", 48, 154.8, 768, _AMPERE, _PCIE_4_X16, total_gib=47.43, note=_ECC),
    _gpu("rtx-6000-ada", "RTX 6000 Ada", 48, 364.2, 960, _ADA, _PCIE_4_X16, total_gib=47.48),
    _gpu("rtx-pro-6000", "RTX PRO 6000 Blackwell", 96, 503.8, 1792, _BLACKWELL, _PCIE_5_X16, total_gib=94.97),
    # Data centers.
    _gpu("t4", "Tesla T4", 16, 65.0, 320, _TURING, _PCIE_3_X16, total_gib=14.56),
    _gpu("v100-16gb", "Tesla V100 SXM2 16GB", 16, 125.0, 900, _VOLTA, _PCIE_3_X16, total_gib=15.75),
    _gpu("v100-32gb", "Tesla V100 SXM2 32GB", 32, 125.0, 900, _VOLTA, _PCIE_3_X16, total_gib=31.73),
    _gpu("l4", "L4", 24, 121.0, 300, _ADA, _PCIE_4_X16, total_gib=22.16, note=_72_W),
    _gpu("a10", "A10", 24, 125.0, 600, _AMPERE, _PCIE_4_X16, total_gib=22.19),
    _gpu("a10g", "A10G", 24, 70.0, 600, _AMPERE, _PCIE_4_X16, total_gib=22.19),
    _gpu("a40", "A40", 48, 149.7, 696, _AMPERE, _PCIE_4_X16, total_gib=44.54),
    _gpu("l40s", "L40S", 48, 362.0, 864, _ADA, _PCIE_4_X16, total_gib=44.39),
    _gpu("a100-40gb", "A100 SXM4 40GB", 40, 312.0, 1555, _AMPERE_A100, _PCIE_4_X16, total_gib=39.49),
    _gpu("a100-80gb", "A100 SXM4 80GB", 80, 312.0, 2039, _AMPERE_A100, _PCIE_4_X16, total_gib=79.15),
    _gpu("h100-pcie", "H100 PCIe", 80, 756.0, 2000, _HOPPER, _PCIE_5_X16, total_gib=79.10),
    _gpu("h100", "H100 SXM5", 80, 989.4, 3350, _HOPPER, _PCIE_5_X16, total_gib=79.17),
    _gpu("h200", "H200 SXM5", 141, 989.4, 4800, _HOPPER, _PCIE_5_X16, total_gib=139.79),
    _gpu("b200", "B200 SXM6", 180, 2250.0, 8000, _BLACKWELL_B200, _PCIE_5_X16, total_gib=178.35),
    _gpu("mi300x", "AMD Instinct MI300X", 192, 1307.4, 5300, _GFX_942, _PCIE_5_X16, total_gib=191.68, note=_ROCM),
)

LARGEST_NOMINAL_GIB = max(gpu.nominal_gib for gpu in CATALOGUE)

_MEMORY_SIZE = re.compile(r"(?<![0-9])([0-9]{1,3})[ -]?gi?b(?![a-z0-9])")
_BRANDS = {"nvidia", "amd", "geforce", "tesla", "instinct", "blackwell"}
_SAYS_NOTHING = {"gpu", "generation", "workstation", "server", "edition"} | _BRANDS
_FORMS = {"sxm", "sxm2", "sxm4", "sxm5", "sxm6", "oam", "pcie", "hbm2", "hbm2e", "hbm3", "hbm3e", "vf"}


def find_gpu(name: str) -> Gpu:
    """The card that a person means.

    Args:
        name: a key, or the card's name with or without vendor, brand, hyphens and memory size, in any case. Without a
            size the smallest of several is taken: what fits there fits the others.

    Raises:
        ConfigError: no such card.
    """
    matches = _matches(name) or _matches(f"rtx {name}")
    if matches:
        return matches[0]
    words, _ = _words(name)
    siblings = [gpu.key for gpu in CATALOGUE if "".join(words) in {_model(gpu), _model(gpu).removeprefix("rtx")}]
    keys = [gpu.key for gpu in CATALOGUE]
    close = siblings or get_close_matches("-".join(words), keys, n=2, cutoff=0.7)
    raise ConfigError(
        where="--gpu",
        found=f'"{name}"',
        expected="a card of the catalogue such as rtx-4060, rtx-4090 or a100-80gb",
        fix=f"Did you mean {' or '.join(close)}?" if close else f"Known are {', '.join(keys)}.",
    )


def choose_gpu(name: str | None, vram_bytes: int | None, *, where: str = "--vram") -> Gpu:
    """The card that is meant, or the smallest one with that much memory.

    Args:
        name: see `find_gpu`; None leaves the choice.
        vram_bytes: what of it may be used; None is all of it.
        where: who asks for `vram_bytes`, for the message.

    Raises:
        ConfigError: no such card, less memory than that, or neither is given.
    """
    if name is not None:
        gpu = find_gpu(name)
        if vram_bytes is not None and vram_bytes > gpu.nominal_gib * 2**30:
            raise ConfigError(
                where=where,
                found=format_size(vram_bytes),
                expected=f"at most the {gpu.nominal_gib} GiB of the {gpu.name}",
                fix=f"Lower {where} or choose another --gpu.",
            )
        return gpu
    if vram_bytes is None:
        raise ConfigError(
            where="plan", found="neither --gpu nor --vram", expected="one of them", fix="Give --vram 8GiB, say."
        )
    fitting = [gpu for gpu in CATALOGUE if gpu.nominal_gib * 2**30 >= vram_bytes]
    if not fitting:
        raise ConfigError(
            where=where,
            found=format_size(vram_bytes),
            expected=f"at most {LARGEST_NOMINAL_GIB} GiB, what the largest card has",
            fix=f"Lower {where}: a run uses one card.",
        )
    return min(fitting, key=lambda gpu: (gpu.nominal_gib, gpu.tensor_tflops))


def nearest_by_name(torch_device_name: str, *, total_bytes: int | None = None) -> Gpu | None:
    """The entry of a card that is present; PCIe and SXM forms count as one where only one of them is listed.

    Args:
        torch_device_name: as `torch.cuda.get_device_name` gives it.
        total_bytes: the card's memory; tells apart cards that share a name and come in several sizes. Without it the
            smallest of them is taken.
    """
    matches = _matches(torch_device_name)
    if total_bytes is None:
        return matches[0] if matches else None
    return min(matches, key=lambda gpu: abs(gpu.memory_bytes - total_bytes), default=None)


def _matches(name: str) -> list[Gpu]:
    """Entries of that model and, where a size is in the name, of that size; smallest first."""
    words, nominal_gib = _words(name)
    without_form = [word for word in words if word not in _FORMS]
    for model in ("".join(words), "".join(without_form)):
        matches = [gpu for gpu in CATALOGUE if _model(gpu) == model and nominal_gib in {None, gpu.nominal_gib}]
        if matches:
            return sorted(matches, key=lambda gpu: gpu.memory_bytes)
    return []


def _model(gpu: Gpu) -> str:
    return "".join(_words(gpu.key)[0])


def _words(name: str) -> tuple[list[str], int | None]:
    """What tells a model from others, and the memory size in the name."""
    folded = name.lower()
    size = _MEMORY_SIZE.search(folded)
    words = re.findall(r"[a-z0-9]+", _MEMORY_SIZE.sub(" ", folded))
    return [word for word in words if word not in _SAYS_NOTHING], int(size[1]) if size else None
