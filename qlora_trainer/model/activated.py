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

from qlora_trainer.model.lora_adapter import OfTokens


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


def set_active_tokens(of_tokens: OfTokens, input_ids_BT: Tensor, position_ids_BT: Tensor, device: torch.device) -> None:
    """Before these tokens go through the linears."""
    of_tokens.active_T1 = None
    if of_tokens.invocation:
        active_BT = active_tokens(input_ids_BT, position_ids_BT.to(input_ids_BT.device), of_tokens.invocation)
        of_tokens.active_T1 = active_BT.to(device).flatten().unsqueeze(1)


@contextmanager
def activating(module: Any, of_tokens: OfTokens) -> Iterator[None]:
    """For generation: the prompt is looked at when it comes, and what is made of it goes on as it ended.

    Args:
        module: a transformers model without its head; rows are padded on the left.
        of_tokens: of the adapters.
    """

    def look(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        input_ids_BT: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        cache, num_tokens = kwargs.get("past_key_values"), input_ids_BT.shape[1]
        if cache is not None and cache.get_seq_length():
            assert of_tokens.active_T1 is not None
            last_B1 = of_tokens.active_T1.view(input_ids_BT.shape[0], -1)[:, -1:]
            of_tokens.active_T1 = last_B1.repeat_interleave(num_tokens, dim=1).reshape(-1, 1)
            return
        positions_BT = torch.arange(num_tokens, device=input_ids_BT.device).expand_as(input_ids_BT)
        set_active_tokens(of_tokens, input_ids_BT, positions_BT, input_ids_BT.device)

    if not of_tokens.invocation:
        yield
        return
    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        of_tokens.active_T1 = None
