from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING

import pytest

from qlora_trainer.data.formats import Message
from qlora_trainer.data.rows import Row
from qlora_trainer.data.template import control_texts, render_prompt, render_row, require_chat_template
from qlora_trainer.errors import ConfigError, DataError

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


def test_a_template_that_rewrites_history_is_refused(
    chatml: PreTrainedTokenizerFast, make_row: Callable[..., Row]
) -> None:
    forgetful = with_template(chatml, FORGETS_THOUGHTS)
    controls = control_texts(forgetful)
    one = make_row(("user", "Hi"), ("assistant", "<think>Who?</think>Hello"), index=4)
    rendered = render_row(one, forgetful, controls=controls)
    assert [rendered.text[turn.start : turn.end] for turn in rendered.turns] == ["<think>Who?</think>Hello<|im_end|>"]
    two = make_row(*[(message.role, message.content) for message in one.messages * 2], index=4)
    with pytest.raises(DataError, match=r"train\.jsonl:5: found a chat template that rewrites history \(message 1 "):
        render_row(two, forgetful, controls=controls)


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


def test_control_texts_are_what_the_template_writes(
    chatml: PreTrainedTokenizerFast, llama3: PreTrainedTokenizerFast
) -> None:
    assert control_texts(chatml) == ("<|im_end|>", "<|im_start|>")
    assert set(control_texts(llama3)) == {
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    }


@pytest.mark.parametrize(
    "pattern, day", [("%d %b %Y", "26 Jul 2024"), ("%d %B %Y", "26 July 2024"), ("%Y-%m-%d", "2024-07-26")]
)
def test_a_template_that_prints_the_date_renders_the_same_every_day(
    chatml: PreTrainedTokenizerFast, pattern: str, day: str
) -> None:
    dated = with_template(chatml, "Today: {{ strftime_now('" + pattern + "') }}\n" + str(chatml.chat_template))
    prompt = render_prompt((Message("user", "Hi"),), dated)
    assert prompt == f"Today: {day}\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_good_tokenizers_are_accepted(
    chatml: PreTrainedTokenizerFast,
    llama3: PreTrainedTokenizerFast,
    mistral: PreTrainedTokenizerFast,
    smollm2: PreTrainedTokenizerFast,
) -> None:
    for tokenizer in (chatml, llama3, mistral, smollm2):
        require_chat_template(tokenizer, "models/base")
        assert tokenizer.eos_token in control_texts(tokenizer)


@pytest.mark.parametrize(
    "template, reason",
    [
        (None, "found a tokenizer without a chat template"),
        ({"tool_use": "{{ messages }}"}, "a chat template that fails"),
        ("{% for m in messages %}", "a chat template that fails"),
        ("{{ raise_exception('never') }}", r"a chat template that fails \(never\)"),
    ],
)
def test_a_base_without_usable_template_is_refused(
    chatml: PreTrainedTokenizerFast, template: str | dict[str, str] | None, reason: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^models/base: .*{reason}"):
        require_chat_template(with_template(chatml, template), "models/base")


def test_a_slow_tokenizer_is_refused(chatml: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(chatml), "is_fast", False)
    with pytest.raises(ConfigError, match="a slow tokenizer"):
        require_chat_template(chatml, "models/base")
