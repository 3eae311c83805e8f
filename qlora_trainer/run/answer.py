"""Answers from a model and an adapter, through transformers' own generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qlora_trainer.data.chat import prompt_ids
from qlora_trainer.data.rows import Message
from qlora_trainer.data.template import require_chat_template
from qlora_trainer.model.activated import activating
from qlora_trainer.model.attention import IMPLEMENTATION
from qlora_trainer.model.base import Base
from qlora_trainer.model.dora import refresh_norms
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.run.adapted_base import find_adapters, load_adapters
from qlora_trainer.run.invocations import not_at_work_told

MAX_BATCH = 8  # answers made at once
_ASKED = "asked"


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said, and what is to be told of it, if anything."""

    text: str
    note: str | None


def answer(
    target: Path, prompt: str, *, base: str | None, max_new_tokens: int, temperature: float, seed: int
) -> Answer:
    """One answer of a trained adapter to one question.

    Args:
        target: a run folder, or a PEFT adapter folder.
        prompt: the user's words.
        base: base to use in place of the one that the adapter names.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token each time.
        seed: of the draws at a temperature above 0.

    Raises:
        ConfigError: no adapter in `target`, or not one of this base.
    """
    named = find_adapters({_ASKED: target}, base=base)
    tokenizer = named.tokenizers[_ASKED]
    require_chat_template(tokenizer, str(named.base.folder))
    adapters = load_adapters(named)
    adapters.activate(_ASKED)
    conversation = (Message(role="user", content=prompt),)
    texts = answer_all(
        adapters.model,
        tokenizer,
        named.base,
        [conversation],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    return Answer(texts[0], not_at_work_told(prompt_ids(conversation, tokenizer), adapters.model.of_tokens.invocation))


def answer_all(
    model: QuantizedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: Base,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """What the model says next in each conversation, special tokens left out.

    The model is left in the mode it was in, and torch's global random state as it was.
    """
    answers: list[str] = []
    ids = [prompt_ids(conversation, tokenizer) for conversation in conversations]
    settings = generation_settings(base, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature)
    generate: Any = model.module.generate  # nn.Module declares what it does not know as tensors
    with generating(model, seed):
        for first in range(0, len(ids), MAX_BATCH):
            batch = ids[first : first + MAX_BATCH]
            longest = max(map(len, batch))
            # Padded on the left, so that every answer begins at the same place; padding is masked.
            padded = [[settings.pad_token_id] * (longest - len(row)) + row for row in batch]
            masks = [[0] * (longest - len(row)) + [1] * len(row) for row in batch]
            out_BT = generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(masks, device=model.device),
                generation_config=settings,
            )
            answers += [text.strip() for text in tokenizer.batch_decode(out_BT[:, longest:], skip_special_tokens=True)]
    return answers


def generation_settings(
    base: Base, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    """How a base answers: it stops at the tokenizer's EOS and at what its own generation config names."""
    try:
        named = GenerationConfig.from_pretrained(base.folder).eos_token_id
    except OSError:
        named = None
    stops = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    return GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=sorted(stops) or None, pad_token_id=pad, **sampling
    )


@contextmanager
def generating(model: QuantizedModel, seed: int) -> Iterator[None]:
    """Eval mode, draws from `seed`, and an attention that knows key-value caches: eager where scores are capped, else
    SDPA."""
    was_training = model.module.training
    has_softcap = getattr(model.module.config, "attn_logit_softcapping", None) is not None
    refresh_norms(model)
    model.module.eval()
    model.module.set_attn_implementation("eager" if has_softcap else "sdpa")
    try:
        with torch.random.fork_rng(), torch.no_grad(), activating(model.module.base_model, model.of_tokens):
            torch.manual_seed(seed)
            yield
    finally:
        model.module.set_attn_implementation(IMPLEMENTATION)
        model.module.train(was_training)
