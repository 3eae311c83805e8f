"""How many micro-batches a global batch takes, and which sizes are tried."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qlora_trainer.data.micro_batches import cut
from qlora_trainer.hardware.cpu_speed import CpuSpeed
from qlora_trainer.hardware.gpu_catalogue import find_gpu
from qlora_trainer.planning import throughput
from qlora_trainer.planning.search import MAX_MULTIPLES, TOKEN_STEP, token_steps
from qlora_trainer.planning.throughput import Demand
from qlora_trainer.step.batch import ROW_MULTIPLE


@given(st.integers(8, 500), st.integers(1, 40), st.integers(0, 499))
def test_equal_documents_fill_what_the_cut_fills(length: int, number: int, rest: int) -> None:
    tokens = number * length + rest % length
    demand = Demand(4 * number, float(length), length)

    assert demand.filled_tokens(tokens) == number * length
    assert len(cut([length] * 4 * number, tokens)) == demand.num_micro_batches(tokens) == 4


@given(st.integers(8, 10_000), st.integers(8, 10_000))
@example(seq_len=11, stretched_to=25)
def test_a_micro_batch_holds_a_document_of_a_stretched_length(seq_len: int, stretched_to: int) -> None:
    """As a frontier stretches documents to other lengths. Fails without the lower bound: 11 * (25 / 11) > 25."""
    stretch = stretched_to / seq_len
    demand = Demand(16, seq_len * stretch, seq_len * stretch)

    assert demand.filled_tokens(stretched_to) == pytest.approx(stretched_to)


def test_a_batch_that_fits_whole_is_one_micro_batch() -> None:
    """Of nearly equal documents a mean does not tell: eight of 200 to 208 tokens fit 1,664, as eight means do."""
    lengths = [200, 201, 203, 204, 204, 205, 207, 208] * 20
    demand = Demand(8, sum(lengths) / len(lengths), min(lengths), float(np.std(lengths)))
    assert demand.filled_tokens(1664) < demand.usual_batch_tokens < 1664  # what two micro-batches were counted for
    assert demand.num_micro_batches(1664) == len(cut(lengths[:8], 1664)) == 1
    assert demand.num_micro_batches(1024) == len(cut(lengths[:8], 1024)) == 2


def test_short_documents_fill_the_gaps() -> None:
    lengths = [190, 10, 100, 100, 150, 40, 10] * 8
    demand = Demand(len(lengths), sum(lengths) / len(lengths), min(lengths))

    assert len(cut(lengths, 200)) == pytest.approx(demand.num_micro_batches(200), rel=0.1)


@given(st.integers(8, 5000), st.integers(1, 64))
def test_both_ends_the_steps_between_and_whole_documents_are_tried(seq_len: int, number: int) -> None:
    steps = token_steps(seq_len, number * seq_len, multiples_of=seq_len)

    assert list(steps) == sorted(set(steps))
    assert 0 <= steps[0] - seq_len < ROW_MULTIPLE
    assert 0 <= steps[-1] - number * seq_len < ROW_MULTIPLE
    assert all(step % ROW_MULTIPLE == 0 for step in steps)
    assert all(after <= before * TOKEN_STEP + ROW_MULTIPLE for before, after in itertools.pairwise(steps))
    for count in range(1, min(number, MAX_MULTIPLES) + 1):
        assert any(0 <= step - count * seq_len < ROW_MULTIPLE for step in steps)


@given(
    st.lists(st.integers(20, 500), min_size=8, max_size=64),
    st.integers(1, MAX_MULTIPLES),
)
def test_a_level_is_the_fewest_rows_of_which_so_many_micro_batches_do(lengths: list[int], number: int) -> None:
    demand = Demand(len(lengths), float(np.mean(lengths)), min(lengths), float(np.std(lengths)))
    tokens = demand.level_tokens(number)

    assert tokens % ROW_MULTIPLE == 0
    assert demand.num_micro_batches(tokens) <= number
    assert tokens == ROW_MULTIPLE or demand.num_micro_batches(tokens - ROW_MULTIPLE) > number


def test_hardly_a_batch_exceeds_what_is_usual() -> None:
    lengths = np.random.default_rng(0).gamma(8.0, 28.0, size=8000)
    demand = Demand(8, float(lengths.mean()), int(lengths.min()), float(lengths.std()))

    batches = lengths.reshape(-1, 8).sum(1)

    assert 0.01 < (batches > demand.usual_batch_tokens).mean() < 0.05


def test_in_a_step_a_cpu_is_slower_than_each_kind_of_work_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = CpuSpeed(flops=3e11, bytes=3e10, unpacked_elements=2e9, launch_seconds=2e-5, file_bytes=1e9)
    monkeypatch.setattr(throughput, "measure_cpu_speed", lambda _dtype: alone)
    speed = throughput.cpu_speed("float32")

    assert speed.row_bytes < speed.bytes == alone.bytes
    assert speed.flops < alone.flops
    assert speed.unpacked_elements < alone.unpacked_elements
    assert speed.launch_seconds == alone.launch_seconds


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_cpu_attends_to_short_documents_slowly(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's share of its product rate is the same for all (it is fitted to published rows as it is)."""
    alone = CpuSpeed(flops=3e11, bytes=3e10, unpacked_elements=2e9, launch_seconds=2e-5, file_bytes=1e9)
    monkeypatch.setattr(throughput, "measure_cpu_speed", lambda _dtype: alone)
    speed = throughput.cpu_speed("float32") if device == "cpu" else throughput.gpu_speed(find_gpu("rtx-4060"))
    ramp = throughput.CPU_ATTENTION_RAMP_TOKENS
    short, middle, long = (
        throughput._attention_rate(Demand(8, float(length), length), speed) / speed.flops
        for length in (ramp // 8, ramp, 100 * ramp)
    )
    if device == "gpu":
        assert short == middle == long == throughput.ATTENTION_SHARE
    else:
        assert short < middle / 3
        assert middle == pytest.approx(throughput.ATTENTION_SHARE / 2)
        assert long == pytest.approx(throughput.ATTENTION_SHARE, rel=0.02)
