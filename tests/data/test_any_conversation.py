"""Any conversation through any published template: labels are -100 exactly outside what is to be learned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qlora_trainer.data.chat import prompt_ids
from qlora_trainer.data.messages import Message
from qlora_trainer.data.template import render, render_prompt
from qlora_trainer.data.tool_calls import ToolCall
from qlora_trainer.errors import DataError
from qlora_trainer.step.document import IGNORE_INDEX
from tests.data.conversations import (
    ANSWER,
    BY_NAME,
    NAMES,
    TEXT,
    Conversation,
    RewritesHistoryError,
    as_openai,
    conversations,
    expected_labels,
    labelled,
    tokenizer_of,
)
from tests.data.stored import tokenize


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_labels_are_what_is_to_be_learned_and_nothing_else(name: str, data: st.DataObject) -> None:
    """Tools, calls, results, weights and reasoning where the template knows them, and each `train_on`.

    Mutations tried, in `turns` and `chat`: a turn begins one character early, or ends one token late; weights are not
    looked at; `last_assistant` is the last that is learned; answers that are rewritten are learned all the same.
    """
    published, tokenizer = BY_NAME[name], tokenizer_of(name)
    conversation = data.draw(conversations(published))
    try:
        expected = expected_labels(conversation, published.segments)
    except RewritesHistoryError:
        with pytest.raises(DataError, match="x:1: found a chat template that rewrites history"):
            tokenize([conversation.row], tokenizer, train_on=conversation.train_on)
        return
    tokenized = tokenize([conversation.row], tokenizer, train_on=conversation.train_on)
    if not any(is_learned for _, is_learned in expected):
        assert (len(tokenized.documents), tokenized.num_dropped_untrainable) == (0, 1)
        return
    [document] = tokenized.documents
    assert labelled(document, tokenizer) == expected
    is_learned_T = document.labels_T != IGNORE_INDEX
    assert (document.labels_T[is_learned_T] == document.input_ids_T[is_learned_T]).all()
    if tokenizer.bos_token_id is not None and name != "phi_3":  # whose template writes none
        assert (document.input_ids_T == tokenizer.bos_token_id).nonzero()[0].tolist() == [0]
    first_stop = int(tokenized.documents.store.records(np.array([0]))["first_stop"][0])
    assert first_stop >= 0 or conversation.train_on == "all"
    if first_stop >= 0:
        assert int(document.labels_T[first_stop]) in tokenizer.added_tokens_decoder  # special tokens are
        assert document.labels_T[first_stop] not in document.labels_T[:first_stop]
    num_spans = sum(is_learned for _, is_learned in expected)
    if conversation.train_on != "all":
        assert tokenized.num_rewritten_turns == len(conversation.learned) - num_spans


@pytest.mark.parametrize("name", [name for name in NAMES if not BY_NAME[name].most_calls])
@given(data=st.data())
def test_calls_that_a_template_does_not_know_are_refused_by_name(name: str, data: st.DataObject) -> None:
    published, tokenizer = BY_NAME[name], tokenizer_of(name)
    drawn = data.draw(conversations(published, most_calls=2))
    has_call = any(message.tool_calls for message in drawn.messages)
    conversation = drawn if has_call else replace(drawn, messages=CALLED)
    with pytest.raises(DataError, match=rf"^x:1: .*({published.refuses_tools})"):
        tokenize([conversation.row], tokenizer, train_on=conversation.train_on)


CALLED = (
    Message("user", "1 + 1?"),
    Message("assistant", "", (ToolCall("add", '{"a": 1}', "call00001"),)),
    Message("tool", "2", tool_call_id="call00001"),
    Message("assistant", "It is 2."),
)
TWO_CALLS = replace(CALLED[1], tool_calls=CALLED[1].tool_calls * 2)
WITH_TEXT = replace(CALLED[1], content="Let me see.")


@pytest.mark.parametrize(
    "name, messages, found",
    [
        ("llama_3_1", (CALLED[0], TWO_CALLS), r"refuses \(This model only supports single tool-calls at once!\)"),
        ("llama_3_1", (CALLED[0], WITH_TEXT), "leaves out the text of message 1, whose role is assistant"),
        ("mistral_v0_3", (CALLED[0], WITH_TEXT), "leaves out the text of message 1, whose role is assistant"),
        (
            "mistral_v0_3",
            (CALLED[0], replace(CALLED[1], tool_calls=(ToolCall("add", "{}", "call_1"),))),
            r"refuses \(Tool call IDs should be alphanumeric strings with length 9!\)",
        ),
        (
            "gemma_2",
            (Message("system", "Be brief."), *CALLED[::3]),
            r"refuses \(System role not supported\); its roles: s",
        ),
        # It writes the system's text only before an answer that is not there yet.
        (
            "mistral_v0_3",
            (Message("system", "Be brief."), *CALLED[::3]),
            "rewrites history .the text before message 2 ",
        ),
        (
            "qwen_2_5",
            (Message("developer", "Be brief."), *CALLED[::3]),
            "leaves out the text of message 0, whose role is d",
        ),
        (
            "phi_3",
            (Message("developer", "Be brief."), *CALLED[::3]),
            "leaves out the text of message 0, whose role is d",
        ),
        ("gemma_3", (CALLED[0], CALLED[3], CALLED[3]), r"refuses \(Conversation roles must alternate"),
    ],
)
def test_what_a_template_does_not_write_is_refused_by_name(
    name: str, messages: tuple[Message, ...], found: str
) -> None:
    with pytest.raises(DataError, match=rf"^x:1: found .*{found}"):
        tokenize([Conversation(messages, [], "assistant").row], tokenizer_of(name))


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_texts_are_those_that_apply_chat_template_gives(name: str, data: st.DataObject) -> None:
    """Which is the way that everybody goes; ours leaves out what it does for callers of other kinds."""
    tokenizer = tokenizer_of(name)
    conversation = data.draw(conversations(BY_NAME[name]))
    messages, tools = conversation.messages, conversation.row.tools
    for is_asked, ours in ((False, render), (True, render_prompt)):
        theirs = tokenizer.apply_chat_template(
            [as_openai(message) for message in messages],
            tools=conversation.tools or None,
            tokenize=False,
            add_generation_prompt=is_asked,
        )
        assert ours(messages, tokenizer, tools) == theirs


@pytest.mark.parametrize("name", NAMES)
@given(question=TEXT, answer=ANSWER)
@example(question="Hi", answer="\n\nHello")
def test_an_answer_follows_the_tokens_that_generation_sees(name: str, question: str, answer: str) -> None:
    messages = (Message("user", question), Message("assistant", answer))
    tokenizer, row = tokenizer_of(name), Conversation(messages, [], "assistant").row
    [document] = tokenize([row], tokenizer).documents
    first = int(np.flatnonzero(document.labels_T != IGNORE_INDEX)[0])
    assert document.input_ids_T[:first].tolist() == prompt_ids(row.messages[:1], tokenizer)
