from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from qlora_trainer.data.messages import Message
from qlora_trainer.data.rows import Row
from qlora_trainer.data.template import control_texts, render_prompt
from qlora_trainer.data.tool_calls import ToolCall
from qlora_trainer.data.turns import TrainOn, render_row
from qlora_trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORGETS_THOUGHTS = (  # as Qwen3 and DeepSeek-R1 do: what was thought in earlier turns is left out
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | dict[str, str] | None) -> PreTrainedTokenizerFast:
    changed = deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_turns_lie_where_the_answers_are(chatml: PreTrainedTokenizerFast, make_row: Callable[..., Row]) -> None:
    row = make_row(("user", "Hi"), ("assistant", "Hello "), ("user", "Bye"), ("assistant", " Bye"))
    rendered = render_row(row, chatml, controls=control_texts(chatml))
    assert [rendered.text[turn.start : turn.end] for turn in rendered.turns] == ["Hello <|im_end|>", " Bye<|im_end|>"]
    assert rendered.text[: rendered.turns[0].start] == render_prompt(row.messages[:1], chatml)


def test_answers_that_the_template_rewrites_are_read_but_not_learned(
    chatml: PreTrainedTokenizerFast, make_row: Callable[..., Row]
) -> None:
    forgetful = with_template(chatml, FORGETS_THOUGHTS)
    controls = control_texts(forgetful)
    one = make_row(("user", "Hi"), ("assistant", "<think>Who?</think>Hello"), index=4)
    rendered = render_row(one, forgetful, controls=controls)
    assert [rendered.text[turn.start : turn.end] for turn in rendered.turns] == ["<think>Who?</think>Hello<|im_end|>"]
    two = make_row(*[(message.role, message.content) for message in one.messages * 2], index=4)
    rendered = render_row(two, forgetful, controls=controls)
    assert [rendered.text[turn.start : turn.end] for turn in rendered.turns] == ["<think>Who?</think>Hello<|im_end|>"]
    assert rendered.turns[0].start > rendered.text.index("Hello"), "the first answer was taken"
    assert rendered.num_rewritten == 1
    assert render_row(two, forgetful, controls=controls, train_on="last_assistant").num_rewritten == 0
    asked_again = replace(two, messages=(*two.messages, Message("user", "Bye")))
    assert render_row(asked_again, forgetful, controls=controls) == rendered
    untrained = replace(two.messages[-1], weight=0)
    with pytest.raises(DataError, match=r"train\.jsonl:5: found a chat template that rewrites history \(message 1 "):
        render_row(replace(two, messages=(*two.messages[:-1], untrained)), forgetful, controls=controls)
    everything = render_row(two, forgetful, controls=controls, train_on="all")
    assert (everything.learns_all, everything.num_rewritten) == (True, 0)
    unlearned = replace(two.messages[1], weight=0)
    messages = (two.messages[0], unlearned, *two.messages[2:])
    with pytest.raises(DataError, match=r"rewrites history \(message 1 "):
        render_row(replace(two, messages=messages), forgetful, controls=controls, train_on="all")


def test_roles_that_the_template_refuses_are_told(
    mistral: PreTrainedTokenizerFast, make_row: Callable[..., Row]
) -> None:
    row = make_row(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))
    with pytest.raises(DataError, match=r"Only user and assistant roles!.*its roles: system, user, assistant"):
        render_row(row, mistral, controls=())


@pytest.mark.parametrize("turn", [0, 1])
def test_control_tokens_in_the_text_are_refused(
    chatml: PreTrainedTokenizerFast, make_row: Callable[..., Row], turn: int
) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello")]
    turns[turn] = (turns[turn][0], "Hello<|im_end|>\n<|im_start|>user")
    with pytest.raises(DataError, match=rf"the control token '<\|im_end\|>' in the text of message {turn}"):
        render_row(make_row(*turns), chatml, controls=control_texts(chatml))


TOOLS = '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name + ' ' + call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tool_row(make_row: Callable[..., Row]) -> Row:
    row = make_row(("user", "1 + 1?"), ("assistant", ""), ("tool", "2"), ("assistant", "It is 2."))
    call = replace(row.messages[1], tool_calls=(ToolCall("add", '{"a": 1, "b": 1}', "call_1"),))
    return replace(row, messages=(row.messages[0], call, *row.messages[2:]), tools=TOOLS)


def test_tools_and_tool_calls_are_rendered_and_learned(
    chatml: PreTrainedTokenizerFast, make_row: Callable[..., Row]
) -> None:
    """Arguments reach the template as an object, not as the text in which OpenAI's files hold them."""
    rendered = render_row(tool_row(make_row), with_template(chatml, WITH_TOOLS), controls=())
    assert [rendered.text[turn.start : turn.end] for turn in rendered.turns] == [
        'add {"a": 1, "b": 1}<|im_end|>',
        "It is 2.<|im_end|>",
    ]
    assert '"name": "add"' in rendered.text.partition("1 + 1?")[0]


def test_a_template_that_passes_over_a_part_is_refused(
    chatml: PreTrainedTokenizerFast, make_row: Callable[..., Row]
) -> None:
    """Qwen 2.5's template says nothing of the role developer, Gemma's nothing of tools; neither complains."""
    row = tool_row(make_row)
    with pytest.raises(DataError, match=r"train\.jsonl:1: found a chat template that leaves out the tool add"):
        render_row(row, chatml, controls=())
    with pytest.raises(DataError, match="leaves out the call of add in message 1"):
        render_row(replace(row, tools=""), chatml, controls=())
    known = (
        "{% for message in messages if message.role in ('user', 'assistant') %}"
        + str(chatml.chat_template).partition("%}")[2]
    )
    told = make_row(("developer", "Be brief.\n"), ("user", "Hi"), ("assistant", "Hello"))
    assert render_row(told, chatml, controls=()).text.count("Be brief.") == 1
    with pytest.raises(DataError, match="leaves out the text of message 0, whose role is developer"):
        render_row(told, with_template(chatml, known), controls=())


def test_names_that_the_template_does_not_render_are_counted(
    chatml: PreTrainedTokenizerFast, make_row: Callable[..., Row]
) -> None:
    """By role: a template may know those of tools only. Mutation tried: a name that is in the text counts as there."""
    row = tool_row(make_row)
    named = [replace(m, name={"user": "add", "assistant": "Ann"}.get(m.role, "sum")) for m in row.messages]
    row = replace(row, messages=tuple(named))
    assert [m.role for m in named] == ["user", "assistant", "tool", "assistant"]
    deaf = with_template(chatml, WITH_TOOLS)
    assert render_row(row, deaf, controls=()).num_lost_names == 4
    of_user = WITH_TOOLS.replace(
        "{{ '<|im_start|>' + m.role",
        "{{ '<|im_start|>' + m.role + (' ' + m.name if m.name and m.role == 'user' else '')",
    )
    assert of_user != WITH_TOOLS
    assert render_row(row, with_template(chatml, of_user), controls=()).num_lost_names == 3
    of_its_call = replace(row, messages=tuple(replace(m, name="add" if m.role == "tool" else "") for m in named))
    assert render_row(of_its_call, deaf, controls=()).num_lost_names == 0, "the call has it"


@pytest.mark.parametrize("field", ["name", "arguments", "tools"])
def test_control_tokens_in_tool_calls_are_refused(
    chatml: PreTrainedTokenizerFast, make_row: Callable[..., Row], field: str
) -> None:
    row = tool_row(make_row)
    if field == "tools":
        row = replace(row, tools=TOOLS.replace("add", "<|im_end|>"))
    else:
        values = {"name": "add", "arguments": "{}", field: '{"a": "<|im_end|>"}'}
        call = replace(row.messages[1], tool_calls=(ToolCall(**values),))
        row = replace(row, messages=(row.messages[0], call, *row.messages[2:]))
    with pytest.raises(DataError, match=r"the control token '<\|im_end\|>' in the text of message"):
        render_row(row, with_template(chatml, WITH_TOOLS), controls=control_texts(chatml))


def test_weights_and_train_on_choose_the_turns(chatml: PreTrainedTokenizerFast, make_row: Callable[..., Row]) -> None:
    row = make_row(("user", "Hi"), ("assistant", "One"), ("user", "Hi"), ("assistant", "Two"), ("user", "Bye"))

    def learned(row: Row, train_on: TrainOn) -> list[str]:
        rendered = render_row(row, chatml, controls=(), train_on=train_on)
        return [rendered.text[turn.start : turn.end] for turn in rendered.turns if turn.is_learned]

    assert learned(row, "assistant") == ["One<|im_end|>", "Two<|im_end|>"]
    assert learned(row, "last_assistant") == ["Two<|im_end|>"]
    first, second = (replace(row.messages[index], weight=0) for index in (1, 3))
    without_first = replace(row, messages=(row.messages[0], first, *row.messages[2:]))
    without_last = replace(row, messages=(*row.messages[:3], second, row.messages[4]))
    assert learned(without_first, "assistant") == ["Two<|im_end|>"]
    assert learned(without_last, "assistant") == ["One<|im_end|>"]
    assert learned(without_last, "last_assistant") == []
    assert render_row(row, chatml, controls=(), train_on="all").text.endswith("Bye<|im_end|>\n")
    assert render_row(row, chatml, controls=()).text.endswith("Two<|im_end|>\n"), "what follows is learned by none"
