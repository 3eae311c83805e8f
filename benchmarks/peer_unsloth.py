"""Unsloth's published line for stock transformers with FlashAttention 2: the largest context on a GPU of so many "GB".

Llama-3.1-8B, QLoRA of rank 32 on all linear layers, one padded row (unsloth.ai/blog/llama3-3, December 2024). Its seven
points lie on GB = 9.697 + 2.471e-3 x context. The script that measured them is not public; the model here is one that
fits, by what stock packages do: PEFT's `prepare_model_for_kbit_training` makes norms, embedding and head fp32
(TRL's cast back to 16 bit left out), and the outputs, with their fp32 logits, live in the frame that calls `backward`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import peer_model
from benchmarks.peer_skeleton import DEPTHS
from benchmarks.published_prediction import GIB, PHASES, extrapolate
from qlora_trainer.hardware.device_memory import CUBLAS_WORKSPACE_BYTES, NUM_CUBLAS_WORKSPACES

BOUND = 0.05
CONTEXTS = {12: 932, 16: 2551, 24: 5789, 40: 12264, 48: 15502, 80: 28454}  # GB -> tokens
# A CUDA 12.1 context on an A100: row pm0177 (nothing large is ever free there) says 13.839 GiB by the driver, and the
# allocator's simulation of it 13.402 reserved.
CONTEXT_GIB = 0.44
ROW: Mapping[str, Any] = {
    "config": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "path": "",
    "double_quant": True,
    "lora_rank": 32,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_dtype": "float32",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "kbit_fp32_upcast": True,
    "embedding_dtype": "float32",
    "outputs_outlive_loss": True,
    "loss": "transformers_fp32",
    "peer_kernels": "stock",
    "activation_checkpointing": True,
    "micro_batch": 1,
}


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the line.

    Attributes:
        published_gb: the GPU's size as published: what is sold as so many GB has so many GiB.
        predicted_gib, predicted_gb: allocated at most, and the CUDA context, in 2^30 and in 1e9 bytes.
        error: predicted_gib / published_gb - 1.
    """

    context: int
    published_gb: float
    predicted_gib: float
    predicted_gb: float
    error: float

    def is_within_bounds(self) -> bool:
        return abs(self.error) <= BOUND


def points() -> list[Point]:
    """The published points, predicted."""
    found = []
    for size, context in CONTEXTS.items():
        predicted = _peak_bytes(context) + CONTEXT_GIB * GIB
        in_gib, in_gb = predicted / GIB, predicted / 1e9
        found.append(Point(context, size, round(in_gib, 2), round(in_gb, 2), round(in_gib / size - 1, 4)))
    return found


def _peak_bytes(context: int) -> float:
    row = {**ROW, "seq_len": context}
    traces = [peer_model.trace(row, num_layers).as_dict() for num_layers in DEPTHS]
    figures = extrapolate(traces, DEPTHS, row["config"]["num_hidden_layers"])
    return max(figures[phase] for phase in PHASES) + NUM_CUBLAS_WORKSPACES * CUBLAS_WORKSPACE_BYTES
