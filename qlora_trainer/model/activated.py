"""Activated LoRA (Greenewald et al., 2025, arXiv:2504.12397): an adapter that works from its invocation tokens on.

What comes before them is the base's, to the bit, so whoever serves it keeps the base's keys and values of a
conversation. As in PEFT (0.21, `calculate_alora_offsets`) the last occurrence in a document counts, its first token
included, and a document without any is the base's. Answers go on as their prompt ended.

Legend: B rows, T tokens a row, K invocation tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.lora_adapter import OfTokens

_NO_TOKEN = -1


def active_tokens(input_ids_BT: Tensor, position_ids_BT: Tensor, invocation: Sequence[int]) -> Tensor:
    """Which tokens the adapter is active at, bool [B, T].

    Args:
        input_ids_BT: int64.
        position_ids_BT: int64; they restart at 0 in each document, and go on by 1.
        invocation: K tokens, at least one.
    """
    begins_BT = _occurrences(input_ids_BT, position_ids_BT, invocation)
    num_tokens = begins_BT.shape[1]
    place_BT = torch.arange(num_tokens, device=begins_BT.device).expand_as(begins_BT)
    first_BT = place_BT - position_ids_BT
    # The place of the next document's first token, looked for from behind.
    next_BT = torch.full_like(place_BT, num_tokens)
    next_BT[:, :-1] = torch.where(position_ids_BT[:, 1:] == 0, place_BT[:, 1:], num_tokens)
    last_BT = next_BT.flip(1).cummin(1).values.flip(1) - 1
    so_far_BT = begins_BT.cumsum(1)
    before_BT = so_far_BT.gather(1, first_BT) - begins_BT.gather(1, first_BT).long()
    # None begins later, and one has begun.
    return (so_far_BT == so_far_BT.gather(1, last_BT)) & (so_far_BT > before_BT)


def _occurrences(input_ids_BT: Tensor, position_ids_BT: Tensor, invocation: Sequence[int]) -> Tensor:
    """Where all of the invocation tokens begin, bool [B, T]."""
    found_BT = input_ids_BT == invocation[0]
    for offset, token in enumerate(invocation[1:], start=1):
        found_BT[:, -offset:] = False
        # In the same document, where positions go on.
        goes_on_BT = position_ids_BT[:, offset:] == position_ids_BT[:, :-offset] + offset
        found_BT[:, :-offset] &= (input_ids_BT[:, offset:] == token) & goes_on_BT
    return found_BT


def require_tokens(invocation: Sequence[int], num_rows: int, *, where: str) -> None:
    """Refuse tokens that a base has not: its adapter would never work.

    Args:
        invocation: of the adapter.
        num_rows: of the base's embedding.
        where: what to call the adapter in an error.

    Raises:
        ConfigError: names the largest.
    """
    if (largest := max(invocation, default=0)) >= num_rows:
        raise ConfigError(
            where=where,
            found=f"alora_invocation_tokens with {largest}",
            expected=f"tokens of the base, below {num_rows}",
            fix="Use the base that the adapter was trained on.",
        )


def set_active_tokens(
    of_tokens: OfTokens, input_ids_BT: Tensor, position_ids_BT: Tensor, row_lengths: Sequence[int] | None = None
) -> None:
    """Before these tokens go through the linears, which are where the positions are.

    Args:
        of_tokens: of the adapters.
        input_ids_BT, position_ids_BT: see `active_tokens`.
        row_lengths: tokens of each row that are no padding behind it; None for all.
    """
    of_tokens.active_T1 = None
    if not of_tokens.invocation:
        return
    ids_BT = input_ids_BT.to(position_ids_BT.device, non_blocking=True)
    if row_lengths is not None:  # what pads a row is no invocation
        lengths_B1 = torch.tensor(list(row_lengths), device=ids_BT.device).unsqueeze(1)
        ids_BT = torch.where(position_ids_BT < lengths_B1, ids_BT, _NO_TOKEN)
    active_BT = active_tokens(ids_BT, position_ids_BT, of_tokens.invocation)
    of_tokens.active_T1 = active_BT.flatten().unsqueeze(1)


@contextmanager
def activating(module: Any, of_tokens: OfTokens) -> Iterator[None]:
    """For generation: the prompt is looked at when it comes, and what is made of it goes on as it ended.

    Args:
        module: a transformers model without its head; rows are padded on the left, and that is masked.
        of_tokens: of the adapters.
    """

    def look(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        input_ids_BT: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        num_rows, num_tokens = input_ids_BT.shape
        cache, mask_BT = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if cache is not None and cache.get_seq_length():
            assert of_tokens.active_T1 is not None
            last_B1 = of_tokens.active_T1.view(num_rows, -1)[:, -1:]
            of_tokens.active_T1 = last_B1.repeat_interleave(num_tokens, dim=1).reshape(-1, 1)
            return
        if isinstance(mask_BT, Tensor) and mask_BT.shape == input_ids_BT.shape:
            input_ids_BT = torch.where(mask_BT == 1, input_ids_BT, _NO_TOKEN)
        positions_BT = torch.arange(num_tokens, device=input_ids_BT.device).expand_as(input_ids_BT)
        set_active_tokens(of_tokens, input_ids_BT, positions_BT)

    of_tokens.active_T1 = None
    if not of_tokens.invocation:
        yield
        return
    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        of_tokens.active_T1 = None
