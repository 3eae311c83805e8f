"""One answer, piece by piece while it is made, which a signal may cut short.

transformers' generation runs in a thread of its own and puts text into a queue; it looks at a flag after every token.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from qlora_trainer.hardware.memory import memory_errors_as_ours
from qlora_trainer.model.base import Base
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.run.answer import generating, generation_settings

Ending = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True, slots=True)
class Streamed:
    """A whole answer.

    Attributes:
        text: without special tokens, and without white space at its ends.
        num_tokens: made, stop token included.
        ending: by a stop token, by the length that was allowed, or by the flag.
    """

    text: str
    num_tokens: int
    ending: Ending


@dataclass(slots=True)
class _Made:
    """What the thread leaves behind."""

    ids_T: list[int] = field(default_factory=list)
    error: Exception | None = None


class _Flags(StoppingCriteria):
    """Ends generation after the token at which one of the flags is seen."""

    def __init__(self, *flags: Event) -> None:
        self._flags = flags

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        is_set = any(flag.is_set() for flag in self._flags)
        return torch.full((input_ids.shape[0],), is_set, dtype=torch.bool, device=input_ids.device)


def stream_answer(
    model: QuantizedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: Base,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop: Event,
) -> Generator[str, None, Streamed]:
    """Yields what the model says next, in pieces of whole words; the text is what `answer_all` gives.

    Args:
        model: with the adapter that answers. Nobody else may use it until the generator has ended or is closed.
        tokenizer: of the base.
        base: whose stop tokens end the answer.
        ids: the prompt, as `prompt_ids` makes it.
        max_new_tokens, temperature, seed: as for `answer_all`.
        stop: once it is set, the answer ends with the next token.

    Raises:
        OutOfMemoryError: memory ran out.
    """
    settings = generation_settings(base, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature)
    streamer: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    made, abandoned = _Made(), Event()
    input_ids_BT = torch.tensor([list(ids)], device=model.device)

    def generate() -> None:
        untyped: Any = model.module.generate
        try:
            with generating(model, seed):
                out_BT = untyped(
                    input_ids=input_ids_BT,
                    attention_mask=torch.ones_like(input_ids_BT),
                    generation_config=settings,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Flags(stop, abandoned)]),
                )
            made.ids_T = out_BT[0, len(ids) :].tolist()
        except Exception as error:  # noqa: BLE001  # raised again by whoever reads
            made.error = error
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from _without_ends(streamer)
    finally:  # also where the reader went away: once this is left, the model is free again
        abandoned.set()
        thread.join()
    if made.error is not None:
        with memory_errors_as_ours():
            raise made.error
    text = str(tokenizer.decode(made.ids_T, skip_special_tokens=True)).strip()
    return Streamed(text, len(made.ids_T), _ending(made.ids_T, settings.eos_token_id, max_new_tokens))


def _ending(ids_T: Sequence[int], stops: Any, max_new_tokens: int) -> Ending:
    if ids_T and ids_T[-1] in (stops or ()):
        return "stop"
    return "length" if len(ids_T) >= max_new_tokens else "interrupted"


def _without_ends(pieces: Iterator[str]) -> Iterator[str]:
    """The same text without white space at its two ends."""
    held, has_begun = "", False
    for piece in pieces:
        text = held + piece if has_begun else (held + piece).lstrip()
        words = text.rstrip()
        held = text[len(words) :]
        if words:
            has_begun = True
            yield words
