"""Writes conversations as text, through the tokenizer's own chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from qlora_trainer.data.messages import Message
from qlora_trainer.data.tool_calls import ToolCall
from qlora_trainer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Some templates print today's date; a run that is resumed tomorrow must see the same tokens. These are the formats
# that published templates ask for, for the day that Llama 3.1's template falls back to.
PINNED_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{ {'%Y-%m-%d': '2024-07-26', '%d %b %Y': '26 Jul 2024'}.get(format, '26 July 2024') }}"
    "{%- endmacro -%}"
)
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def require_fast(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuses a tokenizer that cannot say where its tokens lie in the text.

    Raises:
        ConfigError: it is a slow one.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            where=where,
            found=f"{type(tokenizer).__name__}, a slow tokenizer",
            expected="a fast tokenizer (tokenizer.json), which tells where each token lies in the text",
            fix="Use a base that ships a tokenizer.json.",
        )


def require_chat_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuses a tokenizer that conversations cannot be rendered and masked with.

    Args:
        tokenizer: the base's tokenizer.
        where: the base, for the error.

    Raises:
        ConfigError: no chat template, a broken one, or a slow tokenizer.
    """
    require_fast(tokenizer, where)
    try:
        render_prompt((Message("user", "Hi"),), tokenizer)
    except (TemplateError, TypeError, ValueError) as error:  # ValueError: there is none, or none named "default"
        absent = tokenizer.chat_template is None
        raise ConfigError(
            where=where,
            found="a tokenizer without a chat template" if absent else f"a chat template that fails ({error})",
            expected="a chat template, which says how turns are written for this model",
            fix="Use the instruct version of the base, or put its chat_template.jinja into the base's folder.",
        ) from error


def control_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts by which the template marks turns and their ends: special tokens that it writes, BOS and EOS.

    It may name them, or put them together (`'<|' + role + '|>'`), which a conversation shows. Not all that are special:
    SmolLM2 has `<filename>` among them, which is plain text in many a manual.
    """
    written = [tokenizer.get_chat_template(), *_probes(tokenizer)]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    used = {text for text in special if any(text in where for where in written)}
    return tuple(sorted(used | ({tokenizer.bos_token, tokenizer.eos_token} - {None})))


def _probes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Conversations of every role, as far as the template knows it."""
    asked, answered = Message("user", "a"), Message("assistant", "b")
    first = (Message("system", "c"), Message("developer", "d"), None)
    conversations = [(message, asked, answered) if message else (asked, answered) for message in first]
    conversations.append((asked, Message("assistant", "", (ToolCall("e", "{}", "call00001"),)), Message("tool", "f")))
    texts = []
    for messages in conversations:
        for add_generation_prompt in (False, True):
            try:
                texts.append(render(messages, tokenizer, add_generation_prompt=add_generation_prompt))
            except (TemplateError, TypeError, ValueError, LookupError):  # a role that it does not know
                continue
    return texts


def render_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: str = "") -> str:
    """The text after which the model answers.

    Raises:
        jinja2.exceptions.TemplateError: the template refuses these messages.
    """
    return render(messages, tokenizer, tools, add_generation_prompt=True)


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: str = "",
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The whole conversation as text, special tokens included.

    Raises:
        jinja2.exceptions.TemplateError: the template refuses these messages.
    """
    [text], _ = _rendered(messages, tokenizer, tools, add_generation_prompt=add_generation_prompt)
    assert isinstance(text, str)
    return text


class Beginnings:
    """What the template writes of the first messages of a conversation; each text is rendered once."""

    def __init__(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: str) -> None:
        self.messages = messages
        self._tokenizer = tokenizer
        self._tools = tools
        self._texts: dict[tuple[int, bool], str] = {}

    def text(self, num_messages: int) -> str:
        """That many messages.

        Raises:
            jinja2.exceptions.TemplateError: the template refuses them.
        """
        return self._render(num_messages, is_prompt=False)

    def prompt(self, num_messages: int) -> str:
        """That many messages, and what stands before an answer to them.

        Raises:
            jinja2.exceptions.TemplateError: the template refuses them.
        """
        return self._render(num_messages, is_prompt=True)

    def _render(self, num_messages: int, *, is_prompt: bool) -> str:
        asked = (num_messages, is_prompt)
        if asked not in self._texts:
            messages = self.messages[:num_messages]
            self._texts[asked] = render(messages, self._tokenizer, self._tools, add_generation_prompt=is_prompt)
        return self._texts[asked]


def render_marked(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: str
) -> tuple[str, list[tuple[int, int]]]:
    """The whole conversation as text, and where the passages lie that the template marks with `{% generation %}`.

    Raises:
        jinja2.exceptions.TemplateError: the template refuses these messages.
    """
    [text], [passages] = _rendered(messages, tokenizer, tools, return_assistant_tokens_mask=True)
    return text, passages


def _rendered(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: str, **options: bool) -> Any:
    """What `apply_chat_template` does with one conversation, without what it does for callers of many kinds.

    That is the function that it calls itself: its sandbox, its compiled templates, its view of messages and tools.
    """
    from transformers.utils import chat_template_utils

    untyped: Any = chat_template_utils.render_jinja_template  # typed as if it gave a text only
    return untyped(
        conversations=[_as_template_sees(messages)],
        tools=_tools(tools),
        chat_template=_pinned_template(tokenizer, tools),
        **options,
        **tokenizer.special_tokens_map,
    )


def marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template marks what the assistant generates."""
    return GENERATION_MARK.search(tokenizer.get_chat_template()) is not None


def _tools(tools: str) -> Any:
    return json.loads(tools) if tools else None


def _as_template_sees(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Keys only where they have a value: templates ask whether they are there.

    transformers gives templates the reasoning under GPT-OSS's name `thinking` as well.
    """
    return [
        {"role": message.role, "content": message.content}
        | ({"reasoning_content": message.reasoning} if message.reasoning else {})
        | ({"name": message.name} if message.name else {})
        | ({"tool_call_id": message.tool_call_id} if message.tool_call_id else {})
        | (
            {
                "tool_calls": [
                    ({"id": call.call_id} if call.call_id else {})
                    | {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
                    for call in message.tool_calls
                ]
            }
            if message.tool_calls
            else {}
        )
        for message in messages
    ]


def _pinned_template(tokenizer: PreTrainedTokenizerBase, tools: str) -> str:
    return PINNED_DATE + tokenizer.get_chat_template(tools=_tools(tools))
