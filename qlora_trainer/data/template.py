"""Renders conversations through the tokenizer's own chat template and finds the assistant's turns in the text.

A turn begins where the prompt for it ends: the template renders the messages before the turn, with its generation
prompt, and that text must be a prefix of the whole conversation's. So what is trained on follows exactly what
generation will have seen, for any template, without a rule of our own about its markers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from qlora_trainer.data.formats import Message, shown
from qlora_trainer.data.rows import Row
from qlora_trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Some templates print today's date; a run that is resumed tomorrow must see the same tokens. These are the formats
# that published templates ask for, for the day that Llama 3.1's template falls back to.
PINNED_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{ {'%Y-%m-%d': '2024-07-26', '%d %b %Y': '26 Jul 2024'}.get(format, '26 July 2024') }}"
    "{%- endmacro -%}"
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the assistant in a rendered conversation, as character positions.

    Attributes:
        start: where the prompt for it ends.
        end: where its stop token ends; whitespace that the template writes after that is not part of it.
    """

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the text that is tokenised, special tokens included."""

    text: str
    turns: tuple[Turn, ...]


def require_chat_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuses a tokenizer that conversations cannot be rendered and masked with.

    Args:
        tokenizer: the base's tokenizer.
        where: the base, for the error.

    Raises:
        ConfigError: no chat template, a broken one, or a tokenizer that cannot say where its tokens lie in the text.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            where=where,
            found=f"{type(tokenizer).__name__}, a slow tokenizer",
            expected="a fast tokenizer (tokenizer.json), which tells where each token lies in the text",
            fix="Use a base that ships a tokenizer.json.",
        )
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
    """The texts by which the template marks turns and their ends: special tokens that it names, BOS and EOS."""
    template = tokenizer.get_chat_template()
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = {text for text in special if text in template}
    return tuple(sorted(named | ({tokenizer.bos_token, tokenizer.eos_token} - {None})))


def render_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text after which the model answers.

    Raises:
        jinja2.exceptions.TemplateError: the template refuses these messages.
    """
    return _render(messages, tokenizer, add_generation_prompt=True)


def render_row(row: Row, tokenizer: PreTrainedTokenizerBase, *, controls: Sequence[str]) -> Rendered:
    """Renders one conversation and finds its assistant's turns.

    Args:
        row: the conversation.
        tokenizer: carries the chat template.
        controls: `control_texts(tokenizer)`; a message that holds one would forge a turn or an end.

    Raises:
        DataError: the template refuses the conversation, renders an earlier turn otherwise once later ones follow, or
            a message holds a control token.
    """
    _refuse_controls(row, controls)
    try:
        return _find_turns(row, tokenizer)
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message.role for message in row.messages)
        raise DataError(
            where=row.where,
            found=f"a conversation that the chat template refuses ({error}); its roles: {roles}",
            expected="roles in the order that the model's template knows",
            fix="Reorder or merge the turns, or remove the row.",
        ) from error


def _find_turns(row: Row, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    text = _render(row.messages, tokenizer)
    turns: list[Turn] = []
    for index, message in enumerate(row.messages):
        if message.role != "assistant":
            continue
        prompt = render_prompt(row.messages[:index], tokenizer)
        is_last = index == len(row.messages) - 1
        upto = text if is_last else _render(row.messages[: index + 1], tokenizer)
        if not (upto.startswith(prompt) and text.startswith(upto)):
            raise DataError(
                where=row.where,
                found=f"a chat template that rewrites history (message {index} reads otherwise once others follow)",
                expected="every turn rendered as it was when the model wrote it",
                fix="Use rows with one answer each, or a template that leaves earlier turns unchanged.",
            )
        turns.append(Turn(start=len(prompt), end=max(len(prompt), len(upto.rstrip()))))
    return Rendered(text=text, turns=tuple(turns))


def _refuse_controls(row: Row, controls: Sequence[str]) -> None:
    for index, message in enumerate(row.messages):
        for control in controls:
            if control in message.content:
                raise DataError(
                    where=row.where,
                    found=f"the control token {shown(control)} in the text of message {index}",
                    expected="plain text; the chat template writes the control tokens",
                    fix="Remove it from the text (was the row rendered through a template already?), or drop the row.",
                )


def _render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = False
) -> str:
    text = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        chat_template=PINNED_DATE + tokenizer.get_chat_template(),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    assert isinstance(text, str)
    return text
