"""Steps of several sizes: what is asked of each point, models of random weights, tables and plots; one tiny step."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.random_nf4 import random_model
from benchmarks.scaling import LIMIT_7B_BYTES, SWEEPS, is_within_limits, point_json, points, table
from benchmarks.scaling_plot import curves, write_plot
from benchmarks.scaling_point import PointSpec
from qlora_trainer.model import nf4


@pytest.mark.parametrize("sweep", SWEEPS)
def test_only_what_is_swept_varies(sweep: str) -> None:
    found = [asdict(spec) for spec in points(sweep, num_steps=3, dtype="auto")]
    varying = {key for key in found[0] if len({str(point[key]) for point in found}) > 1}

    assert sweep in varying
    assert varying <= {sweep, "is_recomputed", "limit_bytes", "num_steps"}
    assert {point[sweep] for point in found} == set(SWEEPS[sweep])


def test_the_7b_step_has_a_limit() -> None:
    *others, largest = points("model", num_steps=3, dtype="auto")

    assert largest.model == "7b"
    assert largest.micro_batch_tokens == 256
    assert largest.is_recomputed
    assert largest.limit_bytes == LIMIT_7B_BYTES == 6 * 2**30
    assert all(spec.limit_bytes is None for spec in others)


def test_documents_must_fill_the_micro_batch() -> None:
    with pytest.raises(ValueError, match="must fill the micro-batch"):
        PointSpec(model="tiny", micro_batch_tokens=100, seq_len=64)


def test_random_weights_are_of_the_right_size_and_differ() -> None:
    model = random_model("tiny", torch.float32)
    first, second = (model.linears[f"model.layers.{layer}.mlp.up_proj"] for layer in (0, 1))
    weight_OI = nf4.dequantize(first.weight, torch.float32)

    assert weight_OI.shape == (512, 256)
    assert 0.01 < float(weight_OI.std()) < 0.05
    assert not torch.equal(first.packed, second.packed)
    assert first.absmax.data_ptr() != second.absmax.data_ptr()
    assert first.nested_absmax is not None
    assert float(model.head.weight.float().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.slow
def test_a_point_is_measured(tmp_path: Path) -> None:
    spec = PointSpec(
        model="tiny", micro_batch_tokens=64, seq_len=32, rank=2, dtype="float32", num_steps=1, limit_bytes=2**40
    )

    asked, result = tmp_path / "spec.json", tmp_path / "result.json"
    asked.write_text(json.dumps(asdict(spec)))
    subprocess.run([sys.executable, "-m", "benchmarks.scaling_point", asked, result], check=True)  # its peak is its own

    point = point_json(asdict(spec), json.loads(result.read_text()))

    assert len(point["step_seconds"]) == 1
    assert point["tokens_per_second"] == pytest.approx(64 / point["seconds"])
    assert 0 < point["import_bytes"] < point["process_peak_bytes"]
    assert point["process_peak_bytes"] >= point["peak_bytes"]
    assert point["base_parameters"] > 2 * 256 * 1024
    linears = 2 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512))  # layers, q and o, k and v, gate up down
    assert point["trainable_parameters"] == 2 * linears
    assert is_within_limits([point])
    assert not is_within_limits([point | {"limit_bytes": 2**20}])


def _point(**changes: Any) -> dict[str, Any]:
    spec = asdict(
        PointSpec(model="135m", micro_batch_tokens=1024, seq_len=256) if not changes else PointSpec(**changes)
    )
    measured = {
        "import_bytes": 2**29,
        "peak_bytes": 2**30,
        "timed_peak_bytes": 2**30 + 2**20,
        "process_peak_bytes": 2**31,
        "step_seconds": [1.0, 4.0, 2.0],
        "base_parameters": 1000,
        "compute_dtype": "float32",
    }
    return point_json(spec, measured)


def test_the_table_has_a_row_a_point() -> None:
    text = table({"machine_in_words": "2 cores", "sweeps": {"rank": [_point(), _point()], "model": []}})

    row = "| 135m | 1,024 | 256 | 16 | kept | 2.00 | 512 | 512 | 513 | 2.00 |"
    assert text.count(row) == 2
    assert "## Parameters of the base" in text


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_plot_is_written_and_the_same_twice(tmp_path: Path, sweep: str) -> None:
    found = [
        _point(model="135m", micro_batch_tokens=tokens, seq_len=64, is_recomputed=policy)
        | {"base_parameters": tokens, "seq_len": tokens, "rank": tokens}
        for tokens in (512, 64, 128)
        for policy in (True, False)
    ]

    assert [point["rank"] for point in curves(sweep, found)[True]] == [64, 128, 512]
    for name in ("one.png", "two.png"):
        write_plot(sweep, found, tmp_path / name)

    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
