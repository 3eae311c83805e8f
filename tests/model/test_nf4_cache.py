"""The NF4 cache: transformers reads it, it equals bitsandbytes' own, and damage is seen and repaired."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.quant_library import bitsandbytes, functional
from qlora_trainer.model import nf4, nf4_cache
from qlora_trainer.model.base import Base, resolve_base
from qlora_trainer.model.nf4_cache import CachedWeights, NF4Cache, prepare_nf4_cache
from tests.model import peft_oracle
from tests.model.tiny_bases import CONFIGS, small_config, write_base
from tests.model.tiny_models import load_for_training, packed_logits, prepare, relative_error, tiny_documents

DOCUMENTS = tiny_documents(40, 23)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    "name,dtype,nf4_head",
    [
        *((name, torch.bfloat16, False) for name in CONFIGS),
        ("llama", torch.float32, False),
        ("phi3", torch.float16, False),
        ("llama", torch.bfloat16, True),
        ("phi", torch.bfloat16, True),
    ],
)
def test_transformers_loads_it(
    name: str, dtype: torch.dtype, nf4_head: bool, double_quant: bool, tmp_path: Path
) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS[name], dtype=dtype, double_quant=double_quant, nf4_head=nf4_head)
    assert len(list(base.folder.glob("*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(cache.folder, attn_implementation="eager").train()
    model = load_for_training(base, cache)
    found = {
        part_name: part for part_name, part in theirs.named_modules() if isinstance(part, bitsandbytes.nn.Linear4bit)
    }
    assert found.keys() == model.linears.keys() | ({"lm_head"} if nf4_head else set())
    for linear_name, linear in model.linears.items():
        weight = found[linear_name].weight
        for unpacked in (torch.bfloat16, torch.float32):
            weight.quant_state.dtype = unpacked
            dense_OI = functional.dequantize_4bit(weight.data, weight.quant_state)
            assert dense_OI.dtype == unpacked
            assert torch.equal(nf4.dequantize(linear.weight, unpacked), dense_OI)
    for part in found.values():  # the cache asks for bf16: computed in fp32, nothing is rounded
        part.compute_dtype = part.weight.quant_state.dtype = torch.float32
    for parameter in theirs.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    with torch.no_grad():
        their_logits_TV = peft_oracle.logits(theirs, DOCUMENTS)
    our_logits_TV = packed_logits(model, DOCUMENTS)
    assert relative_error(our_logits_TV, their_logits_TV) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_equal_what_bitsandbytes_quantizes_from_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS["llama"], dtype=dtype)
    cached = _read_all(cache)
    originals = _read_files(base.folder)
    linears = [name for name in originals if name.endswith("_proj.weight")]
    assert len(linears) == 14
    for name in linears:
        parameter = bitsandbytes.nn.Params4bit(
            originals[name].clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        ).to("cpu")
        assert torch.equal(cached[name], parameter.data)
        assert torch.equal(cached[f"{name}.absmax"], parameter.quant_state.absmax)
        assert torch.equal(cached[f"{name}.nested_absmax"], parameter.quant_state.state2.absmax)
    for name in originals.keys() - set(linears):
        assert torch.equal(cached[name], originals[name].bfloat16())


def test_a_full_shard_is_written_before_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_cache, "SHARD_BYTES", 20_000)
    base, cache = prepare(tmp_path / "base", CONFIGS["qwen3"])
    names = sorted(path.name for path in cache.folder.glob("*.safetensors"))
    assert len(names) > 2
    assert names == [f"model-{number + 1:05d}-of-{len(names):05d}.safetensors" for number in range(len(names))]
    theirs = peft_oracle.load_oracle(cache.folder, torch.float32)
    with torch.no_grad():
        their_logits_TV = peft_oracle.logits(theirs, DOCUMENTS)
    torch.testing.assert_close(packed_logits(load_for_training(base, cache), DOCUMENTS), their_logits_TV)


def test_the_second_time_it_is_found(tmp_path: Path) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS["llama"])
    assert cache.was_built
    again = prepare_nf4_cache(base, double_quant=True)
    assert (again.was_built, again.defects, again.folder, again.key) == (False, (), cache.folder, cache.key)


def test_a_copy_of_the_base_elsewhere_has_the_same_key(tmp_path: Path) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS["llama"])
    shutil.copytree(base.folder, tmp_path / "copy")
    again = prepare_nf4_cache(resolve_base(str(tmp_path / "copy")), double_quant=True)
    assert again.key == cache.key
    assert not again.was_built


def test_other_settings_have_another_key(tmp_path: Path) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS["llama"])
    plain = prepare_nf4_cache(base, double_quant=False)
    with_head = prepare_nf4_cache(base, double_quant=False, nf4_head=True)
    assert with_head.was_built
    assert with_head.key not in (plain.key, cache.key)
    assert plain.was_built
    assert plain.key != cache.key
    assert cache.folder.is_dir()


def test_other_weights_have_another_key(tmp_path: Path) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS["llama"])
    path = sorted(base.folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1.0
    save_file(tensors, path, {"format": "pt"})
    assert prepare_nf4_cache(base, double_quant=True).key != cache.key


def test_another_config_has_another_key(tmp_path: Path) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS["llama"])
    small_config("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}).save_pretrained(base.folder)
    again = prepare_nf4_cache(resolve_base(str(base.folder)), double_quant=True)
    assert again.key != cache.key


def test_a_broken_memory_of_hashes_is_forgotten(tmp_path: Path, cache_home: Path) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS["llama"])
    for content in ("[1]", "{", "null"):
        (cache_home / "hashes.json").write_text(content)
        assert prepare_nf4_cache(base, double_quant=True).key == cache.key


def _flip_a_bit(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _truncate(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def _lose_a_shard(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def _lose_the_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _break_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": []}')


@pytest.mark.parametrize(
    "damage",
    [_flip_a_bit, _truncate, _lose_a_shard, _lose_the_config, _lose_the_manifest, _break_the_manifest],
)
def test_damage_is_seen_and_repaired(damage: Callable[[Path], None], tmp_path: Path) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS["llama"])
    before = {name: tensor.clone() for name, tensor in _read_all(cache).items()}
    damage(cache.folder)
    repaired = prepare_nf4_cache(base, double_quant=True)
    assert repaired.was_built
    assert len(repaired.defects) == 1
    assert str(cache.folder) in repaired.defects[0]
    after = _read_all(repaired)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not prepare_nf4_cache(base, double_quant=True).was_built


def test_a_half_written_folder_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS["llama"])
    half = cache.folder.with_name(f".tmp-{cache.key}-killed")
    cache.folder.rename(half)  # as a kill before the rename leaves it
    (half / "manifest.json").unlink()
    again = prepare_nf4_cache(base, double_quant=True)
    assert again.was_built
    assert again.folder == cache.folder


def test_a_failure_leaves_nothing_behind(tmp_path: Path, cache_home: Path) -> None:
    base = resolve_base(str(write_base(tmp_path / "base", CONFIGS["llama"])))
    _drop_tensor(base, "model.norm.weight")
    with pytest.raises(ConfigError, match=r"1 weights missing, the first is model\.norm\.weight"):
        prepare_nf4_cache(base, double_quant=True)
    assert list((cache_home / "nf4").iterdir()) == []


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    base = resolve_base(str(write_base(tmp_path / "base", CONFIGS["llama"])))
    _replace_tensor(base, "model.layers.0.mlp.up_proj.weight", torch.zeros(32, 64))
    with pytest.raises(ConfigError, match=r"up_proj\.weight of shape \(32, 64\); expected \(128, 64\)"):
        prepare_nf4_cache(base, double_quant=True)


def test_a_base_that_is_already_quantized_is_refused(tmp_path: Path) -> None:
    base = resolve_base(str(write_base(tmp_path / "base", CONFIGS["llama"])))
    _replace_tensor(base, "model.layers.0.mlp.up_proj.weight", torch.zeros(128, 64, dtype=torch.int8))
    with pytest.raises(ConfigError, match=r"int8 \(already quantized"):
        prepare_nf4_cache(base, double_quant=True)


def test_a_weight_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    base = resolve_base(str(write_base(tmp_path / "base", CONFIGS["llama"])))
    _truncate(base.folder)
    with pytest.raises(ConfigError, match="cannot be read"):
        prepare_nf4_cache(base, double_quant=True)


class _Canary:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path, str], int], tuple[Path, str]]:
        return Path.write_text, (self.path, "unpickled")


def test_pickled_weights_beside_the_safetensors_are_not_read(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", CONFIGS["llama"])
    mark = tmp_path / "mark"
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(_Canary(mark)))
    base = resolve_base(str(folder))
    cache = prepare_nf4_cache(base, double_quant=True)
    load_for_training(base, cache)
    assert not mark.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())  # noqa: S301  # the canary does sing
    assert mark.exists()


def test_an_unused_module_of_the_base_is_left_out(tmp_path: Path) -> None:
    def add(model: nn.Module) -> None:
        model.register_parameter("score", nn.Parameter(torch.zeros(3, 3)))

    _, cache = prepare(tmp_path / "base", CONFIGS["llama"], change=add)
    assert "score" not in _read_all(cache)


def test_the_cached_weights_are_mapped_not_copied(tmp_path: Path) -> None:
    base, cache = prepare(tmp_path / "base", CONFIGS["llama"])
    model = load_for_training(base, cache)
    places = []  # of the mapped files of the cache, in the memory of this process
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, path = line.split()
        assert str(base.folder) not in path
        if str(cache.folder) in path:
            places.append(range(*(int(end, 16) for end in addresses.split("-"))))
    assert all(any(linear.packed.data_ptr() in place for place in places) for linear in model.linears.values())
    weights = CachedWeights(cache.folder)
    for name, linear in model.linears.items():
        assert torch.equal(linear.packed, weights.nf4(f"{name}.weight").packed)


def _read_all(cache: NF4Cache) -> dict[str, Tensor]:
    return _read_files(cache.folder)


def _read_files(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def _drop_tensor(base: Base, name: str) -> None:
    _rewrite(base, name, None)


def _replace_tensor(base: Base, name: str, tensor: Tensor) -> None:
    _rewrite(base, name, tensor)


def _rewrite(base: Base, name: str, tensor: Tensor | None) -> None:
    """Make the base one file without an index, with the tensor `name` replaced or left out."""
    tensors = _read_files(base.folder)
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    for path in base.folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, base.folder / "model.safetensors", {"format": "pt"})
    with safe_open(base.folder / "model.safetensors", framework="pt") as file:
        assert (name in file.keys()) == (tensor is not None)  # noqa: SIM118  # not a dict
