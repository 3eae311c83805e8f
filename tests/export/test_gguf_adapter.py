"""The GGUF file holds what llama.cpp's own converter would write: names, order of rows, alpha; and is read back."""

from __future__ import annotations

import errno
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from qlora_trainer.cli.app import main
from qlora_trainer.errors import StorageError
from qlora_trainer.export import gguf_adapter
from qlora_trainer.export.gguf_adapter import gguf_architecture, gguf_tensors, interleaved, write_gguf
from qlora_trainer.export.portable import portable_adapter
from qlora_trainer.export.source import read_source
from qlora_trainer.model.packaged_base import PACKAGED_BASES, unpack_packaged_base
from qlora_trainer.run.checkpoint.storage import Storage
from tests.export.made_adapters import PATTERNS, make_adapter
from tests.model.tiny_bases import CONFIGS, small_config, write_base
from tests.run.faulty_storage import FailAt, Recording
from tests.run.told import complaint

THEIRS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "smollm3": "smollm3", "qwen2": "qwen2", "qwen3": "qwen3"}


def exported(folder: Path, name: str, **fields: Any) -> tuple[gguf.GGUFReader, dict[str, torch.Tensor]]:
    """The GGUF file of an adapter, and the true update of every linear, in fp32."""
    base = write_base(folder / "base", CONFIGS[name])
    wrapped = make_adapter(folder / "adapter", base, **PATTERNS | fields)
    assert main(["export", str(folder / "adapter"), "--gguf", str(folder / "adapter.gguf")]) == 0
    updates = {
        module_name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for module_name, module in wrapped.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    return gguf.GGUFReader(folder / "adapter.gguf"), updates


def told(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    assert field is not None
    return field.contents()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_update_is_the_one_that_peft_computes(name: str, tmp_path: Path) -> None:
    """Rows of q and k are put back with transformers' own reading of GGUF.

    Mutation tried: without `interleaved`, q and k of Llama, Mistral and SmolLM 3 differ.
    """
    reader, updates = exported(tmp_path, name)
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    alpha = told(reader, "adapter.lora.alpha")
    config = CONFIGS[name]
    assert len(tensors) == 2 * len(updates) == 2 * 2 * len(THEIRS)
    for linear, expected_OI in updates.items():
        _, _, layer, leaf = linear.split(".", 3)
        theirs = f"blk.{layer}.{THEIRS[leaf]}.weight"
        a_RI, b_OR = tensors[f"{theirs}.lora_a"], tensors[f"{theirs}.lora_b"]
        update_OI = alpha / a_RI.shape[0] * (b_OR @ a_RI)  # llama.cpp: alpha / rank
        if ARCHITECTURES[name] in ("llama", "smollm3") and leaf in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if leaf.endswith("q_proj") else config.num_key_value_heads
            back = LlamaTensorProcessor()._reverse_permute_weights(update_OI.numpy(), heads, heads)
            assert not np.allclose(back, update_OI.numpy(), atol=1e-6)
            update_OI = torch.from_numpy(np.array(back))
        assert torch.allclose(update_OI, expected_OI, atol=1e-6), linear


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_llama_cpp_finds_what_it_looks_for(name: str, tmp_path: Path) -> None:
    reader, _ = exported(tmp_path, name)
    assert told(reader, "general.type") == "adapter"
    assert told(reader, "general.architecture") == ARCHITECTURES[name]
    assert told(reader, "adapter.type") == "lora"
    assert told(reader, "adapter.lora.alpha") == 7.0
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}  # ggml's order: columns first
    assert shapes["blk.0.ffn_down.weight.lora_a"] == (128, 7)
    assert shapes["blk.0.ffn_down.weight.lora_b"] == (7, 64)


@pytest.mark.parametrize("name", ["gemma2", "phi3", "olmo3", "ministral3"])
def test_another_architecture_is_refused_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", CONFIGS[name])
    make_adapter(tmp_path / "adapter", base)
    capsys.readouterr()
    arguments = ["export", str(tmp_path / "adapter"), "--to", str(tmp_path / "to")]
    assert main([*arguments, "--gguf", str(tmp_path / "x.gguf")]) == 2
    assert f"model type {CONFIGS[name].model_type!r}" in complaint(capsys)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]  # nothing of the folder either


def test_rows_are_ordered_as_llama_cpp_does() -> None:
    """`LlamaModel.permute` of its converter, in numpy: reshape, swapaxes, reshape."""
    rows_OR = torch.arange(24.0).reshape(12, 2)
    expected = rows_OR.numpy().reshape(3, 2, 12 // 3 // 2, 2).swapaxes(1, 2).reshape(12, 2)
    assert np.array_equal(interleaved(rows_OR, 3).numpy(), expected)
    assert interleaved(rows_OR, 3)[:, 0].tolist()[:4] == [0, 4, 2, 6]


def test_a_head_size_of_its_own_is_respected() -> None:
    """Qwen-like head sizes in a Llama: the rows of a head are what the matrix has, not hidden size / heads."""
    config = small_config("llama", head_dim=32)
    weights = {"model.layers.0.self_attn.k_proj.lora_B": torch.arange(64.0).reshape(64, 1)}
    found = gguf_tensors(weights, config=config, architecture=gguf_architecture(config))
    assert found["blk.0.attn_k.weight.lora_b"][:4, 0].tolist() == [0, 16, 1, 17]


def test_a_portable_folder_and_a_file_at_once(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS["qwen2"])
    make_adapter(tmp_path / "given", base, **PATTERNS)
    arguments = ["export", str(tmp_path / "given"), "--to", str(tmp_path / "to"), "--portable"]
    assert main([*arguments, "--gguf", str(tmp_path / "x.gguf")]) == 0
    tensors = load_file(tmp_path / "to" / "adapter_model.safetensors")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.model.layers.").removesuffix(".weight")
        layer, leaf, matrix = name.split(".", 1)[0], name.split(".", 1)[1].rpartition(".")[0], name.rpartition(".")[2]
        assert np.array_equal(found[f"blk.{layer}.{THEIRS[leaf]}.weight.{matrix.lower()}"], tensor.numpy())


@pytest.mark.parametrize(
    "gguf_name,exit_code,said",
    [("x.bin", 2, "ends in '.bin'"), ("there.gguf", 2, "there already"), ("nowhere/x.gguf", 2, "no folder")],
)
def test_a_file_that_cannot_be_is_refused(
    gguf_name: str, exit_code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.gguf").touch()
    assert main(["export", str(tmp_path), "--gguf", str(tmp_path / gguf_name)]) == exit_code
    assert said in complaint(capsys)


def test_a_file_that_is_not_what_was_written_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bit that flips on its way to the disk, at every part of the file; mutation tried: none of them is refused."""
    base = write_base(tmp_path / "base", CONFIGS["qwen2"])
    make_adapter(tmp_path / "given", base, target_modules=["q_proj"])
    written = gguf_adapter._write
    for offset in (0, 100, 300, -100):

        def flipping(path: Path, *arguments: Any, at: int = offset, **fields: Any) -> None:
            written(path, *arguments, **fields)
            data = bytearray(path.read_bytes())
            data[at] ^= 1
            path.write_bytes(data)

        monkeypatch.setattr(gguf_adapter, "_write", flipping)
        capsys.readouterr()
        assert main(["export", str(tmp_path / "given"), "--gguf", str(tmp_path / "x.gguf")]) == 5
        assert "reading it back" in complaint(capsys)
    assert sorted(os.listdir(tmp_path)) == ["base", "given"]


def test_a_refusal_at_every_operation_leaves_no_file(tmp_path: Path) -> None:
    make_adapter(tmp_path / "given", write_base(tmp_path / "base", CONFIGS["qwen2"]), target_modules=["q_proj"])
    source = read_source(tmp_path / "given", model=None)
    plain = portable_adapter(source.settings, source.weights)

    def write(path: Path, storage: Storage) -> None:
        path.parent.mkdir()
        (path.parent / ".tmp-x.gguf").write_text("left by a killed process")
        write_gguf(path, *plain, config=source.base.config, base_name="base", storage=storage)

    recording = Recording()
    write(tmp_path / "counted" / "x.gguf", recording)
    assert os.listdir(tmp_path / "counted") == ["x.gguf"]
    whole = (tmp_path / "counted" / "x.gguf").read_bytes()
    assert len(recording.operations) == 5  # free space, the left-over, fsync, rename, fsync of the folder
    for k in range(len(recording.operations)):
        path = tmp_path / str(k) / "x.gguf"
        with pytest.raises(StorageError, match="no space left on device while exporting the adapter"):
            write(path, FailAt(k, errno.ENOSPC))
        assert set(os.listdir(path.parent)) <= {"x.gguf"}
        assert not path.exists() or path.read_bytes() == whole


@pytest.mark.slow
def test_names_and_rows_are_those_of_a_published_file() -> None:
    """SmolLM2's GGUF, made by llama.cpp, against the same weights as transformers has them."""
    packaged = PACKAGED_BASES["smollm2-135m"]
    spec = find_spec(packaged.package)  # importing it takes llama_cpp, which nothing here needs
    assert spec is not None
    assert spec.origin is not None
    reader = gguf.GGUFReader(Path(spec.origin).parent / packaged.file_name)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    folder = unpack_packaged_base("smollm2-135m")
    weights = load_file(folder / "model.safetensors")
    config = CONFIGS["llama"].__class__.from_pretrained(folder)
    names = [f"model.layers.7.{leaf}" for leaf in THEIRS]
    ours = gguf_tensors(
        {f"{name}.lora_B": weights[f"{name}.weight"] for name in names},
        config=config,
        architecture=gguf_architecture(config),
    )
    for name, matrix in ours.items():
        tensor = theirs[name.removesuffix(".lora_b")]
        published = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.allclose(matrix, published, rtol=2**-8, atol=1e-6), name  # rounded to bf16 when it was unpacked
