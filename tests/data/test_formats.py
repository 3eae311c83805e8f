from __future__ import annotations

import pytest

from qlora_trainer.data.formats import Message, parse_conversation
from qlora_trainer.errors import DataError

QUESTION = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CONVERSATION = (Message("user", "Hi"), Message("assistant", "Hello"))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, ANSWER]},
        {"messages": [QUESTION, ANSWER], "prompt": "Hi", "prompt_id": "7", "category": "chat"},
        {"messages": [{**QUESTION, "name": None}, ANSWER], "tools": None},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello", "system": None, "id": 3},
    ],
)
def test_every_form_gives_the_same_conversation(row: dict[str, object]) -> None:
    assert parse_conversation(row, where="x:1") == CONVERSATION


def test_alpaca_input_and_system_are_kept() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."}
    assert parse_conversation(row, where="x:1") == (
        Message("system", "Be brief."),
        Message("user", "Add.\n\n1 2"),
        Message("assistant", "3"),
    )


def test_text_is_not_stripped() -> None:
    row = {"prompt": "  Hi\n", "completion": "\n Hello  "}
    assert [message.content for message in parse_conversation(row, where="x:1")] == ["  Hi\n", "\n Hello  "]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({}, "a row with keys []"),
        ({"text": "Hi"}, "a row with keys ['text']"),
        ({"conversations": []}, "a row with keys ['conversations']"),
        ({"instruction": "Hi", "inptu": "x", "output": "Hello"}, "unknown keys ['inptu'] in a row of alpaca form"),
        ({"prompt": "Hi", "completion": "Hello", "tools": []}, "unknown keys ['tools']"),
        ({"messages": []}, "messages = []"),
        ({"messages": "Hi"}, "messages = 'Hi'"),
        ({"messages": ["Hi"]}, "messages[0] = 'Hi'"),
        ({"messages": [{"from": "human", "value": "Hi"}]}, 'ShareGPT\'s "from"/"value"'),
        ({"messages": [{"role": "gpt", "content": "Hi"}]}, "messages[0].role = 'gpt'"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "messages[0].role = ['user']"),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "messages[1].content = None"),
        ({"messages": [QUESTION, {**ANSWER, "tool_calls": [1]}]}, "unknown keys ['tool_calls'] in messages[1]"),
        ({"messages": [QUESTION]}, "without an assistant turn"),
        ({"messages": [ANSWER, QUESTION]}, "a conversation that the assistant begins"),
        (
            {"messages": [QUESTION, ANSWER, QUESTION, {"role": "assistant", "content": " \n"}]},
            "an empty assistant text",
        ),
        ({"prompt": "Hi", "completion": ""}, "an empty assistant text"),
        ({"prompt": "Hi", "completion": 3}, "prompt = 'Hi', completion = 3"),
        ({"prompt": [QUESTION], "completion": "Hello"}, "two strings, or two lists"),
        ({"instruction": "Hi", "output": ["Hello"]}, "output = ['Hello']"),
        ({"instruction": "Hi", "input": 0, "output": "Hello"}, "input = 0"),
        ({"prompt": "Hi", "completion": "half \ud83d"}, "half of a surrogate pair at character 5 of completion"),
    ],
)
def test_a_wrong_row_is_told_in_one_line(row: dict[str, object], reason: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_conversation(row, where="train.jsonl:7")
    message = str(caught.value)
    assert message.startswith("train.jsonl:7: found ")
    assert reason in message
    assert "\n" not in message


def test_a_huge_value_is_cut_short_in_the_error() -> None:
    with pytest.raises(DataError) as caught:
        parse_conversation({"messages": "x" * 100_000}, where="x:1")
    assert len(str(caught.value)) < 300
