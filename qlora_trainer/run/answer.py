"""Answers from a model and an adapter, through transformers' own generation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qlora_trainer.data.chat import prompt_ids, require_chat_template
from qlora_trainer.data.rows import Message
from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.device import DTYPES, choose_compute_dtype, choose_device
from qlora_trainer.model.adapter_folder import CONFIG_FILE, read_adapter_fields, read_adapter_folder
from qlora_trainer.model.adapters import attach_adapters
from qlora_trainer.model.attention import IMPLEMENTATION
from qlora_trainer.model.base import Base, read_tokenizer, require_tokenizer_fits, resolve_base
from qlora_trainer.model.load import load_quantized
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from qlora_trainer.model.quantized import QuantizedModel
from qlora_trainer.run.folder import RunFolder

MAX_BATCH = 8  # answers made at once


def answer(target: Path, prompt: str, *, base: str | None, max_new_tokens: int, temperature: float, seed: int) -> str:
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
    folder = find_adapter(target)
    fields = read_adapter_fields(folder)
    resolved = resolve_base(base or fields.get("base_model_name_or_path") or "", fields.get("revision"))
    tokenizer = read_tokenizer(resolved.folder)
    require_chat_template(tokenizer, str(resolved.folder))
    require_tokenizer_fits(tokenizer, resolved)
    device = choose_device()
    model = load_quantized(
        resolved,
        prepare_nf4_cache(resolved, double_quant=_double_quant(target)),
        compute_dtype=DTYPES[choose_compute_dtype(device)],
        device=device,
    )
    adapter = read_adapter_folder(folder, linear_names=list(model.linears))
    attach_adapters(model, adapter.settings, adapter.weights, dtype=torch.bfloat16)
    conversation = (Message(role="user", content=prompt),)
    return answer_all(
        model,
        tokenizer,
        resolved,
        [conversation],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )[0]


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
    settings = _generation_config(base, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature)
    generate: Any = model.module.generate  # nn.Module declares what it does not know as tensors
    with _generating(model), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
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


def find_adapter(target: Path) -> Path:
    """The PEFT folder that `target` is, or, for a run folder, its `adapter/`.

    Raises:
        ConfigError: neither.
    """
    for folder in (target, RunFolder(target).adapter_path):
        if (folder / CONFIG_FILE).is_file():
            return folder
    unfinished = RunFolder(target).checkpoints_path.is_dir()
    raise ConfigError(
        where=str(target),
        found="a run that has not finished" if unfinished else f"no {CONFIG_FILE}",
        expected="a finished run, or a PEFT adapter folder",
        fix="Finish it with --resume auto." if unfinished else "Give the output.dir of a run.",
    )


def _double_quant(target: Path) -> bool:
    """Whether the run quantized its scales too; a plain adapter folder does not tell, so the default is taken."""
    try:
        plan = json.loads(RunFolder(target).plan_path.read_text())
    except (OSError, ValueError):
        return True
    return bool(plan.get("double_quant", True))


def _generation_config(
    base: Base, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, temperature: float
) -> GenerationConfig:
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
def _generating(model: QuantizedModel) -> Iterator[None]:
    """Eval mode, and an attention that knows key-value caches: eager where scores are capped, else SDPA."""
    was_training = model.module.training
    has_softcap = getattr(model.module.config, "attn_logit_softcapping", None) is not None
    model.module.eval()
    model.module.set_attn_implementation("eager" if has_softcap else "sdpa")
    try:
        yield
    finally:
        model.module.set_attn_implementation(IMPLEMENTATION)
        model.module.train(was_training)
