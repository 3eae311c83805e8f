"""Cuts a global batch into micro-batches of at most N tokens; a document is never cut.

What is learned does not depend on the cut (the loss is summed over the global batch), so it is chosen for memory and
speed alone. The micro-batch with the longest document comes first: if memory does not suffice, step 1 tells.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

from qlora_trainer.errors import ConfigError
from qlora_trainer.step.document import Document

_MOST_DOCUMENTS = 2**14  # whose lengths are in memory at once: of what is evaluated on there may be millions


def cut_documents(documents: Sequence[Document], micro_batch_tokens: int, *, packing: bool) -> Iterator[list[int]]:
    """Cuts documents, read one at a time, into micro-batches, by `cut` where they may share rows, else by `cut_padded`.

    Yields:
        Their positions in `documents`.

    Raises:
        ConfigError: a document is longer than a micro-batch.
    """
    for first in range(0, len(documents), _MOST_DOCUMENTS):
        positions = range(first, min(first + _MOST_DOCUMENTS, len(documents)))
        lengths = [documents[position].num_tokens for position in positions]
        for micro_batch in (cut if packing else cut_padded)(lengths, micro_batch_tokens):
            yield [positions[index] for index in micro_batch]


def cut(lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """Best-fit decreasing: documents from the longest on, each into the fullest micro-batch that still holds it.

    Never needs more than 11/9 of the fewest possible micro-batches plus four (D. S. Johnson, 1973).

    Args:
        lengths: tokens of each document of the global batch.
        micro_batch_tokens: most tokens of a micro-batch.

    Returns:
        Positions in `lengths`, ascending within each micro-batch.

    Raises:
        ConfigError: a document is longer than a micro-batch.
    """
    micro_batches: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, micro-batch), ascending
    for position in _longest_first(lengths, micro_batch_tokens):
        fullest = bisect_left(free, (lengths[position], 0))
        if fullest == len(free):
            micro_batches.append([])
            left, chosen = micro_batch_tokens, len(micro_batches) - 1
        else:
            left, chosen = free.pop(fullest)
        micro_batches[chosen].append(position)
        insort(free, (left - lengths[position], chosen))
    return [sorted(micro_batch) for micro_batch in micro_batches]


def cut_padded(lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """Cuts for one document a row, each row padded to the longest of its micro-batch.

    Neighbours in length share a micro-batch, so that little is padding.

    Args:
        lengths: tokens of each document of the global batch.
        micro_batch_tokens: most tokens of a micro-batch, padding included: rows x longest.

    Returns:
        Positions in `lengths`, the longest document first.

    Raises:
        ConfigError: a document is longer than a micro-batch.
    """
    micro_batches: list[list[int]] = []
    for position in _longest_first(lengths, micro_batch_tokens):
        last = micro_batches[-1] if micro_batches else []
        if last and (len(last) + 1) * lengths[last[0]] <= micro_batch_tokens:
            last.append(position)
        else:
            micro_batches.append([position])
    return micro_batches


def _longest_first(lengths: Sequence[int], micro_batch_tokens: int) -> list[int]:
    longest = max(lengths, default=0)
    if longest > micro_batch_tokens:
        raise ConfigError(
            where="memory.micro_batch_tokens",
            found=f"{micro_batch_tokens} tokens, and a document of {longest}",
            expected="a micro-batch that holds every document whole",
            fix=f"Set memory.micro_batch_tokens to {longest} or more, or lower data.seq_len.",
        )
    return sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
