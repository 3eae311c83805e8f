"""What we call of torch and bitsandbytes is there and takes our arguments, also what only a GPU would run."""

from __future__ import annotations

import ast
import ctypes
from pathlib import Path

import pytest
import torch

from qlora_trainer.hardware.quant_library import bitsandbytes
from tests.hardware.cuda_symbols import called_symbols
from tests.hardware.elf_symbols import defined_symbols
from tests.hardware.library_calls import calls_of, calls_of_source, refusals
from tests.hardware.wheel_signatures import Wheel, wheel_refusals

MODULES = {"torch": torch, "bitsandbytes": bitsandbytes, "libc": ctypes.CDLL(None)}
CUDA_LIBRARIES = sorted(Path(bitsandbytes.__file__).parent.glob("libbitsandbytes_cuda*.so"))
IMPORTS = """
import ctypes
import torch
from torch import cuda
from qlora_trainer.hardware.quant_library import bitsandbytes, functional
"""


def refused(source: str) -> list[str]:
    return list(refusals(calls_of(ast.parse(IMPORTS + source), "a.py"), MODULES))


def test_the_installed_libraries_take_every_call() -> None:
    calls = calls_of_source()
    assert list(refusals(calls, MODULES)) == []
    names = {call.name for call in calls}
    # That the parser is not blind: a call of each kind, on a module, an operator, an object and a private part.
    assert {
        "torch.cuda.set_per_process_memory_fraction",
        "torch.cuda.Stream.wait_stream",
        "torch.ops.bitsandbytes.dequantize_4bit.default",
        "torch.ops.aten.silu_backward",
        "torch._foreach_copy_",
        "libc.malloc_trim",
        "bitsandbytes.functional.get_paged",
        "bitsandbytes.optim.AdamW",
        "bitsandbytes.optim.AdamW.step",
    } <= names


@pytest.mark.parametrize(
    "source",
    [
        "torch.cuda.mem_get_inf(0)",
        "cuda.set_per_process_memory_fraction(0.5, fraction=0.5)",
        "cuda.get_device_capability(0, 1)",
        "torch.ops.bitsandbytes.quantize_4bit.default(x, 64, 'nf4')",
        "torch.ops.bitsandbytes.quantize_4bit.default(x, 64, 4, torch.uint8)",
        "torch.ops.bitsandbytes.dequantize_5bit.default(x)",
        "torch.ops.aten.silu_backward(gradient)",
        "torch.ops.aten.gelu_backward(gradient, x, approximately='tanh')",
        "functional.get_paged(3, dtyp=torch.uint8)",
        "bitsandbytes.optim.AdamW([], optim_bit=8)",
        "adamw = bitsandbytes.optim.AdamW([])\nadamw.steps()",
        "adamw = bitsandbytes.optim.AdamW([])\nadamw.step(1, 2)",
        "class A:\n def f(self):\n  self.s = torch.cuda.Stream(0)\n  self.s.wait_stream()",
        "torch.cuda.current_stream(0).wait_streams(s)",
        "torch._foreach_copy_it([], [])",
        "libc = ctypes.CDLL(None)\nlibc.malloc_trimmed(0)",
    ],
)
def test_a_call_that_is_wrong_is_refused(source: str) -> None:
    assert len(refused(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "cuda.get_device_capability(*given)",
        "bitsandbytes.optim.AdamW([], **options)",
        "torch.ops.aten.gelu_backward(gradient, x, approximate='tanh')",
        "adamw = bitsandbytes.optim.AdamW([])\nadamw.step()",
        "torch.nn.functional.anything(1, 2, 3)",  # public, and run on a CPU by other tests
    ],
)
def test_a_call_that_is_right_or_cannot_be_told_is_taken(source: str) -> None:
    assert refused(source) == []


def test_every_symbol_that_our_calls_end_in_is_in_each_cuda_library() -> None:
    """Mutation tried: a call of `cgemm_4bit_int4`, which no library has."""
    called = called_symbols()
    assert {
        "cquantize_blockwise_bf16_nf4",
        "cdequantize_blockwise_fp16_nf4",
        "cdequantize_blockwise_fp32",
        "cadam32bit_grad_fp32",
        "cadam_8bit_blockwise_grad_fp32",
        "cget_managed_ptr",
        "cfill_fp32",
        "cfill_uint8",
    } <= called
    assert len(CUDA_LIBRARIES) >= 2
    missing = {path.name: sorted(called - defined_symbols(path)) for path in CUDA_LIBRARIES}
    assert missing == {path.name: [] for path in CUDA_LIBRARIES}


def test_symbols_are_those_that_a_library_defines() -> None:
    found = defined_symbols(CUDA_LIBRARIES[0])
    assert "cadam32bit_grad_fp32" in found
    assert "cudaMalloc" not in found  # used, defined elsewhere
    with pytest.raises(ValueError, match="ELF"):
        defined_symbols(Path(__file__))


@pytest.fixture(scope="module")
def wheel() -> Wheel:
    return Wheel(Path(torch.__file__).parents[1])


def test_a_torch_that_is_not_imported_is_read_alike(wheel: Wheel) -> None:
    """The installed one, as `.ci/run` reads the wheel of the lowest that is supported."""
    assert wheel.version == torch.__version__
    calls = [call for call in calls_of_source() if call.name.startswith("torch.")]
    assert len(calls) > 40
    assert list(wheel_refusals(calls, wheel)) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.cuda.mem_get_inf(0)",
        "torch.cuda.set_per_process_memory_fraction()",
        "torch.cuda.mem_get_info(0, 1)",
        "torch.cuda.Stream(0).wait_streams(s)",
        "torch.cuda.current_stream(0).wait_stream()",
        "torch.ops.aten.silu_backward(gradient)",
        "torch._foreach_copy_it([], [])",
        "torch._C._current_graph_task(0)",
        "torch._C._current_graph_task_id(0)",
        "torch._C._ForceDispatchKeyGuard(include)",
        "torch._C._ForceDispatchKeyGuard(include, excluded=keys)",
        "torch.ops.mkldnn._is_mkldnn_bf16_support()",
        "torch.ops.mkldnn._is_mkldnn_bf16_supported(0)",
        "torch._subclasses.fake_tensor.is_fakes(x)",
    ],
)
def test_a_wrong_call_is_refused_by_one_that_is_not_imported(source: str, wheel: Wheel) -> None:
    assert len(list(wheel_refusals(calls_of(ast.parse(IMPORTS + source), "a.py"), wheel))) == 1
