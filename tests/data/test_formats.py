from __future__ import annotations

import json

import pytest

from qlora_trainer.config.schema import DataSection
from qlora_trainer.config.values import COLUMNS
from qlora_trainer.data.formats import (
    FORMATS,
    TEXT,
    Content,
    detect_format,
    format_named,
    read_content,
    rename_columns,
)
from qlora_trainer.data.messages import Message
from qlora_trainer.data.tool_calls import ToolCall
from qlora_trainer.errors import DataError

QUESTION = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CONVERSATION = (Message("user", "Hi"), Message("assistant", "Hello"))
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}

ADD = {"name": "add", "arguments": "{}"}


def calling(call: dict[str, object], **others: object) -> dict[str, object]:
    return {"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call], **others}]}


def read(row: dict[str, object], where: str = "x:1") -> Content:
    return read_content(row, detect_format(row, where=where), where=where)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, ANSWER]},
        {"messages": [QUESTION, ANSWER], "prompt": "Hi", "prompt_id": "7", "category": "chat"},
        {"messages": [{**QUESTION, "name": None}, ANSWER], "tools": None},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                ANSWER,
            ]
        },
        {"messages": [{**QUESTION, "thinking": ""}, {**ANSWER, "reasoning": None, "reasoning_content": " \n"}]},
        {"messages": [QUESTION, {**ANSWER, "weight": 1, "refusal": None}], "parallel_tool_calls": True, "tools": []},
        {
            "messages": [
                QUESTION,
                {**ANSWER, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
            ]
        },
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "id": "x_0"},
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}], "system": ""},
        {"conversations": [QUESTION, ANSWER]},
        {"question": "Hi", "answer": "Hello"},
        {"question": [QUESTION], "answer": [ANSWER]},
        {"instruction": "Hi", "output": "Hello", "text": "Below is an instruction. Hi Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello", "system": None, "id": 3},
    ],
)
def test_every_form_gives_the_same_conversation(row: dict[str, object]) -> None:
    assert read(row) == Content(messages=CONVERSATION)


@pytest.mark.parametrize("keys", [("reasoning_content",), ("thinking",), ("reasoning",), ("thinking", "reasoning")])
def test_reasoning_is_kept_under_any_of_its_names(keys: tuple[str, ...]) -> None:
    row: dict[str, object] = {"messages": [QUESTION, ANSWER | dict.fromkeys(keys, "Who?\n")]}
    assert read(row).messages[1] == Message("assistant", "Hello", reasoning="Who?\n")


def test_alpaca_input_and_system_are_kept() -> None:
    row: dict[str, object] = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."}
    assert read(row).messages == (
        Message("system", "Be brief."),
        Message("user", "Add.\n\n1 2"),
        Message("assistant", "3"),
    )


def test_text_is_not_stripped() -> None:
    row: dict[str, object] = {"prompt": "  Hi\n", "completion": "\n Hello  "}
    assert [message.content for message in read(row).messages] == ["  Hi\n", "\n Hello  "]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({}, "a row with keys []"),
        (
            {"texts": "Hi"},
            "a row with keys ['texts']; expected the keys of one of these forms: messages (messages); sh",
        ),
        ({"text": " \n"}, "found an empty text"),
        ({"text": None}, "text = None"),
        ({"text": "Hi", "title": "x"}, "unknown keys ['title'] in a row of text form"),
        ({"conversations": []}, "conversations = []"),
        ({"conversations": [{"from": "bot", "value": "Hi"}]}, "conversations[0].role = 'bot'"),
        ({"conversations": [{"from": "human", "text": "Hi"}]}, "conversations[0] = {'from'"),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "add(1)"}]},
            "conversations[1].function_call = ",
        ),
        ({"instruction": "Hi", "inptu": "x", "output": "Hello"}, "unknown keys ['inptu'] in a row of alpaca form"),
        ({"prompt": "Hi", "completion": "Hello", "tools": []}, "unknown keys ['tools']"),
        ({"messages": []}, "messages = []"),
        ({"messages": "Hi"}, "messages = 'Hi'"),
        ({"messages": ["Hi"]}, "messages[0] = 'Hi'"),
        ({"messages": [{"from": "human", "value": "Hi"}]}, 'belongs under the key "conversations"'),
        ({"messages": [{"role": "gpt", "content": "Hi"}]}, "messages[0].role = 'gpt'"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "messages[0].role = ['user']"),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "messages[1].content = None"),
        ({"messages": [QUESTION, {**ANSWER, "thoughts": "x"}]}, "unknown keys ['thoughts'] in messages[1]"),
        ({"messages": [QUESTION, {**ANSWER, "tool_calls": [1]}]}, "messages[1].tool_calls[0] = 1"),
        ({"messages": [QUESTION, {**ANSWER, "tool_calls": "add"}]}, "messages[1].tool_calls = 'add'"),
        ({"messages": [{**QUESTION, "tool_calls": [1]}, ANSWER]}, "tool_calls in messages[0], whose role is user"),
        (
            {"messages": [{**QUESTION, "reasoning": "x"}, ANSWER]},
            "reasoning in messages[0], whose role is user; expected it in messages of the role assistant only",
        ),
        ({"messages": [QUESTION, {**ANSWER, "thinking": 3}]}, "messages[1].thinking = 3"),
        ({"messages": [QUESTION, {**ANSWER, "thinking": "\ud83d"}]}, "half of a surrogate pair"),
        (
            {"messages": [QUESTION, {**ANSWER, "thinking": "x", "reasoning": "y"}]},
            "thinking and reasoning in messages[1] that differ",
        ),
        ({"messages": [{**QUESTION, "weight": 0}, ANSWER]}, "weight in messages[0], whose role is user"),
        ({"messages": [QUESTION, {**ANSWER, "weight": 0.5}]}, "messages[1].weight = 0.5"),
        ({"messages": [QUESTION, {**ANSWER, "weight": True}]}, "messages[1].weight = True"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
            "messages[0].content[0] = ",
        ),
        (
            {"messages": [QUESTION, {**ANSWER, "tool_calls": [{"function": {"name": "add", "arguments": "1"}}]}]},
            "messages[1].tool_calls[0] = {'name': 'add', 'arguments': '1'}; expected",
        ),
        (
            {
                "messages": [
                    QUESTION,
                    {**ANSWER, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1, "a": 2}'}}]},
                ]
            },
            "messages[1].tool_calls[0] = {'name': 'add', 'arguments': '{\"a\": 1, \"a\": 2}'}; expected",
        ),
        (
            calling({"id": "1", "function": {**ADD, "comment": "x"}}),
            "unknown keys ['comment'] in the function of messages",
        ),
        (calling({"function": {**ADD, "arguments": '{"a": 1e999}'}}), "messages[1].tool_calls[0] = {'name': 'add'"),
        (calling({"function": {**ADD, "arguments": {"a": float("inf")}}}), "tool_calls[0] that JSON cannot hold"),
        (calling({"function": {**ADD, "arguments": {"a": b"x"}}}), "tool_calls[0] that JSON cannot hold"),
        (calling({"function": ADD, "result": "2"}), "unknown keys ['result'] in messages[1].tool_calls[0]"),
        (calling({"type": "custom", "function": ADD}), "messages[1].tool_calls[0] = {'type': 'custom', "),
        (calling({"function": ADD}, function_call=ADD), "function_call and tool_calls in messages[1]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "alt": "x"}]}, ANSWER]},
            "unknown keys ['alt'] in messages[0].content[0]",
        ),
        ({"messages": [QUESTION, ANSWER], "tools": [TOOL], "functions": [TOOL]}, "found tools and functions"),
        ({"messages": [QUESTION, ANSWER], "tools": ["add"]}, "tools = ['add']"),
        ({"messages": [QUESTION, ANSWER], "tools": "add"}, "tools = 'add'"),
        ({"messages": [QUESTION, ANSWER], "tools": f'[{{"a": {"9" * 5_000}}}]'}, 'tools = \'[{"a": 9999'),
        ({"messages": [QUESTION, ANSWER], "tools": [{"a": float("nan")}]}, "tools that JSON cannot hold"),
        ({"question": "Hi", "answer": None}, "question = 'Hi', answer = None"),
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
        read(row, "train.jsonl:7")
    message = str(caught.value)
    assert message.startswith("train.jsonl:7: found ")
    assert reason in message
    assert "\n" not in message


def test_a_huge_value_is_cut_short_in_the_error() -> None:
    with pytest.raises(DataError) as caught:
        read({"messages": "x" * 100_000})
    assert len(str(caught.value)) < 300


def test_openai_files_keep_tool_calls_names_and_weights() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row: dict[str, object] = {
        "messages": [
            {**QUESTION, "name": "Ann"},
            {**ANSWER, "weight": 0},
            QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "2"},
            ANSWER,
        ],
        "tools": [TOOL],
    }
    content = read(row)
    assert content.messages == (
        Message("user", "Hi", name="Ann"),
        Message("assistant", "Hello", weight=0),
        Message("user", "Hi"),
        Message("assistant", "", (ToolCall("add", '{"a": 1}', "call_1"),)),
        Message("tool", "2", tool_call_id="call_1"),
        Message("assistant", "Hello"),
    )
    assert json.loads(content.tools) == [TOOL]
    assert read({**row, "tools": json.dumps([TOOL])}).tools == content.tools


def test_what_openai_writes_beside_a_call_and_says_nothing_is_passed_over() -> None:
    """As its library writes a streamed or a parsed call, and Arrow a struct of several kinds."""
    call = {"id": "1", "type": "function", "index": 0, "function": {**ADD, "parsed_arguments": None}, "custom": None}
    row = calling(call, refusal=None, function_call=None, annotations=[])
    assert read(row).messages[1] == Message("assistant", "", (ToolCall("add", "{}", "1"),))
    tools = {**row, "tools": [], "functions": [TOOL["function"]]}
    assert json.loads(read(tools).tools) == [TOOL]
    assert json.loads(read({**row, "tools": [TOOL], "functions": []}).tools) == [TOOL], "the empty list hid the other"


def test_older_ways_to_write_tool_calls_are_read_as_the_new_one() -> None:
    function = {"name": "add", "arguments": {"a": 1}}
    openai = read(
        {
            "messages": [
                QUESTION,
                {"role": "assistant", "content": None, "function_call": function},
                {"role": "function", "name": "add", "content": "2"},
                ANSWER,
            ],
            "functions": [TOOL["function"]],
        }
    )
    call = Message("assistant", "", (ToolCall("add", '{"a": 1}'),))
    assert openai.messages == (CONVERSATION[0], call, Message("tool", "2", name="add"), CONVERSATION[1])
    assert json.loads(openai.tools) == [TOOL]
    sharegpt = read(
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": json.dumps(function)},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "Hello", "weight": 0},
            ],
            "system": "Be brief.",
            "tools": json.dumps([TOOL]),
        }
    )
    assert sharegpt.messages[0] == Message("system", "Be brief.")
    assert sharegpt.messages[2:] == (call, Message("tool", "2"), Message("assistant", "Hello", weight=0))
    assert sharegpt.tools == openai.tools


def test_an_answer_that_is_not_learned_may_be_empty() -> None:
    empty = {"role": "assistant", "content": "", "weight": 0}
    assert read({"messages": [QUESTION, empty, QUESTION, ANSWER]}).messages[1].weight == 0


def test_a_plain_text_is_kept_as_it_is() -> None:
    assert read({"text": " Once\n"}) == Content(text=" Once\n")


def test_columns_are_renamed_and_others_passed_over() -> None:
    row = {"query": "Hi", "reply": "Hello", "text": "unused", "prompt": "also unused"}
    columns = (("prompt", "query"), ("completion", "reply"))
    renamed = dict(rename_columns(row, columns, where="x:1"))
    assert read(renamed) == Content(messages=CONVERSATION)
    assert rename_columns(row, (), where="x:1") is row
    with pytest.raises(DataError, match=r"x:3: found a row with keys \['query'\]; expected the column 'reply' that"):
        rename_columns({"query": "Hi"}, columns, where="x:3")


def test_a_row_of_another_form_than_the_file_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"x:2: found a row with keys \['prompt', 'completion'\]; expected text, the form"
    ):
        read_content({"prompt": "Hi", "completion": "Hello"}, TEXT, where="x:2")


def test_the_config_names_every_form_and_every_column() -> None:
    names = [row_format.name for row_format in FORMATS]
    for name in names:
        assert DataSection(train="x", format=name).format == format_named(name).name  # type: ignore[arg-type]
    keys = {key for row_format in FORMATS for key in (*row_format.required, *row_format.optional)}
    assert set(COLUMNS) <= keys
    assert {key for row_format in FORMATS for key in row_format.required} <= set(COLUMNS)
