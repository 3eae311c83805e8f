from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import pytest

from qlora_trainer.data.messages import Message
from qlora_trainer.data.template import control_texts, render_prompt, require_chat_template
from qlora_trainer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | dict[str, str] | None) -> PreTrainedTokenizerFast:
    changed = deepcopy(tokenizer)
    changed.chat_template = template
    return changed


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


def test_control_texts_that_the_template_puts_together_are_known(chatml: PreTrainedTokenizerFast) -> None:
    """As Phi-4-mini's does. Mutation tried: the template's own text alone; "<|assistant|>" in a question is a turn."""
    built = deepcopy(chatml)
    built.add_tokens(["<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<filename>"], special_tokens=True)
    built.chat_template = (
        "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|' + 'end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|' + 'assistant' + '|>' }}{% endif %}"
    )
    found = set(control_texts(built))
    assert found == {"<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", built.eos_token, built.bos_token} - {None}
    assert "<filename>" not in found, "plain text in many a manual"


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
