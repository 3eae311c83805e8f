"""Files that somebody else made: pickles are never run, and no header or JSON takes a second or 200 MB to refuse."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_trainer.config.load import load_config
from qlora_trainer.config.paths import check_inputs
from qlora_trainer.config.strict_json import decode, encode
from qlora_trainer.errors import ConfigError, QloraTrainerError
from qlora_trainer.hardware.memory import forget_peak, process_peak_bytes
from qlora_trainer.model.adapter_folder import read_adapter_fields, read_adapter_folder
from qlora_trainer.model.base import weight_files
from qlora_trainer.model.base_config import read_config
from qlora_trainer.run.checkpoint.load import newest_verified
from qlora_trainer.run.checkpoint.manifest import FILE_NAMES, MANIFEST_NAME
from tests.run.small_run import save

MAX_SECONDS = 1.0
MAX_BYTES = 200 * 2**20
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_type": "LORA"}


class Canary:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "the pickle was run"


@pytest.fixture
def canary(mark: Path) -> bytes:
    data = pickle.dumps(Canary(mark))
    pickle.loads(data)  # noqa: S301  # the canary sings
    mark.rmdir()
    return data


def adapter_folder(folder: Path, weights_name: str, weights: bytes, config: bytes = b"") -> Path:
    folder.mkdir()
    (folder / weights_name).write_bytes(weights)
    (folder / "adapter_config.json").write_bytes(config or json.dumps(LORA).encode())
    return folder


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.safetensors"])
def test_a_pickled_adapter_is_never_run(name: str, tmp_path: Path, canary: bytes, mark: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter", name, canary)
    with pytest.raises(ConfigError, match=r"no adapter_model|never read|no safetensors file"):
        read_adapter_folder(folder, linear_names=["q_proj"])
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickled_base_is_never_run(name: str, tmp_path: Path, canary: bytes, mark: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / name).write_bytes(canary)
    with pytest.raises(ConfigError, match=r"no \*\.safetensors|cannot be read"):
        weight_files(folder)
    (folder / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    config = load_config(
        None, [f"model.base={folder}", f"data.train={tmp_path / 'rows.jsonl'}", f"output.dir={tmp_path / 'run'}"]
    )
    if name != "model.safetensors":
        with pytest.raises(ConfigError, match="Pickle weights are never read"):
            check_inputs(config)
    assert not mark.exists()


@pytest.mark.parametrize("name", FILE_NAMES)
def test_a_pickle_in_a_checkpoint_is_never_run_even_with_a_right_manifest(
    name: str, tmp_path: Path, canary: bytes, mark: Path
) -> None:
    """Whoever can write the folder can write its manifest: hashes prove that a file is whole, not that it is kind."""
    save(tmp_path, 1)
    step = save(tmp_path, 2).path
    (step / name).write_bytes(canary)
    manifest = decode((step / MANIFEST_NAME).read_bytes())
    manifest["files"][name] = {"num_bytes": len(canary), "sha256": hashlib.sha256(canary).hexdigest()}
    del manifest["sha256"]
    own = hashlib.sha256(encode(manifest)).hexdigest()
    (step / MANIFEST_NAME).write_bytes(encode({**manifest, "sha256": own}))
    loaded = newest_verified(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert loaded.rejected[0].reasons[0].startswith(f"{name}: ")
    assert "sha256" not in loaded.rejected[0].reasons[0]  # it was read, and refused for what it is
    assert not mark.exists()


def long_header(path: Path) -> None:
    """A true header of a million names."""
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f'"{number:07}":{entry}' for number in range(10**6)) + "}").encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def impossible_header(path: Path) -> None:
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")


def twice_named(path: Path) -> None:
    text = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def deep_header(path: Path) -> None:
    text = b'{"a":' * 10**6
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def require_refused_cheaply(read: Callable[[], object], match: str) -> None:
    forget_peak(torch.device("cpu"))
    start_bytes, start = process_peak_bytes(), time.process_time()
    with pytest.raises(QloraTrainerError, match=match):
        read()
    assert time.process_time() - start < MAX_SECONDS
    assert process_peak_bytes() - start_bytes < MAX_BYTES


@pytest.mark.parametrize("make", [long_header, impossible_header, twice_named, deep_header])
def test_a_hostile_header_is_refused_at_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    """Mutation tried: without `require_sane_header` a million names take more than a second and a gigabyte."""
    folder = adapter_folder(tmp_path / "adapter", "adapter_model.safetensors", b"")
    make(folder / "adapter_model.safetensors")
    require_refused_cheaply(lambda: read_adapter_folder(folder, linear_names=["q_proj"]), "no safetensors file")
    require_refused_cheaply(lambda: weight_files(folder), "cannot be read")


@pytest.mark.parametrize(
    "text",
    [
        b'{"r": 4, "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}',
        b'{"r": 4, "lora_alpha": NaN, "target_modules": ["q_proj"]}',
        b'{"a":' * 10**6,
        b'{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "x": "' + b"x" * 10**8 + b'"}',
    ],
    ids=["twice", "not finite", "deep", "huge"],
)
def test_hostile_json_is_refused_at_once(text: bytes, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter", "adapter_model.safetensors", b"12345678", text)
    require_refused_cheaply(lambda: read_adapter_fields(folder), "no adapter config")
    (folder / "model.safetensors.index.json").write_bytes(text)
    require_refused_cheaply(lambda: weight_files(folder), "no index of weights")
    (folder / "config.json").write_bytes(text)
    require_refused_cheaply(lambda: read_config(folder), "no config that transformers can read|sizes of the model")
