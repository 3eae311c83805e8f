"""A model read layer by layer gives transformers' own logits, and holds no weight of its linears."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.base import resolve_base
from qlora_trainer.model.quantized import hidden_states
from qlora_trainer.model.streamed import StreamedLinear, stream_model
from qlora_trainer.step.loss import chunk_logits
from tests.hardware.profiled_memory import allocated_by
from tests.model.peft_oracle import logits
from tests.model.tiny_bases import CONFIGS, write_base
from tests.model.tiny_models import CPU, packed, relative_error, tiny_documents

DOCUMENTS = tiny_documents(33, 21)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen2", "gemma2", "phi"])
def test_its_logits_are_those_of_transformers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = resolve_base(str(write_base(tmp_path / "base", CONFIGS[name], dtype=dtype)))
    model = stream_model(base.folder, base.config, compute_dtype=torch.float32, device=CPU)
    row = packed(DOCUMENTS)
    oracle = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        hidden_BTH = hidden_states(model, row.input_ids_BT, row.position_ids_BT, row.document_lengths)
        found_TV = chunk_logits(hidden_BTH[0, : row.num_tokens], model.head, model.logit_shape)
        assert relative_error(found_TV, logits(oracle, DOCUMENTS)) <= 1e-5


def test_no_weight_of_a_linear_stays_in_memory(tmp_path: Path) -> None:
    base = resolve_base(str(write_base(tmp_path / "base", CONFIGS["llama"], max_shard_size="13KB")))
    model = stream_model(base.folder, base.config, compute_dtype=torch.float32, device=CPU)
    linear = model.module.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(linear, StreamedLinear)
    assert not list(linear.parameters())
    assert not list(linear.buffers())
    x = torch.randn(2, 128)
    allocated = allocated_by(lambda: linear(x))
    weight_bytes = 64 * 128 * 4
    assert allocated.net_bytes <= 2**10
    assert allocated.peak_bytes <= weight_bytes + 13_000 + 2**12  # the profiler counts the mapped file as allocated


def test_a_folder_without_its_weights_is_refused(tmp_path: Path) -> None:
    base = resolve_base(str(write_base(tmp_path / "base", CONFIGS["llama"])))
    for path in base.folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"no \*.safetensors"):
        stream_model(base.folder, base.config, compute_dtype=torch.float32, device=CPU)
