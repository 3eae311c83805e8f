"""The peer's own code, traced: runs in a virtual environment with its pinned packages (`peer_requirements*.txt`).

    PEER_PYTHON -m benchmarks.peer_traced < JOBS > RESULTS

`published_memory.py --peer-python` starts it. transformers' model, PEFT's layers, bitsandbytes' `Linear4bit`,
transformers' checkpointing and loss, accelerate's wrapper of the outputs and, for rows with fused kernels, the plugin
`fms-acceleration-foak` run as they are installed; see `peer_fakes.py` for what is replaced.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peer_fakes, peer_rows
from benchmarks.peer_step import Trace, trace_step

REENTRANT = {"use_reentrant": True}  # the default of torch 2.4, which the peer leaves as it is


def _peer(name: str) -> Any:
    """A module of the peer's release, whose names and types are not those of the installed one."""
    return importlib.import_module(name)


def build_skeleton(row: Mapping[str, Any], num_layers: int) -> Any:
    """The peer's quantized model without adapters, on meta; not under fake tensors, which `Params4bit` cannot wrap."""
    transformers, integration = _peer("transformers"), _peer("transformers.integrations.bitsandbytes")
    config = transformers.AutoConfig.for_model(**peer_rows.at_depth(row["config"], num_layers))
    config.use_cache = False
    config._attn_implementation_internal = config._attn_implementation = "flash_attention_2"
    config._attn_implementation_autoset = True
    config._pre_quantization_dtype = torch.bfloat16
    model_class: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"), transformers.modeling_utils.no_init_weights():
        model: Any = model_class(config)
    peer_rows.check_model(model)
    torch.set_default_dtype(torch.float32)
    model.tie_weights()
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_use_double_quant=row["double_quant"],
        bnb_4bit_quant_type=row["quant"],
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    integration.replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantization)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.quantization_method = "bitsandbytes"
    return model


def build(skeleton: Any, row: Mapping[str, Any]) -> Any:
    """The peer's model as it is when training starts; under fake tensors."""
    made: dict[int, nn.Parameter] = {}  # a tied head is its embedding
    for module in skeleton.modules():
        if type(module).__name__ == "Linear4bit":
            module.weight = quantized_weight(module, row)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    storage = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(storage, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return adapt(skeleton, row)


def quantized_weight(linear: Any, row: Mapping[str, Any]) -> nn.Parameter:
    """What bitsandbytes 0.43's `quantize_4bit` leaves: packed weight, absmax, the code book and a nested absmax.

    A plain parameter: `Params4bit` cannot wrap a fake tensor, and nothing that runs asks for more than its attributes.
    """
    functional = _peer("bitsandbytes.functional")
    num_blocks = linear.in_features * linear.out_features // 64
    state = {
        "shape": torch.Size((linear.out_features, linear.in_features)),
        "code": torch.empty(16, dtype=torch.float32),
        "blocksize": 64,
        "quant_type": row["quant"],
        "dtype": torch.bfloat16,
    }
    if row["double_quant"]:
        nested = functional.QuantState(
            absmax=torch.empty(-(-num_blocks // 256), dtype=torch.float32),
            code=functional.name2qmap.setdefault("dynamic", torch.empty(256, dtype=torch.float32)),
            blocksize=256,
            dtype=torch.float32,
        )
        state |= {
            "absmax": torch.empty(num_blocks, dtype=torch.uint8),
            "offset": torch.empty((), dtype=torch.float32),
            "state2": nested,
        }
    else:
        state["absmax"] = torch.empty(num_blocks, dtype=torch.float32)
    packed = torch.empty((linear.in_features * linear.out_features // 2, 1), dtype=torch.uint8)
    weight: Any = nn.Parameter(packed, requires_grad=False)
    for name, value in (
        ("quant_state", functional.QuantState(**state)),
        ("compress_statistics", row["double_quant"]),
        ("quant_type", row["quant"]),
        ("bnb_quantized", True),
    ):
        setattr(weight, name, value)
    linear.quant_state = weight.quant_state
    return weight  # type: ignore[no-any-return]


def adapt(model: Any, row: Mapping[str, Any]) -> Any:
    """PEFT's adapters, prepared by PEFT and TRL (`kbit_fp32_upcast`) or by the plugin, which upcasts nothing."""
    peft = _peer("peft")
    lora = peft.LoraConfig(
        r=row["lora_rank"],
        lora_alpha=row["lora_alpha"],
        lora_dropout=row["lora_dropout"],
        target_modules=row["target_modules"],
        task_type="CAUSAL_LM",
    )
    if row["kbit_fp32_upcast"]:
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=row["activation_checkpointing"], gradient_checkpointing_kwargs=REENTRANT
        )
        model = peft.get_peft_model(model, lora)
        cast_as_trl(model)
    else:  # fms-acceleration, plugins/accelerated-peft, framework_plugin_bnb.py, _prepare_model_for_kbit_training
        model.requires_grad_(False)
        if row["activation_checkpointing"]:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=REENTRANT)
        model = peft.get_peft_model(model, lora)
    if row["peer_kernels"] != "stock":
        patch_with_foak(model, row)
    model.train()
    return model


def cast_as_trl(model: nn.Module) -> None:
    """TRL 0.11-0.13, trl/trainer/utils.py, peft_module_casting_to_bf16: norms fp32, embedding and head bf16 again."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) or "norm" in name:
            module.to(torch.float32)
        elif any(part in name for part in ("lm_head", "embed_tokens", "wte", "wpe")):
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dtype == torch.float32:
                module.to(torch.bfloat16)


def patch_with_foak(model: Any, row: Mapping[str, Any]) -> None:
    """The plugin's rules, as its `augmentation` selects them."""
    patcher = _peer("fms_acceleration.model_patcher")
    plugin = _peer("fms_acceleration_foak.framework_plugin_fast_kernels")
    terms = {"fused_over_full_logits": {"cross-ent", "custom-loss"}, "chunked_linear": {"fused-lce"}}
    with peer_fakes.importing_triton_kernels():
        plugin.register_foak_model_patch_rules(
            base_type="bitsandbytes",
            filter_endswith=terms.get(row["loss"], set()) | {"qkvo", "mlp", "rms", "rope"},
            config=model.get_base_model().config,
        )
    patcher.patch_model(model)


def loss_of(model: Any) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """transformers' `Trainer.compute_loss` around accelerate's `prepare_model`: outputs are held in these frames."""
    from accelerate.utils import convert_outputs_to_fp32

    model.forward = MethodType(torch.autocast("cpu", torch.bfloat16)(model.forward.__func__), model)
    model.forward = MethodType(convert_outputs_to_fp32(model.forward.__func__), model)

    def compute_loss(inputs: Mapping[str, Tensor]) -> Tensor:
        # No attention_mask: the model would look into it ("0.0 in attention_mask") and, as no row is padded, drop it.
        outputs = model(input_ids=inputs["input_ids"], labels=inputs["labels"])
        loss: Tensor = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        return loss

    return compute_loss


def trace(row: Mapping[str, Any], num_layers: int) -> Trace:
    """One step of the peer with this many layers."""
    skeleton = build_skeleton(row, num_layers)
    return trace_step(row, build=lambda: build(skeleton, row), loss_of=loss_of)


def prepare() -> None:
    """Replace the kernels; before the peer's packages import names from theirs."""
    peer_fakes.fake_bitsandbytes()
    peer_fakes.fake_flash_attention()
    transformers = _peer("transformers")
    transformers.utils.is_flash_attn_2_available = lambda: True  # modules import the kernels only if it says so
    transformers.PreTrainedModel._check_and_enable_flash_attn_2 = classmethod(lambda cls, config, **kwargs: config)


def run_job(row: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """One trace, or why there is none."""
    try:
        return {"trace": trace(row, num_layers).as_dict()}
    except Exception as error:  # noqa: BLE001  whatever the peer's code cannot do is told, and the row is modelled
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def in_a_process(row: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """`run_job` in a process of its own: the plugin's patches of transformers stay, and a crash ends one trace only."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(run_job, row, num_layers).result()
        except BrokenProcessPool as error:
            return {"error": f"its process died: {error}"}


def main() -> int:
    """Reads a JSON list of (row, depths), prints a list of `{"traces"}` or `{"error"}` on the last line."""
    prepare()
    answers = []
    for row, depths in json.load(sys.stdin):
        own = [in_a_process(row, num_layers) for num_layers in depths]
        errors = [one["error"] for one in own if "error" in one]
        answers.append({"error": errors[0]} if errors else {"traces": [one["trace"] for one in own]})
    print(json.dumps(answers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
