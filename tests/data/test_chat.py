from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.data import chat
from qlora_trainer.data.chat import RowTokenizer, prompt_ids
from qlora_trainer.data.rows import Row
from qlora_trainer.data.tokenized import TokenizedData, require_most_rows
from qlora_trainer.errors import DataError
from qlora_trainer.step.document import IGNORE_INDEX, Document
from tests.data.stored import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Turns = list[tuple[str, str]]
# Every kind of character, and often the whitespace that tokenizers merge across the start of an answer.
TEXT = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t") | st.sampled_from("aehijoASTN:"), max_size=30
)
ANSWER = st.builds(str.__add__, st.sampled_from(["", "", "\n\n", " \n\n", "  "]), TEXT).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> Turns:
    turns: Turns = [("system", draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [("user", draw(TEXT)), ("assistant", draw(ANSWER))]
    return turns + [("user", draw(TEXT))] * draw(st.integers(0, 1))


def supervised_texts(document: Document, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The decoded runs of labels."""
    runs = groupby(document.labels_T.tolist(), key=lambda label: label != IGNORE_INDEX)
    texts = [tokenizer.decode(list(labels), skip_special_tokens=False) for is_label, labels in runs if is_label]
    assert all(isinstance(text, str) for text in texts)
    return [str(text) for text in texts]


def only(data: TokenizedData) -> Document:
    [document] = data.documents
    return document


def replace_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    changed = deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@settings(deadline=None)
@given(turns=conversations())
def test_chatml_labels_are_the_answers_and_stops(
    chatml: PreTrainedTokenizerFast, make_row: Callable[..., Row], turns: Turns
) -> None:
    document = only(tokenize([make_row(*turns)], chatml))
    answers = [content for role, content in turns if role == "assistant"]
    assert supervised_texts(document, chatml) == [answer + "<|im_end|>" for answer in answers]
    supervised = document.labels_T != IGNORE_INDEX
    assert (document.labels_T[supervised] == document.input_ids_T[supervised]).all()
    assert document.input_ids_T.dtype == document.labels_T.dtype == np.int32


@settings(deadline=None)
@given(turns=conversations())
def test_llama3_labels_are_the_answers_and_stops_after_one_bos(
    llama3: PreTrainedTokenizerFast, make_row: Callable[..., Row], turns: Turns
) -> None:
    document = only(tokenize([make_row(*turns)], llama3))
    answers = [content for role, content in turns if role == "assistant"]
    assert supervised_texts(document, llama3) == [answer.strip() + "<|eot_id|>" for answer in answers]
    assert document.input_ids_T[0] == llama3.bos_token_id
    assert (document.input_ids_T == llama3.bos_token_id).sum() == 1


@settings(deadline=None)
@given(question=TEXT, answer=ANSWER)
def test_an_answer_follows_the_tokens_that_generation_sees(
    chatml: PreTrainedTokenizerFast,
    llama3: PreTrainedTokenizerFast,
    make_row: Callable[..., Row],
    question: str,
    answer: str,
) -> None:
    row = make_row(("user", question), ("assistant", answer))
    for tokenizer in (chatml, llama3):
        document = only(tokenize([row], tokenizer))
        first = int(np.flatnonzero(document.labels_T != IGNORE_INDEX)[0])
        assert document.input_ids_T[:first].tolist() == prompt_ids(row.messages[:1], tokenizer)


def test_labels_equal_the_mask_of_generation_markers(
    chatml: PreTrainedTokenizerFast, make_row: Callable[..., Row]
) -> None:
    from transformers import BatchEncoding

    marked = replace_template(
        chatml,
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    )
    turns = [
        ("system", "Be brief."),
        ("user", "Hi, you?"),
        ("assistant", "Hello  there"),
        ("user", ""),
        ("assistant", "42."),
    ]
    oracle = marked.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert isinstance(oracle, BatchEncoding)
    for tokenizer in (chatml, marked):
        document = only(tokenize([make_row(*turns)], tokenizer))
        assert document.input_ids_T.tolist() == oracle["input_ids"]
        assert (document.labels_T != IGNORE_INDEX).tolist() == [bool(mask) for mask in oracle["assistant_masks"]]


def test_newlines_that_the_tokenizer_merges_across_the_start_are_cut_there(
    chatml: PreTrainedTokenizerFast, make_row: Callable[..., Row]
) -> None:
    row = make_row(("user", "Hi"), ("assistant", "\nHello"), ("user", "Hi"), ("assistant", "\n\nHello"))
    assert len(chatml("\n\n", add_special_tokens=False)["input_ids"]) == 1, "else this tests nothing"
    document = only(tokenize([row], chatml))
    assert supervised_texts(document, chatml) == ["\nHello<|im_end|>", "\n\nHello<|im_end|>"]


def test_sentencepiece_labels_are_the_answers_and_stops(
    mistral: PreTrainedTokenizerFast, make_row: Callable[..., Row]
) -> None:
    row = make_row(("user", "What does it do?"), ("assistant", "The answer is"), ("user", "Hi"), ("assistant", "Hello"))
    document = only(tokenize([row], mistral))
    assert supervised_texts(document, mistral) == ["The answer is</s>", "Hello</s>"]
    assert (document.input_ids_T == mistral.bos_token_id).sum() == 1
    assert (document.labels_T == mistral.eos_token_id).sum() == 2


def test_an_answer_that_cannot_be_told_from_its_prompt_is_refused(
    mistral: PreTrainedTokenizerFast, make_row: Callable[..., Row]
) -> None:
    merging = replace_template(
        mistral,
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + ' ASSISTANT:' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
    )
    with pytest.raises(DataError, match=r"train\.jsonl:1: found an answer whose first characters"):
        tokenize([make_row(("user", "you"), ("assistant", "Hi"))], merging)


def test_a_bos_that_the_template_writes_twice_is_refused(
    llama3: PreTrainedTokenizerFast, make_row: Callable[..., Row]
) -> None:
    doubled = replace_template(llama3, "{{ bos_token }}" + str(llama3.chat_template))
    with pytest.raises(DataError, match="two BOS tokens"):
        tokenize([make_row(("user", "Hi"), ("assistant", "Hello"))], doubled)


def test_a_template_without_stop_token_is_refused(
    chatml: PreTrainedTokenizerFast, make_row: Callable[..., Row]
) -> None:
    endless = replace_template(chatml, "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    with pytest.raises(DataError, match=r"train\.jsonl:1: found an answer that .* does not end with a stop token"):
        tokenize([make_row(("user", "Hi"), ("assistant", "Hello"))], endless)


def test_rows_whose_answers_the_template_leaves_out_are_counted(
    chatml: PreTrainedTokenizerFast, make_row: Callable[..., Row]
) -> None:
    forgetful = replace_template(
        chatml, str(chatml.chat_template).replace("message['content']", "message['content'].replace('(secret)', '')")
    )
    good = [make_row(("user", "Hi"), ("assistant", "Hello"), index=index) for index in range(19)]
    bad = make_row(("user", "Hi"), ("assistant", "(secret) \n"), index=19)
    data = tokenize([*good, bad], forgetful)
    assert (data.num_rows, data.num_dropped_untrainable, len(data.documents)) == (20, 1, 19)
    assert all(document.num_supervised_tokens > 1 for document in data.documents)
    require_most_rows(data, 0.05)
    with pytest.raises(
        DataError, match=r"train\.jsonl: found 1 of 20 rows .*1 without a token to learn\); expected at"
    ):
        require_most_rows(data, 0.04)


def test_a_row_that_would_take_gigabytes_to_tokenise_is_refused(
    chatml: PreTrainedTokenizerFast, make_row: Callable[..., Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "MOST_CHARACTERS", 1000)
    assert len(RowTokenizer(chatml)([make_row(("user", "Hi" * 400), ("assistant", "Hello"))])) == 1
    with pytest.raises(DataError, match=r"train\.jsonl:1: found a row of 2,0\d\d characters; expected at most 1,000"):
        RowTokenizer(chatml)([make_row(("user", "Hi" * 1000), ("assistant", "Hello"))])


def test_batches_do_not_show(chatml: PreTrainedTokenizerFast, make_row: Callable[..., Row]) -> None:
    rows = [make_row(("user", "Hi" * index), ("assistant", "Hello"), index=index) for index in range(7)]
    tokenizer = RowTokenizer(chatml)
    whole = tokenizer(rows)
    pieces = [row for first in range(0, 7, 3) for row in tokenizer(rows[first : first + 3])]
    assert [row.document.index for row in pieces] == list(range(7))
    assert [row.document.input_ids_T.tolist() for row in pieces] == [row.document.input_ids_T.tolist() for row in whole]
    assert [row.document.labels_T.tolist() for row in pieces] == [row.document.labels_T.tolist() for row in whole]
    assert tokenizer([]) == []


def test_the_shipped_base_tokenizes_exactly(smollm2: PreTrainedTokenizerFast, make_row: Callable[..., Row]) -> None:
    answer = "Hello — ünïcode 日本 😀\n\nCopy 128 files. "
    row = make_row(("user", "Hi  é"), ("assistant", answer), ("user", "And?"), ("assistant", "\n\nBye"))
    document = only(tokenize([row], smollm2))
    assert supervised_texts(document, smollm2) == [answer + "<|im_end|>", "\n\nBye<|im_end|>"]
    assert str(smollm2.decode(document.input_ids_T.tolist())).startswith("<|im_start|>system\nYou are a helpful AI")
    assert smollm2.pad_token_id == smollm2.eos_token_id  # the stop token is a label all the same
    assert (document.labels_T == smollm2.eos_token_id).sum() == 2
    first = int(np.flatnonzero(document.labels_T != IGNORE_INDEX)[0])
    assert document.input_ids_T[:first].tolist() == prompt_ids(row.messages[:1], smollm2)
