"""Compiles every kernel of `triton_rows` for GPUs that are not here, as its launcher would; a child of the tests.

    python -m tests.hardware.compiled_rows ARCHITECTURES WIDTHS DTYPES      (such as: 80,90 576,4096 bf16,fp32)

Prints a JSON list: what was compiled, and what `cuobjdump` and the PTX say of it. A launcher is called with tensors
without storage, and what it would start is noted, so that what is compiled is what a run compiles.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlora_trainer.hardware import triton_rows
from qlora_trainer.model import row_ops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
NUM_ROWS, HEAD_DIM, WARP = 4096, 64, 32
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_ACCESS = re.compile(r"(ld|st)\.global(?:\.v([24]))?\.b(\d+)")


@dataclass(frozen=True, slots=True)
class Launch:
    """What a launcher starts: `args` and `options` as `triton_rows._launch` has them."""

    kernel: Any
    args: tuple[Any, ...]
    options: Mapping[str, int | str]


def launches(width: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """Each operation on rows of `width`, or that many elements of heads, and the one launch that it is."""
    noted: list[Launch] = []
    triton_rows._launch = lambda kernel, _, *args, **options: noted.append(Launch(kernel, args, options))

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, weight, inverse = empty(NUM_ROWS, width), empty(width), empty(NUM_ROWS, 1, dtype=torch.float32)
    heads, table = empty(NUM_ROWS, width // HEAD_DIM, HEAD_DIM), empty(NUM_ROWS, HEAD_DIM)
    started = {
        "rms_norm": partial(triton_rows.rms_norm, rows, inverse, rows, weight, 1e-5, 0.0),
        "rms_norm_again": partial(triton_rows.rms_norm_again, rows, rows, inverse, weight, 0.0),
        "rms_norm_backward": partial(triton_rows.rms_norm_backward, rows, rows, inverse, None, weight, 0.0),
        "rms_norm_backward added": partial(triton_rows.rms_norm_backward, rows, rows, inverse, rows, weight, 0.0),
        "rotate": partial(triton_rows.rotate, heads, table, table, 1.0),
    }
    for activation in (row_ops.SILU, row_ops.GELU, row_ops.GELU_TANH):
        started[f"gated {activation}"] = partial(triton_rows.gated, rows, rows, rows, activation)
        started[f"gated_backward {activation}"] = partial(triton_rows.gated_backward, rows, rows, rows, activation)
    for name, start in started.items():
        noted.clear()
        start()
        (launch,) = noted
        yield name, launch


def compiled(launch: Launch, architecture: int) -> Any:
    """The kernel for sm_`architecture`, specialized as at a launch: what 16 divides is known to be so."""
    options = dict(launch.options)
    num_warps = options.pop("num_warps")
    signature = dict.fromkeys(options, "constexpr")
    constants: dict[str, Any] = dict(options)
    divisible = []
    for index, (parameter, value) in enumerate(zip(launch.kernel.params, launch.args, strict=False)):
        name = parameter.name
        if value is None:
            signature[name], constants[name] = "constexpr", None
        elif isinstance(value, Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
            divisible.append(index)
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(index)
    attributes = {(index,): [["tt.divisibility", 16]] for index in divisible}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, WARP), options={"num_warps": num_warps})


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory: what is spilled is there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _RESOURCES.search(said)
    assert found is not None, said
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def accessed(ptx: str, num_threads: int) -> dict[str, int]:
    """Bytes that a program loads and stores by accesses of several words, loops being counted once."""
    num_bytes = {"ld": 0, "st": 0}
    for kind, words, bits in _ACCESS.findall(ptx):
        if words:
            num_bytes[kind] += num_threads * int(words) * int(bits) // 8
    return num_bytes


def main() -> None:
    architectures, widths, dtypes = (argument.split(",") for argument in sys.argv[1:])
    found = []
    for width in map(int, widths):
        for dtype in dtypes:
            for name, launch in launches(width, DTYPES[dtype]):
                for architecture in map(int, architectures):
                    kernel = compiled(launch, architecture)
                    registers, spilled_bytes = resources(kernel.asm["cubin"])
                    found.append(
                        {
                            "name": f"{name} {width} {dtype} sm_{architecture}",
                            "operation": name,
                            "registers": registers,
                            "spilled_bytes": spilled_bytes,
                            "truncates": "cvt.rz" in kernel.asm["ptx"],
                            "accessed": accessed(kernel.asm["ptx"], WARP * int(launch.options["num_warps"])),
                        }
                    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
