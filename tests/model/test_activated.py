"""Activated LoRA: where it works, and PEFT's logits and gradients, in both directions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.variants import calculate_alora_offsets
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.activated import active_tokens
from qlora_trainer.model.activation_policy import tile_layers
from qlora_trainer.model.adapter_folder import WEIGHTS_FILE
from qlora_trainer.model.adapters import attach_adapters
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.run.answer import generating
from qlora_trainer.run.export import export_adapter
from qlora_trainer.run.invocations import has_invocation
from qlora_trainer.step.document import IGNORE_INDEX, Document
from tests.model.adapters_in_use import Prepared, prepared_apart, read_for, require_fresh_after_swaps
from tests.model.peft_oracle import adapter_parameters, load_adapter, load_oracle, moved_by_peft
from tests.model.tiny_models import (
    load_for_training,
    our_step,
    packed_logits,
    random_adapter,
    relative_error,
    tiny_documents,
)

INVOCATION = (7, 9, 7)
TOLERANCE = 1e-5


def with_invocations(document: Document, *places: int) -> Document:
    ids_T = document.input_ids_T.copy()
    ids_T[(ids_T == 7) | (ids_T == 9)] = 11
    for place in places:
        ids_T[place : place + len(INVOCATION)] = INVOCATION
    return Document(document.index, ids_T, np.where(document.labels_T == IGNORE_INDEX, document.labels_T, ids_T))


# Once, twice (the last counts), overlapping itself, never, and at the very end.
PLACES = ((9,), (4, 15), (10, 12), (), (18,))
DOCUMENTS = [
    with_invocations(document, *places)
    for document, places in zip(tiny_documents(33, 29, 24, 12, 21), PLACES, strict=True)
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared_apart(tmp_path_factory, ("llama", "qwen3", "gemma2"))


def peft_logits(wrapped: Any, document: Document) -> Tensor:
    """With the offsets that PEFT's own hook finds."""
    ids_BT = torch.from_numpy(document.input_ids_T).long().unsqueeze(0)
    offsets = calculate_alora_offsets(wrapped.peft_config, "default", ids_BT)
    found: Tensor = wrapped(input_ids=ids_BT, use_cache=False, alora_offsets=offsets).logits[0].float()
    return found


def peft_gradients(wrapped: Any) -> dict[str, Tensor]:
    num_supervised_tokens = sum(document.num_supervised_tokens for document in DOCUMENTS)
    for document in DOCUMENTS:
        loss = torch.nn.functional.cross_entropy(
            peft_logits(wrapped, document)[:-1],
            torch.from_numpy(document.labels_T).long()[1:],
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        (loss / num_supervised_tokens).backward()
    return {name: own.grad for name, own in adapter_parameters(wrapped).items() if own.grad is not None}


def all_peft_logits(wrapped: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([peft_logits(wrapped, document) for document in DOCUMENTS])


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen3", {"target_modules": "all-linear", "use_rslora": True}),
    ("gemma2", {"target_modules": "all-linear"}),
    ("llama", {"modules_to_save": ["norm", "lm_head"], "rank_pattern": {"q_proj": 2}}),  # which work at every token
]


@pytest.mark.parametrize("name, fields", CASES, ids=str)
def test_logits_and_gradients_are_those_of_peft(
    name: str, fields: dict[str, Any], prepared: Prepared, tmp_path: Path
) -> None:
    """Mutations tried: the first occurrence; of the row, not of the document; B's gradient at every token."""
    base, cache = prepared[name]
    wrapped = moved_by_peft(cache.folder, alora_invocation_tokens=list(INVOCATION), **fields)
    wrapped.save_pretrained(tmp_path / "adapter")
    model = load_for_training(base, cache)
    adapter = read_for(tmp_path / "adapter", model)
    assert adapter.settings.invocation_tokens == INVOCATION
    expected = peft_gradients(wrapped)
    found = our_step(model, adapter.settings, adapter.weights, DOCUMENTS)
    assert found.gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        assert relative_error(found.gradients[key], gradient) <= TOLERANCE, key
    loaded = load_adapter(load_oracle(cache.folder, torch.float32), tmp_path / "adapter")
    theirs_TV = all_peft_logits(loaded)
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= TOLERANCE
    always = replace(adapter.settings, invocation_tokens=())
    attach_adapters(model, always, adapter.weights, dtype=torch.float32)
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) > 1e-2


def test_peft_reads_ours_and_gives_our_logits(prepared: Prepared, tmp_path: Path) -> None:
    base, cache = prepared["qwen3"]
    model = load_for_training(base, cache)
    settings = replace(some_settings(), targets=tuple(model.linears)[:5])
    weights = random_adapter(model, settings, b_size=0.1)
    attach_adapters(model, settings, weights, dtype=torch.float32)
    export_adapter(
        tmp_path / "ours",
        weights,
        settings,
        linear_names=list(model.linears),
        base_name=str(base.folder),
        revision=None,
    )
    theirs_TV = all_peft_logits(load_adapter(load_oracle(cache.folder, torch.float32), tmp_path / "ours"))
    assert relative_error(packed_logits(model, DOCUMENTS), theirs_TV) <= TOLERANCE
    assert read_for(tmp_path / "ours", model).settings == settings


def padded_on_the_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """With token 0, and the mask of what is none."""
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (longest - len(own)) + list(own) for own in prompts])
    return ids_BT, torch.tensor([[0] * (longest - len(own)) + [1] * len(own) for own in prompts])


def some_settings() -> LoraSettings:
    targets = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj")
    return LoraSettings(rank=2, alpha=4.0, dropout=0.0, targets=targets, invocation_tokens=INVOCATION)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_tiles_add_the_same_gradients_up(dropout: float, prepared: Prepared) -> None:
    base, cache = prepared["llama"]
    found = {}
    for tile_tokens in (0, 16):
        model = load_for_training(base, cache)
        settings = replace(some_settings(), dropout=dropout, targets=tuple(model.linears))
        tile_layers(model, tile_tokens)
        weights = random_adapter(model, settings, b_size=0.1)
        found[tile_tokens] = our_step(model, settings, weights, DOCUMENTS).gradients
    assert all(relative_error(found[16][name], found[0][name]) <= TOLERANCE for name in found[0])


def test_before_it_works_everything_is_the_bases_to_the_bit(prepared: Prepared) -> None:
    base, cache = prepared["llama"]
    model = load_for_training(base, cache)
    model.module.eval()
    before_TV = packed_logits(model, DOCUMENTS[:1])
    settings = replace(some_settings(), targets=tuple(model.linears))
    attach_adapters(model, settings, random_adapter(model, settings, b_size=0.3), dtype=torch.float32)
    after_TV = packed_logits(model, DOCUMENTS[:1])
    first = PLACES[0][0]
    assert torch.equal(before_TV[:first], after_TV[:first])
    assert all(not torch.equal(before_TV[place], after_TV[place]) for place in range(first, 33))


def test_each_adapter_of_a_set_begins_where_it_does(prepared: Prepared) -> None:
    tokens = {"plain": (), "activated": INVOCATION, "others": (11,)}
    settings = {name: replace(some_settings(), invocation_tokens=own) for name, own in tokens.items()}
    require_fresh_after_swaps(*prepared["llama"], settings, DOCUMENTS)


def test_answers_go_on_as_their_prompts_ended(prepared: Prepared, tmp_path: Path) -> None:
    """Token by token PEFT's, of prompts of different lengths at once, with and without an invocation."""
    base, cache = prepared["llama"]
    wrapped = moved_by_peft(cache.folder, alora_invocation_tokens=list(INVOCATION), target_modules="all-linear")
    wrapped.save_pretrained(tmp_path / "adapter")
    model = load_for_training(base, cache)
    adapter = read_for(tmp_path / "adapter", model)
    attach_adapters(model, adapter.settings, adapter.weights, dtype=torch.float32)
    prompts = [DOCUMENTS[0].input_ids_T.tolist(), DOCUMENTS[3].input_ids_T.tolist(), DOCUMENTS[2].input_ids_T.tolist()]
    ids_BT, mask_BT = padded_on_the_left(prompts)
    asked: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    generate: Any = model.module.generate
    with generating(model, 0):
        ours_BT = generate(input_ids=ids_BT, attention_mask=mask_BT, **asked)
        alone_BT = generate(input_ids=ids_BT[:1], attention_mask=mask_BT[:1], **asked)
    assert model.of_tokens.active_T1 is None
    with torch.no_grad():
        theirs_BT = wrapped.generate(input_ids=ids_BT, attention_mask=mask_BT, **asked)
    assert torch.equal(ours_BT, theirs_BT)
    assert torch.equal(alone_BT, ours_BT[:1, : alone_BT.shape[1]])
    attach_adapters(model, replace(adapter.settings, invocation_tokens=()), adapter.weights, dtype=torch.float32)
    with generating(model, 0):
        assert not torch.equal(generate(input_ids=ids_BT, attention_mask=mask_BT, **asked), ours_BT)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    invocation=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    seed=st.integers(0, 10_000),
)
def test_the_last_occurrence_in_a_document_counts(lengths: Sequence[int], invocation: Sequence[int], seed: int) -> None:
    """Against PEFT's search, document by document, in two rows."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    ids_BT = torch.randint(0, 3, (2, num_tokens), generator=generator)
    positions_BT = torch.cat([torch.arange(length) for length in lengths]).expand(2, num_tokens)
    config = {"default": peft.LoraConfig(alora_invocation_tokens=list(invocation), task_type="CAUSAL_LM")}
    expected = []
    for row_T in ids_BT:
        for document_T in row_T.split(list(lengths)):
            (offset,) = calculate_alora_offsets(config, "default", document_T.unsqueeze(0))  # type: ignore[arg-type]
            is_active_T = torch.arange(len(document_T)) >= len(document_T) - (offset or 0)
            expected.append(is_active_T)
            assert has_invocation(document_T.numpy().astype(np.int32), invocation) == bool(offset)
    found_BT = active_tokens(ids_BT, positions_BT, invocation)
    assert torch.equal(found_BT.flatten(), torch.cat(expected))


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"use_dora": True}, "alora_invocation_tokens and use_dora"),
        ({"lora_bias": True}, "alora_invocation_tokens and lora_bias"),
        ({"init_lora_weights": "pissa"}, "alora_invocation_tokens and a variant of LoRA"),
        ({"target_parameters": ["q_proj.weight"]}, "alora_invocation_tokens and target_parameters"),
        ({"velora_config": {}}, "alora_invocation_tokens and velora_config"),
        ({"alora_invocation_tokens": "a"}, "alora_invocation_tokens = 'a'"),
        ({"alora_invocation_tokens": [-1]}, r"alora_invocation_tokens = \[-1\]"),
    ],
    ids=str,
)
def test_what_is_not_computed_token_by_token_is_refused_beside_it(
    changes: dict[str, Any], found: str, prepared: Prepared, tmp_path: Path
) -> None:
    base, cache = prepared["llama"]
    moved_by_peft(cache.folder, alora_invocation_tokens=list(INVOCATION)).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=found):
        read_for(tmp_path / "adapter", load_for_training(base, cache))


def test_a_linear_that_is_whole_works_at_every_token(prepared: Prepared, tmp_path: Path) -> None:
    """As LoRA it would not: refused."""
    base, cache = prepared["llama"]
    moved_by_peft(cache.folder, alora_invocation_tokens=list(INVOCATION)).save_pretrained(tmp_path / "adapter")
    path, config = tmp_path / "adapter" / WEIGHTS_FILE, tmp_path / "adapter" / "adapter_config.json"
    save_file(load_file(path) | {"base_model.model.model.layers.0.mlp.up_proj.weight": torch.zeros(128, 64)}, path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": ["layers.0.mlp.up_proj"]}))
    with pytest.raises(ConfigError, match="alora_invocation_tokens and linears that were trained whole"):
        read_for(tmp_path / "adapter", load_for_training(base, cache))


def test_lora_of_a_table_is_refused_beside_it(prepared: Prepared, tmp_path: Path) -> None:
    """PEFT masks that of a head, too; a table that is trained works at every token."""
    base, cache = prepared["llama"]
    fields: dict[str, Any] = {"alora_invocation_tokens": list(INVOCATION), "target_modules": ["q_proj", "lm_head"]}
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        moved_by_peft(cache.folder, **fields).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"alora_invocation_tokens, and LoRA on lm_head"):
        read_for(tmp_path / "adapter", load_for_training(base, cache))


def test_no_mask_is_left_for_what_comes_next(prepared: Prepared) -> None:
    """An adapter that always works, after one that does not; mutation tried: the mask stays."""
    base, cache = prepared["llama"]
    model = load_for_training(base, cache)
    settings = some_settings()
    weights = random_adapter(model, settings, b_size=0.3)
    attach_adapters(model, settings, weights, dtype=torch.float32)
    packed_logits(model, DOCUMENTS)
    attach_adapters(model, replace(settings, invocation_tokens=()), weights, dtype=torch.float32)
    generate: Any = model.module.generate
    ids_BT = torch.tensor([DOCUMENTS[0].input_ids_T.tolist()])
    with generating(model, 0):
        out_BT = generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=2, pad_token_id=0)
    assert out_BT.shape[1] > ids_BT.shape[1]


def test_what_pads_a_prompt_is_no_invocation(prepared: Prepared) -> None:
    """An answer is the same alone and beside a longer prompt."""
    base, cache = prepared["llama"]
    model = load_for_training(base, cache)
    settings = replace(some_settings(), targets=tuple(model.linears), invocation_tokens=(0,))
    attach_adapters(model, settings, random_adapter(model, settings, b_size=0.3), dtype=torch.float32)
    prompts = [own.input_ids_T.tolist() for own in (DOCUMENTS[3], DOCUMENTS[0])]
    ids_BT, mask_BT = padded_on_the_left(prompts)
    asked: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    generate: Any = model.module.generate
    with generating(model, 0):
        together_BT = generate(input_ids=ids_BT, attention_mask=mask_BT, **asked)
        alone_BT = generate(input_ids=torch.tensor(prompts[:1]), attention_mask=torch.ones(1, len(prompts[0])), **asked)
    assert together_BT[0, ids_BT.shape[1] :].tolist() == alone_BT[0, len(prompts[0]) :].tolist()
