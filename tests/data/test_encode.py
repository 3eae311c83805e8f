"""The tokens before an answer are those of its prompt alone, for any text, cut anywhere."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from qlora_trainer.data.encode import encode, encode_prompt
from qlora_trainer.data.turns import Rendered, Turn
from qlora_trainer.errors import DataError
from tests.data.published import PUBLISHED, make_tokenizer

BY_NAME = {published.name: published for published in PUBLISHED}
KINDS = ["bytes", "sentencepiece", "first_space", "prepended", "plain"]


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """With special tokens of every sort: some take the space beside them along, and one begins as another does."""
    from tokenizers import normalizers, pre_tokenizers

    tokenizer = make_tokenizer(BY_NAME["chatml" if kind in ("bytes", "plain") else "gemma_2"])
    if kind == "first_space":  # at the start of a text only, as Mistral's
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    elif kind == "prepended":  # before whatever lies between special tokens, as Llama 2's
        space = [normalizers.Lowercase(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(space)
    tokens = [
        AddedToken("<s>", special=True),
        AddedToken("<s>l", special=True),
        AddedToken("<right>", special=True, rstrip=True),
        AddedToken("<left>", special=True, lstrip=True),
        AddedToken("<word>", special=True, single_word=True),
        AddedToken("<Norm>", special=True, normalized=True),
    ]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if kind == "plain":
        tokenizer.split_special_tokens = True
    return tokenizer


TEXT = st.lists(
    st.sampled_from(["<s>", "<s>l", "<right>", "<left>", "<word>", "<Norm>", "<norm>", "<S>"])
    | st.sampled_from(["l", "ll", "Hello", " ", "  ", "\n", "\n\n", "é", "."]),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT, data=st.data())
def test_an_answer_begins_after_the_tokens_of_its_prompt(kind: str, text: str, data: st.DataObject) -> None:
    """The oracle tokenises every prompt whole.

    Mutation tried: the end of a prompt is tokenised without the special token that it begins with.
    """
    tokenizer = tokenizer_of(kind)
    starts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=3)))
    conversation = Rendered(text, tuple(Turn(start, len(text), 0) for start in starts))
    whole = encode_prompt(text, tokenizer)
    prompts = [encode_prompt(text[:start], tokenizer) for start in starts]
    try:
        [encoded] = encode([conversation], tokenizer, wheres=["x:1"])
    except DataError:
        assert any(whole[: len(prompt)] != prompt for prompt in prompts)
        return
    if all(whole[: len(prompt)] == prompt for prompt in prompts):
        assert encoded.input_ids_T.tolist() == whole
        assert list(encoded.first_tokens) == [len(prompt) for prompt in prompts]
    else:  # in pieces
        assert encoded.first_tokens[:1] == (len(prompts[0]),)
        assert encoded.input_ids_T[: len(prompts[0])].tolist() == prompts[0]
    assert (np.diff(encoded.starts_T) >= 0).all()
