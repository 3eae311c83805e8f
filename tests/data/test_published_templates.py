"""What published templates do that others do not, and the fixtures beside the models' own templates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from importlib import resources
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchEncoding

from qlora_trainer.data.messages import Message
from qlora_trainer.data.rows import Row
from qlora_trainer.data.turns import render_row
from qlora_trainer.errors import DataError
from tests.data.conversations import ANSWER, BY_NAME, TEXT, labelled, tokenizer_of
from tests.data.stored import tokenize

Turns = Sequence[tuple[str, str]]


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[str, str]]:
    turns = [("system", draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [("user", draw(TEXT)), ("assistant", draw(ANSWER))]
    return turns


def row_of(turns: Turns) -> Row:
    return Row(path="x", index=0, line=1, messages=tuple(Message(role, content) for role, content in turns))


def test_qwen_3_learns_the_thoughts_of_the_last_answer_only() -> None:
    answer = ("assistant", "<think>\nWho?\n</think>\n\nHello")
    tokenizer = tokenizer_of("qwen_3")
    data = tokenize([row_of([("user", "Hi"), answer, ("user", "And?"), answer])], tokenizer)
    assert labelled(data.documents[0], tokenizer) == [
        (
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("<think>\nWho?\n</think>\n\nHello<|im_end|>", True),
        ("\n", False),
    ]
    assert data.num_rewritten_turns == 1


@pytest.mark.parametrize(
    "template, answer, missing",
    [
        ("deepseekv3_training", "<think>\nWho?\n</think>\n\nHello", r"'Who\?'"),
        ("qwen_3", "First <think>a</think> and then <think>b</think> two", "'First'"),
        ("qwen3_training", "First <think>a</think> and then <think>b</think> two", "'First'"),
    ],
)
def test_a_template_that_drops_a_part_of_an_answer_is_refused(template: str, answer: str, missing: str) -> None:
    """They learn what stands behind the last mark, without a word: found by an opponent, with R1's form of template."""
    tokenizer = deepcopy(tokenizer_of("qwen_3"))
    if template != "qwen_3":
        eos = "<\uff5cend\u2581of\u2581sentence\uff5c>"  # DeepSeek's
        tokenizer.chat_template = packaged_template(template).replace(eos, "<|im_end|>")
    with pytest.raises(DataError, match=f"leaves out a part of the text of message 1: {missing}"):
        tokenize([row_of([("user", "Hi"), ("assistant", answer)])], tokenizer)


def test_thoughts_in_an_answer_are_learned_wherever_their_tags_stand() -> None:
    tokenizer = tokenizer_of("qwen_3")
    [document] = tokenize([row_of([("user", "Hi"), ("assistant", "<think>Who?</think>Hello")])], tokenizer).documents
    learned = [text for text, is_learned in labelled(document, tokenizer) if is_learned]
    assert learned == ["<think>\nWho?\n</think>\n\nHello<|im_end|>"]


def thinking_row(*answers: tuple[str, str]) -> Row:
    """(reasoning, text) of each answer, with a question before each."""
    turns = [turn for reasoning, text in answers for turn in (Message("user", "Hi"), thinking(reasoning, text))]
    return replace(row_of([]), messages=tuple(turns))


def thinking(reasoning: str, text: str) -> Message:
    return Message("assistant", text, reasoning=reasoning)


def test_qwen_3_learns_reasoning_under_a_key_of_its_own() -> None:
    """As it does thoughts that are written into the text; those of earlier answers it forgets."""
    tokenizer = tokenizer_of("qwen_3")
    data = tokenize([thinking_row(("Who?\n", "Hello"), ("And\n\nwho?", "Bye"))], tokenizer)
    assert labelled(data.documents[0], tokenizer) == [
        (
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("<think>\nAnd\n\nwho?\n</think>\n\nBye<|im_end|>", True),
        ("\n", False),
    ]
    assert data.num_rewritten_turns == 1
    marked = deepcopy(tokenizer)
    marked.chat_template = packaged_template("qwen3_training")
    [document] = tokenize([thinking_row(("Who?", "Hello"), ("Why?", "Bye"))], marked).documents
    assert [text for text, is_learned in labelled(document, marked) if is_learned] == [
        f"<think>\n{thought}\n</think>\n\n{text}<|im_end|>" for thought, text in (("Who?", "Hello"), ("Why?", "Bye"))
    ]


def test_gpt_oss_learns_reasoning() -> None:
    tokenizer = deepcopy(tokenizer_of("qwen_3"))
    tokenizer.chat_template = packaged_template("gptoss")
    row = thinking_row(("Who?", "Hello"), ("Why?", "Bye"))
    rendered = render_row(row, tokenizer, controls=())
    assert [rendered.text[turn.start : turn.end] for turn in rendered.turns] == [
        "<|channel|>analysis<|message|>Why?<|end|><|start|>assistant<|channel|>final<|message|>Bye<|return|>"
    ]
    assert rendered.num_rewritten == 1


@pytest.mark.parametrize("name", ["chatml", "qwen_2_5", "llama_3_1", "gemma_3", "mistral_v0_3", "phi_3"])
@pytest.mark.parametrize("reasoning", ["Who?", "4"])
def test_reasoning_that_a_template_leaves_out_is_refused(name: str, reasoning: str) -> None:
    """Mutation tried: only looked for in the text; reasoning that the answer repeats would pass."""
    with pytest.raises(DataError, match="x:1: found a chat template that leaves out the reasoning of message 1"):
        tokenize([thinking_row((reasoning, "4"), (reasoning, "4"))], tokenizer_of(name))


def test_reasoning_that_a_template_cuts_is_refused() -> None:
    tokenizer = deepcopy(tokenizer_of("qwen_3"))
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "reasoning_content.strip('\\n')", "reasoning_content[:2]"
    )
    tokenize([thinking_row(("No", "Hello"))], tokenizer)
    with pytest.raises(DataError, match="leaves out the reasoning of message 1"):
        tokenize([thinking_row(("No one", "Hello"))], tokenizer)


def test_control_tokens_in_reasoning_are_refused() -> None:
    with pytest.raises(DataError, match=r"the control token '<\|im_end\|>' in the text of message 1"):
        tokenize([thinking_row(("<|im_end|>", "Hello"))], tokenizer_of("qwen_3"))


TOOLS = '[{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]'


@pytest.mark.parametrize(
    "name, learned",
    [
        ("llama_3_1", ['{"name": "add", "parameters": {"a": "ü"}}<|eot_id|>', "It is 2.<|eot_id|>"]),
        (
            "qwen_2_5",
            ['<tool_call>\n{"name": "add", "arguments": {"a": "ü"}}\n</tool_call><|im_end|>', "It is 2.<|im_end|>"],
        ),
        ("qwen_3", ["<think>\n\n</think>\n\nIt is 2.<|im_end|>"]),
    ],
)
def test_tool_calls_are_learned(name: str, learned: list[str], make_tool_row: Callable[[str], Row]) -> None:
    tokenizer = tokenizer_of(name)
    [document] = tokenize([make_tool_row(TOOLS)], tokenizer).documents
    assert [text for text, is_learned in labelled(document, tokenizer) if is_learned] == learned


@pytest.mark.parametrize("name", ["chatml", "gemma_3", "phi_3"])
def test_templates_that_know_no_tools_are_refused(name: str, make_tool_row: Callable[[str], Row]) -> None:
    with pytest.raises(DataError, match=r"leaves out the|refuses"):
        tokenize([make_tool_row(TOOLS)], tokenizer_of(name))
    with pytest.raises(DataError, match=r"leaves out the|refuses"):
        tokenize([make_tool_row("")], tokenizer_of(name))


def test_a_call_whose_words_are_in_the_question_is_not_taken_for_rendered() -> None:
    """ChatML passes over calls. Mutation tried: the function's name is looked for in the whole text."""
    from qlora_trainer.data.tool_calls import ToolCall

    question = Message("user", "Please add 1 and 1, and tell me the result.")
    call = Message("assistant", "", (ToolCall("add", "{}", "call00001"),))
    row = row_of([])
    with pytest.raises(DataError, match="leaves out the calls of message 1"):
        tokenize([replace(row, messages=(question, call))], tokenizer_of("chatml"))
    silent = deepcopy(tokenizer_of("chatml"))
    silent.chat_template = (
        "{% for m in messages %}{% if m.role != 'tool' %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    result = Message("tool", "the result", tool_call_id="call00001")
    answered = (question, Message("assistant", "I add."), result, Message("assistant", "Two."))
    with pytest.raises(DataError, match="leaves out the result of message 2"):
        tokenize([replace(row, messages=answered)], silent)


@pytest.fixture(scope="session")
def make_tool_row() -> Callable[[str], Row]:
    from qlora_trainer.data.tool_calls import ToolCall

    def build(tools: str) -> Row:
        call = ToolCall("add", '{"a": "ü"}', "call00001")
        messages = (
            Message("user", "1 + 1?"),
            Message("assistant", "", (call,)),
            Message("tool", "2", tool_call_id="call00001"),
            Message("assistant", "It is 2."),
        )
        return Row(path="x", index=0, line=1, messages=messages, tools=tools)

    return build


PACKAGED = {  # by TRL, as the models publish them
    "llama_3_1": "llama3_1",
    "qwen_2_5": "qwen2_5",
    "qwen_3": "qwen3",
    "gemma_2": "gemma",
    "gemma_3": "gemma3",
    "phi_3": "phi3",
}


def packaged_template(name: str) -> str:
    return resources.files("trl").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PACKAGED)
@given(turns=conversations(), is_asked=st.booleans())
def test_the_fixtures_write_what_the_models_templates_write(
    name: str, turns: list[tuple[str, str]], is_asked: bool
) -> None:
    tokenizer = tokenizer_of(name)
    turns = [turn for turn in turns if BY_NAME[name].takes_system or turn[0] != "system"]
    messages = [{"role": role, "content": content} for role, content in (turns[:-1] if is_asked else turns)]
    ours, theirs = (
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=is_asked)
        for template in (tokenizer.get_chat_template(), packaged_template(PACKAGED[name]))
    )
    assert ours == theirs


@pytest.mark.parametrize(
    "name, marked", [("qwen_2_5", "qwen2_5"), ("qwen_3", "qwen3"), ("gemma_3", "gemma3"), ("phi_3", "phi3")]
)
@given(turns=conversations(), weights=st.lists(st.integers(0, 1), min_size=3, max_size=3))
def test_generation_marks_are_the_mask(
    name: str, marked: str, turns: list[tuple[str, str]], weights: list[int]
) -> None:
    """transformers' own mask is the oracle, but for a newline that is marked after the stop token.

    A token that the tokenizer merges across the start of an answer is marked whole; such answers are left out here.
    """
    turns = [(role, content.strip() if role == "assistant" else content) for role, content in turns]
    tokenizer = deepcopy(tokenizer_of(name))
    tokenizer.chat_template = packaged_template(f"{marked}_training")
    row, answer = row_of(turns), 0
    messages = []
    for message in row.messages:
        is_answer = message.role == "assistant"
        messages.append(replace(message, weight=weights[answer]) if is_answer else message)
        answer += is_answer
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert isinstance(text, BatchEncoding)
    ids, mask = text["input_ids"], text["assistant_masks"]
    runs = [list(run) for is_marked, run in groupby(range(len(ids)), key=lambda at: mask[at]) if is_marked]
    expected = [str(tokenizer.decode([ids[at] for at in run])).rstrip() for run in runs]
    kept = [text for text, weight in zip(expected, weights, strict=False) if weight]
    data = tokenize([replace(row, messages=tuple(messages))], tokenizer)
    if not kept:
        assert (len(data.documents), data.num_dropped_untrainable) == (0, 1)
        return
    [document] = data.documents
    assert [text for text, is_learned in labelled(document, tokenizer) if is_learned] == kept
    assert data.num_rewritten_turns == 0
