"""The benchmark against published GPU memory runs without the peer's packages, and its parts are what they claim."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peer_model
from benchmarks.peer_allocator import MIB, CachingAllocator, unsplit_bytes
from benchmarks.peer_rows import CannotHandle, check, release_of
from benchmarks.peer_skeleton import DEPTHS
from benchmarks.peer_speed import tokens_per_second
from benchmarks.published_memory import main, print_table
from benchmarks.published_prediction import Prediction, extrapolate
from tests.benchmarks.published_rows import CONFIG, ROW

FUSED = {"loss": "fused_over_full_logits", "peer_kernels": "fused LoRA + RMSNorm + RoPE + loss"}
LOGITS_BYTES = 2 * 512 * 1000  # one byte a logit


def forward_bytes(**changes: Any) -> float:
    """The most alive in forward and loss, in two layers."""
    return peer_model.trace(ROW | changes, 2).forward_bytes


def test_a_row_is_modelled_and_a_mixture_of_experts_is_null_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = ROW | {"id": "experts", "config": CONFIG | {"model_type": "mixtral", "num_local_experts": 8}}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in (ROW, experts)))

    exit_code = main(["--rows", str(rows), "--json"])

    first, second = json.loads(capsys.readouterr().out)["rows"]
    assert exit_code == 1  # the row's "published" figures are invented
    assert (first["id"], first["how"], first["reason"]) == ("small", "modelled", None)
    assert first["published_static_bytes"] == round(0.02 * 2**30)
    # 2 cuBLAS workspaces and 4.4 million parameters, 0.5 million of them in 16 bits
    assert 2 * 8_519_680 < first["traced_static_bytes"] < 2 * 8_519_680 + 6 * MIB
    assert first["traced_static_bytes"] < first["traced_peak_bytes"]
    assert first["predicted_tokens_per_second"] > 0
    assert (second["how"], second["traced_static_bytes"], second["traced_peak_bytes"]) == (None, None, None)
    assert "experts" in second["reason"]


def test_two_shallow_depths_give_the_full_one() -> None:
    full = peer_model.trace(ROW, CONFIG["num_hidden_layers"]).as_dict()
    shallow = [peer_model.trace(ROW, depth).as_dict() for depth in DEPTHS]
    figures = extrapolate(shallow, DEPTHS, CONFIG["num_hidden_layers"])

    assert figures == pytest.approx(full, rel=1e-9)


@pytest.mark.slow
def test_what_is_held_beside_the_loss_is_seen() -> None:
    """transformers >= 4.46 holds the 16-bit logits while the loss is computed; the fused loss saves a copy in fp32."""
    newer, older = forward_bytes(), forward_bytes(path="refs/a100_80gb_liger.csv")
    fused = forward_bytes(**FUSED)

    assert newer - older == pytest.approx(2 * LOGITS_BYTES, rel=0.01)
    assert 4 * LOGITS_BYTES < newer - fused < 5 * LOGITS_BYTES  # and less for the norms
    assert forward_bytes(**FUSED | {"loss": "chunked_linear"}) < fused - 4 * LOGITS_BYTES
    assert forward_bytes(kbit_fp32_upcast=True) > newer + 2 * 1024 * 256  # a residual stream of fp32


def test_the_release_is_the_files() -> None:
    assert release_of(ROW) == "4.48"
    assert release_of(ROW | {"path": "scripts/benchmarks/refs/a100_80gb_liger.csv"}) == "4.45"


@pytest.mark.parametrize(
    "changes",
    [{"quant": "gptq"}, {"loss": "unknown"}, {"optimizer": "paged_adamw_8bit"}, {"loss": "chunked_linear"}],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_what_is_not_known_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(CannotHandle):
        check(ROW | changes)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"config": CONFIG | {"model_type": "no such model"}}, "does not build"),
        ({"target_modules": ["c_attn"]}, "no linear layer"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head is no linear layer"),
        ({"micro_batch": "two"}, "does not run"),
    ],
)
def test_a_model_that_cannot_be_modelled_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(CannotHandle, match=reason):
        peer_model.trace(ROW | changes, 2)


def test_blocks_are_split_where_more_than_one_mib_is_left() -> None:
    allocator = CachingAllocator()
    whole = allocator.allocate(21 * MIB + MIB // 2)
    assert (whole.num_bytes, allocator.allocated_bytes, allocator.reserved_bytes) == (22 * MIB, 22 * MIB, 22 * MIB)
    split = allocator.allocate(12 * MIB + 512)
    assert (split.num_bytes, allocator.reserved_bytes) == (12 * MIB + 512, 36 * MIB)

    allocator.free(whole)
    allocator.free(split)

    assert allocator.allocated_bytes == 0
    assert allocator.allocate(14 * MIB).num_bytes == 14 * MIB  # the pieces were merged again
    assert allocator.reserved_bytes == 36 * MIB


def test_weights_of_even_mebibytes_leave_nothing_unsplit() -> None:
    def unsplit(num_elements: int) -> int:
        return unsplit_bytes(((f"layers.{layer}.weight", num_elements, True) for layer in range(4)), double_quant=True)

    assert unsplit(4096 * 14336) == 0
    assert 0 < unsplit(4096 * 11008) <= 4 * MIB


def test_an_unknown_gpu_has_no_speed() -> None:
    work = {"gemm_flops": 1e15, "attention_flops": 1e14, "moved_bytes": 1e12, "launches": 1e4}

    assert tokens_per_second("A100-80GB", 16384, work) == pytest.approx(3000, rel=0.2)
    assert tokens_per_second("another", 16384, work) is None


def test_a_low_peak_is_worse_than_a_high_one(capsys: pytest.CaptureFixture[str]) -> None:
    def stock(peak: int) -> Prediction:
        return Prediction("row", "traced", 1000, 1000, peak, 1000)

    assert stock(1015).is_within_bounds()
    assert not stock(985).is_within_bounds()
    print_table([stock(985)])
    assert "off" in capsys.readouterr().out
