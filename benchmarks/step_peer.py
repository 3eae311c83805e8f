"""The peer's step, traced: TRL's `SFTTrainer.train()` itself, with PEFT, transformers, accelerate and bitsandbytes as
they are installed, on fake tensors of the Python-only accelerator.

As its defaults make it for one long row: bf16, double-quantized NF4, adapters on all linears, no dropout, torch's
attention, fused AdamW, fused output head, nothing logged in the step that is counted (TRL logs every tenth); without
`torch_compile` and without kernels from the hub. Each replacement below stands for what a GPU has and this device has
not; `MODELLED` says which of them are costs.
Importing this changes libraries: only for a process of its own (`step_trace.py`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.utils import import_utils
from trl.kernels import chunked_logprob
from trl.trainer import sft_config, sft_trainer
from trl.trainer import utils as trl_utils

from benchmarks import peer_fakes
from benchmarks.step_ledger import Entry, Ledger, fused_attention_of
from benchmarks.step_operations import Operation, touched_bytes
from benchmarks.step_ours import require_accelerator
from benchmarks.step_totals import Case
from qlora_trainer.hardware.quant_library import functional
from qlora_trainer.planning.model_config import read_model_config

MODELLED = (
    "attention: torch's FlashAttention kernel, by its FLOPs",
    "bitsandbytes' CUDA kernels (dequantization), by what they read and write",
    "the two Triton kernels of TRL's output head, by what they read and write",
    "the head's product that adds up in fp32 (torch.addmm with out_dtype), by its FLOPs",
    "autocast: it would cast nothing, as weights and activations are bf16",
)
COUNTED_STEP = 2  # the first one makes the optimizer's state
# Of TRL's kernels, the arguments that they write (trl/kernels/chunked_logprob.py).
_FORWARD_WRITES, _BACKWARD_WRITES = (3, 4, 5, 8, 9), (0,)


def trace(case: Case) -> Iterator[Entry]:
    """The second step of a run."""
    device = require_accelerator()
    ledger = Ledger(device.type)
    ledger.is_open = False
    skeleton = _skeleton(case, device)
    disable_progress_bars()
    with (
        tempfile.TemporaryDirectory() as folder,
        FakeTensorMode(allow_non_fake_inputs=True),
        ledger,
        _as_on_a_gpu(ledger),
    ):
        _materialize(skeleton, device)
        trainer = _trainer(case, skeleton, folder, device)
        trainer.add_callback(_Counting(ledger))
        stock_step = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            with ledger.inside():
                return stock_step(*args, **kwargs)

        trainer.training_step = training_step
        trainer.train()
    return ledger.entries()


class _Counting(transformers.TrainerCallback):
    """Opens the ledger from the end of one step to the end of the next."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ledger.is_open = state.global_step == COUNTED_STEP - 1


def _skeleton(case: Case, device: torch.device) -> Any:
    """The quantized model on meta, as `from_pretrained` leaves it but for its weights."""
    config: Any = read_model_config(case.model)[0]
    config.num_hidden_layers, config.use_cache = case.num_layers, False
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with torch.device("meta"), no_init_weights():
        model: Any = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantization)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.quantization_method = "bitsandbytes"
    model.config.quantization_config = quantization
    model.hf_quantizer = SimpleNamespace(
        is_trainable=True, is_qat_trainable=False, is_compileable=False, quantization_config=quantization
    )
    model.hf_device_map = {"": device}
    return model


def _materialize(model: Any, device: torch.device) -> None:
    made: dict[int, nn.Parameter] = {}  # a tied head is its embedding
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.weight = _quantized_weight(module, device)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    storage = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    made[id(parameter)] = nn.Parameter(storage, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def _quantized_weight(linear: Any, device: torch.device) -> nn.Parameter:
    """What bitsandbytes' `quantize_4bit` leaves; a plain parameter, since `Params4bit` cannot wrap a fake tensor."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    num_blocks = linear.in_features * linear.out_features // 64
    nested = functional.QuantState(
        absmax=empty(-(-num_blocks // 256)), code=empty(256), blocksize=256, dtype=torch.float32
    )
    linear.quant_state = functional.QuantState(
        absmax=empty(num_blocks, dtype=torch.uint8),
        shape=torch.Size((linear.out_features, linear.in_features)),
        code=empty(16),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=empty(),
        state2=nested,
    )
    weight: Any = nn.Parameter(empty(num_blocks * 32, 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state, weight.quant_type = linear.quant_state, "nf4"
    weight.compress_statistics = weight.bnb_quantized = True
    return weight  # type: ignore[no-any-return]


def _trainer(case: Case, model: Any, folder: str, device: torch.device) -> Any:
    arguments = sft_config.SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=1,
        max_steps=COUNTED_STEP,
        max_length=case.num_tokens,
        activation_checkpointing=case.is_recomputed,
        bf16=True,
        use_cpu=True,  # no GPU is looked for; the device is set below
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    assert arguments.device.type == "cpu"  # looked up once, then kept
    arguments.distributed_state.device = device
    arguments.__dict__["_setup_devices"] = device
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")),
        eos_token="</s>",
        pad_token="</s>",
    )
    rows = [[0] * case.num_tokens] * COUNTED_STEP
    return sft_trainer.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(
            r=case.rank, lora_alpha=2 * case.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )


def _as_on_a_gpu(ledger: Ledger) -> ExitStack:
    """What asks whether this is a GPU hears yes, and what only a GPU has is stood in for."""
    stack = ExitStack()
    for module in (chunked_logprob, trl_utils):
        stack.enter_context(mock.patch.object(module, "_use_triton", return_value=True))
    for name, written in (("_forward_kernel", _FORWARD_WRITES), ("_backward_kernel", _BACKWARD_WRITES)):
        stack.enter_context(mock.patch.object(chunked_logprob, name, _Kernel(ledger, f"trl::{name}", written)))
    triton = SimpleNamespace(cdiv=lambda a, b: -(-a // b))
    stack.enter_context(mock.patch.object(chunked_logprob, "triton", triton, create=True))

    def addmm_fp32(total: Tensor, left: Tensor, right: Tensor) -> None:
        flops = 2 * left.numel() * right.shape[-1]
        moved = 2 * touched_bytes(total) + touched_bytes(left) + touched_bytes(right)
        ledger.write(Operation("aten::addmm", "product", flops, moved, 1))

    stack.enter_context(mock.patch.object(chunked_logprob, "_addmm_fp32", addmm_fp32))
    stack.enter_context(fused_attention_of(nn.functional))
    stack.enter_context(mock.patch.object(import_utils, "is_fake_tensor", return_value=False))
    stack.enter_context(mock.patch.object(nn.utils.clip_grad, "_has_foreach_support", return_value=True))
    stack.enter_context(mock.patch.object(torch, "tensor", _tensor(torch.tensor)))
    stack.enter_context(mock.patch.object(nn.Module, "_apply", _convert))
    stack.enter_context(peer_fakes.cuda_autocast_flag(torch.bfloat16))
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    stack.callback(library._destroy)
    return stack


class _Kernel:
    """In place of a Triton kernel: `kernel[grid](...)` notes what it reads and writes."""

    def __init__(self, ledger: Ledger, name: str, written: Sequence[int]) -> None:
        self.ledger, self.name, self.written = ledger, name, written

    def __getitem__(self, grid: Any) -> Any:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        moved = sum(
            touched_bytes(value) * (2 if place in self.written else 1)
            for place, value in enumerate(args)
            if isinstance(value, Tensor)
        )
        self.ledger.write(Operation(self.name, "other", 0, moved, 1))


def _tensor(stock: Any) -> Any:
    """`torch.tensor` on a device, as CUDA does it: made on the host and copied, for which the host waits."""

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made: Tensor = stock(data, **options)
        if device is None or torch.device(device).type == "cpu":
            return made
        return torch.empty(made.shape, dtype=made.dtype).to(device)

    return tensor


def _convert(module: Any, fn: Any, recurse: bool = True) -> Any:
    """`Module.to` for fake parameters, also to another device; torch's own cannot swap them."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                converted = fn(parameter)
            module._parameters[name] = nn.Parameter(converted, requires_grad=parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module
