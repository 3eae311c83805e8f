"""No published row ends the report: what cannot be handled has null for figures, and a reason that says why."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peer_model, peer_rows, peer_skeleton, peer_unsloth
from benchmarks.peer_rows import CannotHandle
from benchmarks.peer_skeleton import DEPTHS, survey
from benchmarks.published_memory import ROWS, main, predict
from benchmarks.published_prediction import GIB, workspace_bytes
from qlora_trainer.hardware.device_memory import CUBLAS_WORKSPACE_BYTES, CUBLAS_WORKSPACE_HOPPER_BYTES
from tests.benchmarks.published_rows import CONFIG, ROW

REPOSITORY = Path(__file__).parents[2]
QWEN3 = CONFIG | {"model_type": "qwen3", "head_dim": 64, "sliding_window": None}
FULL = "full_attention"
FUSED = {"loss": "chunked_linear", "peer_kernels": "fused LoRA + RMSNorm + RoPE + loss"}

OPTIONAL = {"id", "path", "gpu", "static_allocated_gib", "peak_allocated_gib", "tokens_per_second"}

UNHANDLED: list[tuple[Any, str]] = [
    (None, "JSON object, not null"),
    ([], r"JSON object, not \[\]"),
    ({}, "config: null is no object"),
    (ROW | {"config": None}, "config: null is no object"),
    (ROW | {"config": {"num_hidden_layers": 2}}, "no model_type"),
    (ROW | {"config": {"model_type": "mistral"}}, "no num_hidden_layers"),
    (ROW | {"config": CONFIG | {"num_hidden_layers": 2.5}}, "num_hidden_layers: 2.5"),
    (ROW | {"config": CONFIG | {"num_hidden_layers": 10**9}}, "more than 1000"),
    (ROW | {"config": CONFIG | {"hidden_size": "large"}}, "does not build it: .*hidden_size"),
    (ROW | {"config": CONFIG | {"hidden_size": 255}}, "does not build it: .*head_dim"),
    (ROW | {"config": QWEN3 | {"layer_types": [FULL] * 3}}, "does not build it: .*layer_types"),
    (ROW | {"config": CONFIG | {"model_type": "gpt2"}}, r"c_attn\.weight is no weight of a linear layer"),
    (ROW | {"config": CONFIG | {"model_type": "mixtral"}}, "mixture of experts"),
    (
        ROW | {"config": CONFIG | {"model_type": "mixtral", "num_local_experts": None}},
        "does not build it: .*num_local_experts",
    ),
    (ROW | {"config": CONFIG | {"model_type": "olmo2"}}, "give --peer-python"),
    (ROW | {"target_modules": None}, "target_modules: null"),
    (ROW | {"target_modules": "q_proj"}, 'target_modules: "q_proj"'),
    (ROW | {"target_modules": [1]}, r"target_modules: \[1\]"),
    (ROW | {"target_modules": []}, r"target_modules: \[\]"),
    (ROW | {"quant": None}, "quant: null is none of nf4, fp4"),
    (ROW | {"quant": ["nf4"]}, r'quant: \["nf4"\]'),
    (ROW | {"loss": None}, "loss: null"),
    (ROW | {"optimizer": "paged_adamw_32bit"}, 'optimizer: "paged_adamw_32bit"'),
    (ROW | {"attention": "sdpa"}, 'attention: "sdpa"'),
    (ROW | {"lora_dtype": "bfloat16"}, 'lora_dtype: "bfloat16"'),
    (ROW | {"lora_rank": 0}, "lora_rank: 0"),
    (ROW | {"lora_rank": True}, "lora_rank: true"),
    (ROW | {"lora_alpha": "16"}, 'lora_alpha: "16"'),
    (ROW | {"lora_dropout": 1.5}, r"lora_dropout: 1\.5"),
    (ROW | {"lora_dropout": float("nan")}, "lora_dropout: NaN"),
    (ROW | {"double_quant": None}, "double_quant: null"),
    (ROW | {"seq_len": -1}, "seq_len: -1"),
    (ROW | {"path": 7}, "path: 7"),
    (ROW | {"peer_kernels": None}, "peer_kernels: null"),
    (ROW | {"peer_kernels": "fused RoPE"}, "peer_kernels: fused RoPE"),
    (ROW | FUSED | {"config": CONFIG | {"model_type": "qwen2"}}, "no fused kernels for qwen2"),
    (ROW | FUSED | {"target_modules": ["up_proj"]}, "fused MLP is not modelled"),
]


@pytest.mark.parametrize("row, reason", UNHANDLED, ids=[reason for _, reason in UNHANDLED])
def test_a_row_that_cannot_be_handled_is_null_with_a_reason(row: Any, reason: str) -> None:
    (found,) = predict([row], {})

    assert (found.how, found.traced_static_bytes, found.traced_peak_bytes) == (None, None, None)
    assert found.predicted_tokens_per_second is None
    assert found.reason is not None
    assert "\n" not in found.reason
    assert re.search(reason, found.reason)


@pytest.mark.parametrize("key", sorted(ROW.keys() - OPTIONAL))
def test_a_key_that_is_missing_is_a_reason(key: str) -> None:
    (found,) = predict([{name: value for name, value in ROW.items() if name != key}], {})
    assert found.traced_peak_bytes is None
    assert key in (found.reason or "")


def test_some_keys_may_be_missing() -> None:
    (found,) = predict([{key: value for key, value in ROW.items() if key not in OPTIONAL}], {})
    assert found.traced_peak_bytes is not None
    assert (found.id, found.published_peak_bytes, found.is_within_bounds(), found.reason) == ("row 1", None, True, None)


def test_broken_lines_are_told_and_the_others_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    deep = "[" * 100_000
    odd = ROW | {"id": "a\u2028b", "static_allocated_gib": "4.0", "peak_allocated_gib": float("nan"), "gpu": None}
    text = "\n".join([json.dumps(ROW), '{"id": "cut', "", "7", deep, json.dumps(odd, ensure_ascii=False)])
    rows.write_bytes(b"\xef\xbb\xbf" + text.encode())

    main(["--rows", str(rows), "--json"])

    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["rows"]
    assert [one["id"] for one in found] == ["small", "row 2", "row 3", "row 4", "a\u2028b"]
    assert [one["how"] for one in found] == ["modelled", None, None, None, "modelled"]
    assert "line 2 is not JSON" in found[1]["reason"]
    assert "line 5 is not JSON" in found[3]["reason"]
    assert (found[4]["published_static_bytes"], found[4]["published_peak_bytes"]) == (None, None)
    assert "static_allocated_gib" in found[4]["reason"]
    assert found[4]["traced_peak_bytes"] == found[0]["traced_peak_bytes"]
    assert found[4]["predicted_tokens_per_second"] is None


def test_rows_with_one_id_keep_their_own_figures() -> None:
    longer, broken = ROW | {"seq_len": 1024}, ROW | {"quant": "gptq"}
    first, second, third = predict([ROW, longer, broken], {})

    assert first.id == second.id == third.id == "small"
    assert first.traced_peak_bytes is not None
    assert second.traced_peak_bytes is not None
    assert first.traced_peak_bytes < second.traced_peak_bytes
    assert (first.reason, second.reason, third.traced_peak_bytes) == (None, None, None)


def test_layer_types_are_cut_with_the_layers() -> None:
    plain = ROW | {"config": QWEN3 | {"num_hidden_layers": 4}}
    listed = ROW | {"config": QWEN3 | {"num_hidden_layers": 4, "layer_types": [FULL] * 4}}

    assert survey(listed).depths == DEPTHS
    assert peer_model.trace(listed, 2) == peer_model.trace(plain, 2)
    (found,) = predict([listed], {})
    assert found.traced_peak_bytes is not None
    assert "never compared" in (found.reason or "")


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_shallow_model_is_traced_as_it_is(num_layers: int) -> None:
    row = ROW | {"config": CONFIG | {"num_hidden_layers": num_layers}}
    assert survey(row).depths == (num_layers,)
    (found,) = predict([row], {})
    assert found.traced_peak_bytes is not None


def test_a_model_of_unlike_layers_is_traced_whole() -> None:
    types = ["sliding_attention", FULL, FULL, FULL]
    row = ROW | {
        "config": QWEN3
        | {"num_hidden_layers": 4, "layer_types": types, "sliding_window": 64, "use_sliding_window": True}
    }

    assert survey(row).depths == (4,)
    (found,) = predict([row], {})
    assert found.traced_peak_bytes is not None


def test_every_head_is_computed_as_the_model_does() -> None:
    """What a head does beside its product is of the logits' size: some bytes a logit more, and never forgotten."""
    base = CONFIG | {"num_hidden_layers": 2, "head_dim": 64, "vocab_size": 32000}
    row = ROW | {"seq_len": 256, "micro_batch": 1}
    capped, plain = (
        peer_model.trace(row | {"config": base | {"model_type": "gemma2", "final_logit_softcapping": cap}}, 2)
        for cap in (30.0, None)
    )
    assert capped.backward_bytes - plain.backward_bytes >= 2 * 256 * 32000


def test_a_head_that_does_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lean(model: Any, hidden: Any) -> Any:
        return model.lm_head(hidden)

    monkeypatch.setattr(peer_skeleton, "logits_of", lean)
    config = CONFIG | {"model_type": "granite", "logits_scaling": 8.0, "sliding_window": None}
    with pytest.raises(CannotHandle, match=r"its head is not modelled: .*div"):
        peer_skeleton.build_skeleton(ROW | {"config": config}, 2)


def test_all_linear_is_every_layer_but_the_head() -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    every, listed = (peer_model.trace(ROW | {"target_modules": targets}, 2) for targets in ("all-linear", names))
    assert every == listed
    assert peer_model.trace(ROW | {"target_modules": ["self_attn.q_proj"]}, 2).static_bytes < listed.static_bytes


def test_what_a_release_computed_otherwise_is_refused_for_that_release() -> None:
    config = {key: value for key, value in CONFIG.items() if key != "sliding_window"} | {"model_type": "starcoder2"}
    with pytest.raises(CannotHandle, match=r"4\.48: give --peer-python"):
        peer_skeleton.build_skeleton(ROW | {"config": config}, 2)
    peer_skeleton.build_skeleton(ROW | {"config": config, "path": "refs/a100_80gb_liger.csv"}, 2)


def test_before_4_48_qwen2_expands_its_keys() -> None:
    config = {key: value for key, value in CONFIG.items() if key != "sliding_window"} | {"model_type": "qwen2"}
    row = ROW | {"config": config, "activation_checkpointing": False}
    newer, older = (peer_model.trace(row | {"path": f"refs/{name}"}, 2) for name in ("new.csv", "a100_80gb_liger.csv"))
    assert older.backward_bytes > newer.backward_bytes


def test_the_workspace_is_that_of_the_gpu() -> None:
    assert workspace_bytes("H100-80GB") == workspace_bytes("H200") == CUBLAS_WORKSPACE_HOPPER_BYTES
    assert workspace_bytes("A100-80GB") == workspace_bytes("L40") == workspace_bytes(None) == CUBLAS_WORKSPACE_BYTES


def test_the_rows_in_the_repository_are_of_a_kind_that_is_known() -> None:
    rows = peer_rows.read_rows(ROWS.read_text(encoding="utf-8"))
    assert len(rows) == 14
    for row in rows:
        peer_rows.check(row)


@pytest.mark.slow
def test_the_rows_in_the_repository_are_all_predicted_within_bounds() -> None:
    """The report itself passes over what our tracer cannot do: it ends well where all rows have reasons."""
    found = predict(peer_rows.read_rows(ROWS.read_text(encoding="utf-8")), {})
    assert [(one.how, one.reason) for one in found] == [("modelled", None)] * 14
    for one in found:
        assert None not in one.errors().values()
        assert one.is_within_bounds(), one


@pytest.mark.parametrize("predicted_gib, exit_code", [(11.9, 0), (9.0, 1)])
def test_unsloths_line_has_a_bound(
    predicted_gib: float, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    monkeypatch.setattr(peer_unsloth, "CONTEXTS", {12: 932})
    monkeypatch.setattr(peer_unsloth, "_peak_bytes", lambda context: (predicted_gib - peer_unsloth.CONTEXT_GIB) * GIB)

    assert main(["--rows", str(rows), "--unsloth-line", "--json"]) == exit_code


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--rows", "no-such-file"], "no-such-file: No such file"),
        (["--rows", "ROWS", "--peer-python", "no-such-python"], "no-such-python: No such file"),
        (["--rows", "ROWS", "--peer-python", "false"], "has no transformers"),
    ],
)
def test_a_wrong_argument_is_told_in_a_line(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    with pytest.raises(SystemExit, match="2"):
        main([str(rows) if argument == "ROWS" else argument for argument in arguments])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", ["published_memory", "plan_accuracy"])
def test_a_benchmark_runs_as_a_file_from_anywhere(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / f"{name}.py"), "--help"]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith(f"usage: {name}.py")
