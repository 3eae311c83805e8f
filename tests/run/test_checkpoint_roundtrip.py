from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from qlora_trainer.config.strict_json import decode
from qlora_trainer.data.order import ORDER_VERSION
from qlora_trainer.errors import StorageError
from qlora_trainer.run.checkpoint.load import load_checkpoint, newest_verified
from qlora_trainer.run.checkpoint.rotate import rotate
from qlora_trainer.run.checkpoint.save import save_checkpoint
from qlora_trainer.run.checkpoint.tensors import lay_out, read_tensors, render
from tests.run.small_run import FINGERPRINTS, adapter_of, optimizer_of, save, state_of_rank_16

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.int64, torch.bool)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    saved = save(tmp_path, 120)
    loaded = newest_verified(tmp_path)
    assert loaded is not None
    assert (loaded.step, loaded.path) == (120, tmp_path / "step-00000120") == (saved.step, saved.path)
    assert_equal(loaded.adapter, adapter_of(120))
    assert_equal(loaded.optimizer, optimizer_of(120))
    state = {"run_id": "run-1", "samples_seen": 16 * 120, "best_step": None, "order": ORDER_VERSION}
    assert loaded.state == {"step": 120, **state}
    assert loaded.fingerprints == FINGERPRINTS
    assert "torch" in loaded.versions
    assert loaded.rejected == ()
    assert saved.num_bytes == sum(file.stat().st_size for file in saved.path.iterdir())


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_verified(tmp_path) is None
    assert newest_verified(tmp_path / "not there") is None


def test_a_named_checkpoint_is_loaded_through_its_link(tmp_path: Path) -> None:
    save(tmp_path, 1, is_best=True)
    save(tmp_path, 2)
    assert load_checkpoint(tmp_path / "best").step == 1
    assert load_checkpoint(tmp_path / "last").step == 2
    (tmp_path / "step-00000002" / "state.json").unlink()
    with pytest.raises(StorageError, match=r"state\.json: missing"):
        load_checkpoint(tmp_path / "last")


def test_steps_go_by_number_and_not_by_time(tmp_path: Path) -> None:
    """Mutation tried: `list_steps` that sorts by modification time loads step 9, and rotates the newest away."""
    for step in (9, 10, 100_000_000):
        save(tmp_path, step)
    for age, path in enumerate(sorted(tmp_path.glob("step-*"), reverse=True)):
        os.utime(path, (age, age))  # the higher the step, the older
    loaded = newest_verified(tmp_path)
    assert loaded is not None
    assert loaded.step == 100_000_000
    (tmp_path / "last").unlink()  # else it keeps the step that a rotation by time would take
    assert rotate(tmp_path, keep_checkpoints=2, run_id="run-1") == (9,)


def test_files_follow_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        saved = save(tmp_path, 1)
    finally:
        os.umask(previous)
    assert {file.stat().st_mode & 0o777 for file in saved.path.iterdir()} == {0o640}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["adapter", "optimizer", "state"])
def test_what_is_not_finite_is_refused(tmp_path: Path, where: str, number: float) -> None:
    save(tmp_path, 1)
    adapter, optimizer = adapter_of(2), optimizer_of(2)
    if where == "adapter":
        adapter["q_proj.lora_A"][1, 2] = number
    if where == "optimizer":
        optimizer["q_proj.lora_A.master"][0, 0] = number
    state = {"run_id": "run-1", "best_loss": number if where == "state" else 1.0}
    with pytest.raises(StorageError, match=f"{where}.*finite"):
        save_checkpoint(tmp_path, step=2, adapter=adapter, optimizer=optimizer, state=state, fingerprints={})
    assert sorted(os.listdir(tmp_path)) == ["last", "step-00000001"]


@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_the_library_reads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in shapes.items()}
    layout = lay_out(tensors)
    data = b"".join(render(tensors, layout))
    assert len(data) == layout.num_bytes
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    path.write_bytes(data)
    assert_equal(load_file(path), tensors)
    assert_equal(read_tensors(path), tensors)


def test_tensors_larger_than_a_piece_are_whole(tmp_path: Path) -> None:
    tensors = {"large": torch.arange(2**22 + 5, dtype=torch.int64)}
    (tmp_path / "x").write_bytes(b"".join(render(tensors, lay_out(tensors))))
    assert_equal(read_tensors(tmp_path / "x"), tensors)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04\x95.",
        (2**63).to_bytes(8, "little") + b"{}",
        (200 * 2**20).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (26).to_bytes(8, "little") + b'{"a":{},"a":{}}           ',
        (400_000).to_bytes(8, "little") + b"[" * 400_000,
        (13).to_bytes(8, "little") + b'{"a":{"b":1}}',
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"header|safetensors"):
        read_tensors(path)


def test_a_header_of_a_million_names_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((60 * 10**6).to_bytes(8, "little"))
        file.truncate(61 * 10**6)  # sparse
    with pytest.raises(ValueError, match="a header of 60,000,000 bytes"):
        read_tensors(path)


def test_a_dtype_or_name_that_the_format_lacks_is_our_bug() -> None:
    with pytest.raises(ValueError, match="complex64"):
        lay_out({"a": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="__metadata__"):
        lay_out({"__metadata__": torch.zeros(1)})


@pytest.mark.parametrize(
    "text, problem",
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b"[1]", "a list"),
        (b"[" * 10**6, "too deep"),
        (b"\xff", "utf-8"),
        (json.dumps({"a": 1})[:-1].encode(), "Expecting"),
    ],
)
def test_json_is_read_strictly(text: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        decode(text)


def test_a_checkpoint_is_little_more_than_its_tensors_and_is_saved_at_once(tmp_path: Path) -> None:
    adapter, optimizer = state_of_rank_16()
    num_bytes = sum(tensor.nbytes for tensors in (adapter, optimizer) for tensor in tensors.values())
    seconds = []
    for step in (1, 2, 3):
        start = time.process_time()  # the machine may be busy with something else
        saved = save_checkpoint(
            tmp_path, step=step, adapter=adapter, optimizer=optimizer, state={"run_id": "run-1"}, fingerprints={}
        )
        seconds.append(time.process_time() - start)
        assert num_bytes < saved.num_bytes <= 1.05 * num_bytes
    assert min(seconds) < 0.5
