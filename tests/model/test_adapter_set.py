"""Adapters over one base do not know of each other: each gives its own logits to the bit, and costs its own bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_folder import AdapterFolder
from qlora_trainer.model.adapter_set import AdapterSet
from qlora_trainer.model.adapters import adapter_shapes, attach_adapters, trainable_parameters
from qlora_trainer.model.base import Base
from qlora_trainer.model.lora_settings import LoraSettings, select_targets
from qlora_trainer.model.nf4_cache import NF4Cache
from qlora_trainer.model.quantized import QuantizedModel
from tests.model.tiny_bases import CONFIGS
from tests.model.tiny_models import load_for_training, packed_logits, prepare, random_adapter, tiny_documents

DOCUMENTS = tiny_documents(33, 21)
TARGETS: dict[str, str | list[str]] = {
    "all": "all-linear",
    "attention": ["q_proj", "v_proj"],
    "upper": r"model\.layers\.1\..*_proj",
    "rslora": "all-linear",
    "patterns": ["up_proj", "down_proj"],
    "half": "all-linear",
    "dora": ["q_proj", "o_proj", "down_proj"],
    "other-dora": "all-linear",
    "tables": ["q_proj"],
    "head": ["v_proj"],
}
VARIANTS = {
    "all": LoraSettings(rank=4, alpha=8.0, dropout=0.0, targets=()),
    "attention": LoraSettings(rank=1, alpha=3.0, dropout=0.5, targets=()),
    "upper": LoraSettings(rank=16, alpha=1.0, dropout=0.0, targets=()),
    "rslora": LoraSettings(rank=8, alpha=2.0, dropout=0.0, targets=(), use_rslora=True),
    "patterns": LoraSettings(
        rank=2, alpha=2.0, dropout=0.0, targets=(), rank_pattern=(("up_proj", 5),), alpha_pattern=(("down_proj", 9.0),)
    ),
    "half": LoraSettings(rank=4, alpha=8.0, dropout=0.0, targets=()),
    "dora": LoraSettings(rank=3, alpha=6.0, dropout=0.0, targets=(), use_dora=True),
    "other-dora": LoraSettings(rank=2, alpha=9.0, dropout=0.0, targets=(), use_dora=True, use_rslora=True),
    "tables": LoraSettings(
        rank=2, alpha=4.0, dropout=0.0, targets=(), modules_to_save=("model.embed_tokens", "lm_head")
    ),
    "head": LoraSettings(rank=2, alpha=4.0, dropout=0.0, targets=(), modules_to_save=("lm_head",)),
}


@dataclass(frozen=True)
class Shared:
    """A base, adapters of every kind for it, and the logits of each on a base of its own."""

    base: Base
    cache: NF4Cache
    adapters: dict[str, AdapterFolder]
    fresh_TV: dict[str | None, Tensor]
    adapter_set: AdapterSet


def made_adapter(model: QuantizedModel, name: str, *, seed: int = 0) -> AdapterFolder:
    """Random weights of the kind `name`; bf16 but for "half", whose are fp16."""
    chosen = replace(VARIANTS[name], targets=select_targets(list(model.linears), TARGETS[name]))
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float16 if name == "half" else torch.bfloat16
    weights = {
        weight_name: (0.2 * torch.randn(shape, generator=generator)).to(dtype)
        for weight_name, shape in adapter_shapes(model, chosen).items()
    }
    return AdapterFolder("base", None, chosen, weights)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        base, cache = prepare(folder / "base", CONFIGS["llama"])
    adapters = {name: made_adapter(load(base, cache), name, seed=seed) for seed, name in enumerate(VARIANTS)}
    fresh_TV: dict[str | None, Tensor] = {None: packed_logits(load(base, cache), DOCUMENTS)}
    for name, adapter in adapters.items():
        model = load(base, cache)
        (dtype,) = {weight.dtype for weight in adapter.weights.values()}
        attach_adapters(model, adapter.settings, adapter.weights, dtype=dtype)
        fresh_TV[name] = packed_logits(model, DOCUMENTS)
    adapter_set = AdapterSet(load(base, cache))
    for name, adapter in adapters.items():
        adapter_set.add(name, adapter)
    return Shared(base, cache, adapters, fresh_TV, adapter_set)


def load(base: Base, cache: NF4Cache) -> QuantizedModel:
    model = load_for_training(base, cache)
    model.module.eval()
    return model


@settings(max_examples=20)
@given(order=st.lists(st.sampled_from([None, *VARIANTS]), min_size=1, max_size=8))
def test_after_any_swaps_each_gives_the_logits_of_a_fresh_load(shared: Shared, order: list[str | None]) -> None:
    for name in order:
        shared.adapter_set.activate(name)
        assert shared.adapter_set.active == name
        assert torch.equal(packed_logits(shared.adapter_set.model, DOCUMENTS), shared.fresh_TV[name])


def test_each_adapter_changes_the_logits(shared: Shared) -> None:
    """Else the test above would compare one thing with itself."""
    logits = list(shared.fresh_TV.values())
    assert all(not torch.equal(one, other) for number, one in enumerate(logits) for other in logits[:number])


def test_one_that_comes_later_changes_nothing_of_the_others(shared: Shared) -> None:
    adapter_set = AdapterSet(load(shared.base, shared.cache))
    adapter_set.add("all", shared.adapters["all"])
    adapter_set.activate("all")
    adapter_set.add("upper", shared.adapters["upper"])
    assert (adapter_set.active, adapter_set.names) == ("all", ("all", "upper"))
    for name in ("all", "upper", "all"):
        adapter_set.activate(name)
        assert torch.equal(packed_logits(adapter_set.model, DOCUMENTS), shared.fresh_TV[name])


def test_memory_is_the_base_and_the_bytes_of_each_adapter(shared: Shared) -> None:
    model = load(shared.base, shared.cache)
    before = storages(model)
    adapter_set = AdapterSet(model)
    folders = [made_adapter(model, "all", seed=seed) for seed in range(50)]
    for number, folder in enumerate(folders):
        adapter_set.add(f"a{number}", folder)
    found: dict[int, int] = {}
    for name in (*adapter_set.names, None):
        adapter_set.activate(name)
        here = storages(model)
        own = {place: num_bytes for place, num_bytes in here.items() if place not in before}
        assert before.items() <= here.items()  # the base is the same, where it was
        assert sum(own.values()) == (0 if name is None else num_bytes_of(folders[0]))
        found |= own
    assert sum(found.values()) == 50 * num_bytes_of(folders[0])
    adapter_set.activate("a0")
    assert storages(model).keys() - before.keys() <= found.keys()  # a swap back makes no new tensor


def storages(model: QuantizedModel) -> dict[int, int]:
    """Where every tensor of the model lies, and its bytes."""
    tensors = [*model.module.parameters(), *model.module.buffers()]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def num_bytes_of(adapter: AdapterFolder) -> int:
    return sum(weight.nbytes for weight in adapter.weights.values())


def test_weights_are_copied_and_held_as_they_are_stored(shared: Shared) -> None:
    adapter_set = AdapterSet(load(shared.base, shared.cache))
    for name, dtype in (("all", torch.bfloat16), ("half", torch.float16)):
        adapter_set.add(name, shared.adapters[name])
        adapter_set.activate(name)
        parameters = trainable_parameters(adapter_set.model)
        assert {parameter.dtype for parameter in parameters.values()} == {dtype}
        places = {weight.data_ptr() for weight in shared.adapters[name].weights.values()}
        assert not places & {parameter.data_ptr() for parameter in parameters.values()}
    odd = shared.adapters["all"]
    mixed = {name: weight.float() if "q_proj" in name else weight for name, weight in odd.weights.items()}
    adapter_set.add("mixed", replace(odd, weights=mixed))
    adapter_set.activate("mixed")
    assert {parameter.dtype for parameter in trainable_parameters(adapter_set.model).values()} == {torch.float32}


def test_one_of_another_base_names_the_first_five_differences(shared: Shared, tmp_path: Path) -> None:
    model = load_for_training(*prepare(tmp_path / "other", CONFIGS["qwen3"]))
    adapter = AdapterFolder("base", None, shared.adapters["all"].settings, {})
    wrong = replace(adapter, weights=random_adapter(model, adapter.settings, b_size=1.0))
    adapter_set = AdapterSet(load(shared.base, shared.cache))
    adapter_set.add("all", shared.adapters["all"])
    adapter_set.activate("all")
    with pytest.raises(ConfigError) as caught:
        adapter_set.add("wrong", wrong)
    message = str(caught.value)
    assert message.startswith("adapter wrong: found ")
    assert message.count(": adapter (") == 5
    assert "\n" not in message
    assert (adapter_set.names, adapter_set.active) == (("all",), "all")
    assert torch.equal(packed_logits(adapter_set.model, DOCUMENTS), shared.fresh_TV["all"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(shared: Shared, value: float) -> None:
    adapter = shared.adapters["attention"]
    name = next(iter(adapter.weights))
    broken = {**adapter.weights, name: torch.full_like(adapter.weights[name], value)}
    with pytest.raises(ConfigError, match=f"adapter a: found weights that are not finite, in {name};"):
        AdapterSet(load(shared.base, shared.cache)).add("a", replace(adapter, weights=broken))
    whole = {name: weight.to(torch.int8) for name, weight in adapter.weights.items()}
    with pytest.raises(ConfigError, match="weights of int8"):
        AdapterSet(load(shared.base, shared.cache)).add("a", replace(adapter, weights=whole))


def test_names_are_checked(shared: Shared) -> None:
    adapter_set = AdapterSet(load(shared.base, shared.cache))
    adapter_set.add("sums", shared.adapters["all"])
    for name in ("", "../x", "/abs", "a\0b", "x" * 300, "base", "sums", "a b", "-a", "a..b", ".hidden"):
        with pytest.raises(ConfigError, match="the name of an adapter: found "):
            adapter_set.add(name, shared.adapters["all"])
    assert adapter_set.names == ("sums",)
    with pytest.raises(ConfigError, match=r"expected one of base, sums\. Did you mean sums\?"):
        adapter_set.activate("sum")
    assert adapter_set.active is None


def test_a_swap_takes_no_time(shared: Shared) -> None:
    """It is bounded for SmolLM2 by benchmarks/adapter_swap.py; here are 14 of its 210 linears."""
    seconds = []
    for name in (*VARIANTS, None) * 20:
        start = time.perf_counter()
        shared.adapter_set.activate(name)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.001
