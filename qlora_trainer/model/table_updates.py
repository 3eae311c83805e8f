"""What other trainers' adapters hold of embedding and head: LoRA, rows of single tokens, or the table itself.

Here such a table is trained, or used, as a whole one: what PEFT's model computes with, W + s B A (with DoRA each row of
a head, or each column of an embedding, set to the trained length), or W with rows replaced. PEFT writes W itself into
the file, too, where it may have been resized, and so do others that are told to (`save_embedding_layers`); then W is
that one.

Of a base that ties both, PEFT makes one table of what it does to the embedding only where it is told to
(`ensure_weight_tying`) or replaces rows; anything else unties them.

Legend: V vocabulary, H hidden size, R rank, N tokens, Q rows of a block.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_variants import Variant
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.table_names import BaseTables

_OF_EMBEDDING, _OF_HEAD = ("lora_embedding_A", "lora_embedding_B"), ("lora_A", "lora_B")
_ROWS = "token_adapter.trainable_tokens_delta"
_MAGNITUDE, _BIAS = "lora_magnitude_vector", "lora_B.bias"
_OWN = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
_OWN_BIAS = ("bias", "base_layer.bias", "token_adapter.base_layer.bias")
_PLAIN = ("weight", "bias")
_LEAVES = (*_OF_EMBEDDING, *_OF_HEAD, _MAGNITUDE, _BIAS, _ROWS, *_OWN, *_OWN_BIAS)
_BLOCK_ELEMENTS = 2**24  # of a table in fp32 at once: 64 MiB


@dataclass(frozen=True, slots=True)
class TableUpdate:
    """What becomes of one table of the base.

    Attributes:
        own_VH: in the place of the base's; None for that.
        own_bias_V: of a head that has one, likewise.
        rows_VR, columns_RH: whose product, times `scale`, is added; None for none.
        scale: of that product.
        is_of_rest: it is to be added to what a start has left of the base's table (see `model.plain_lora`).
        bias_V: of `lora_bias`; times `scale`, it is added to the bias of a head that has one.
        magnitude_V: of DoRA on a head, the length of each row of the sum.
        column_magnitude_H: of DoRA on an embedding, that of each column (PEFT's `DoraEmbeddingLayer`).
        token_ids_N, token_rows_NH: rows that are replaced.
    """

    own_VH: Tensor | None = None
    own_bias_V: Tensor | None = None
    rows_VR: Tensor | None = None
    columns_RH: Tensor | None = None
    scale: float = 0.0
    is_of_rest: bool = False
    bias_V: Tensor | None = None
    magnitude_V: Tensor | None = None
    column_magnitude_H: Tensor | None = None
    token_ids_N: Tensor | None = None
    token_rows_NH: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AskedUpdates:
    """What the fields of an adapter's config ask of the tables.

    Attributes:
        targets: full names of those with LoRA.
        token_ids: full name -> rows that are trained.
        ties: `ensure_weight_tying`.
        variant: of the adapter, None for plain LoRA.
        has_parameters: some LoRA is on weights (`target_parameters`): that of an embedding is as a head's then.
    """

    targets: tuple[str, ...]
    token_ids: Mapping[str, tuple[int, ...]]
    ties: bool
    variant: Variant | None = None
    has_parameters: bool = False


def take_updates(
    weights: dict[str, Tensor], settings: LoraSettings, asked: AskedUpdates, *, tables: BaseTables, where: Path
) -> tuple[LoraSettings, dict[str, TableUpdate]]:
    """Take what concerns tables out of an adapter's weights.

    Args:
        weights: by our names; the parts of tables are removed, but for those that `settings.modules_to_save` names.
        settings: of the linears, and of what the adapter itself trained whole.
        asked: of its config.
        tables: of the base.
        where: its file, for errors.

    Returns:
        The settings with these tables among `modules_to_save`, and by full name what becomes of each.

    Raises:
        ConfigError: parts are missing or contradict each other, or a kind that is not computed.
    """
    embedding, head = tables.embeddings[0], tables.head
    token_ids, targets = dict(asked.token_ids), set(asked.targets)
    is_one = has_one_pair = tables.is_tied and asked.ties and bool({embedding, head} & targets)
    if has_one_pair:
        if asked.variant is not None:
            _refuse(where, "A variant of LoRA on embedding and head, which are one table", "plain LoRA there")
        targets |= {embedding, head}
        is_one = not settings.use_dora  # of one sum, columns and rows are set to their lengths: two tables
    if tables.is_tied and embedding in token_ids:
        is_one = token_ids.get(head, token_ids[embedding]) == token_ids[embedding]
        if head in targets or (asked.ties and not is_one):
            _refuse(where, f"other rows of {embedding} than of {head}, which are one table", "the same of both")
        if is_one:
            token_ids.pop(head, None)  # PEFT keeps them once
    updates: dict[str, TableUpdate] = {}
    for name in tables.names:
        is_whole = name in settings.modules_to_save or name == settings.tied_head
        leaves = [leaf for leaf in _LEAVES if f"{name}.{leaf}" in weights and not (is_whole and leaf in _PLAIN)]
        if (
            leaves == ["bias"] and name not in targets and name not in token_ids
        ):  # alone, as any other (`adapter_biases`)
            continue
        parts = {leaf: weights.pop(f"{name}.{leaf}") for leaf in leaves}
        if is_one and name == head and name not in token_ids and _ROWS in parts:  # `save_embedding_layers` repeats them
            rows_NH, first_NH = parts.pop(_ROWS), updates[embedding].token_rows_NH
            if first_NH is None or not torch.equal(rows_NH, first_NH):
                _refuse(where, f"other rows of {head} than of {embedding}, which are one table", "the same of both")
        if parts or name in targets or name in token_ids:
            if is_whole:
                _refuse(where, f"{name} trained whole and with an update as well", "one of both")
            updates[name] = _update(name, parts, targets, token_ids, settings, asked, tables=tables, where=where)
    if not (tables.is_tied and {embedding, head} & updates.keys()) or {embedding, head} & {*settings.modules_to_save}:
        return _with_tables(settings, updates, tables), updates
    is_one |= not targets & {embedding, head} and not token_ids.keys() & {embedding, head}  # only tables of its own
    return _tied(settings, updates, tables, is_one=is_one, has_one_pair=has_one_pair, where=where)


def _update(
    name: str,
    parts: Mapping[str, Tensor],
    targets: Collection[str],
    token_ids: Mapping[str, tuple[int, ...]],
    settings: LoraSettings,
    asked: AskedUpdates,
    *,
    tables: BaseTables,
    where: Path,
) -> TableUpdate:
    is_lookup = name in tables.embeddings and not (asked.has_parameters and _OF_HEAD[0] in parts)
    pair = _OF_EMBEDDING if is_lookup else _OF_HEAD
    wanted = {*(pair if name in targets else ()), *((_ROWS,) if name in token_ids else ())}
    if name in targets and settings.use_dora:
        wanted.add(_MAGNITUDE)
    if name in targets and settings.lora_bias:
        wanted.add(_BIAS)
    if (found := parts.keys() - {*_OWN, *_OWN_BIAS}) != wanted:
        shown = ", ".join(sorted(found)) or "nothing"
        _refuse(where, f"{shown} of {name}", ", ".join(sorted(wanted)) or "nothing", "Save it again with PEFT.")
    own_VH, own_bias_V = (next((parts[leaf] for leaf in own if leaf in parts), None) for own in (_OWN, _OWN_BIAS))
    if name not in targets:
        ids_N = torch.tensor(token_ids[name]) if name in token_ids else None
        return TableUpdate(own_VH=own_VH, own_bias_V=own_bias_V, token_ids_N=ids_N, token_rows_NH=parts.get(_ROWS))
    a, b = (parts[leaf] for leaf in pair)
    variant = asked.variant or Variant()
    rank = settings.rank_of(name) // variant.rank_factor
    num_blocks_B = variant.num_blocks if not is_lookup and variant.has_blocks(name)[1] else 1
    if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1]) != (rank, rank // num_blocks_B):
        _refuse(where, f"{pair[0]} {tuple(a.shape)} and {pair[1]} {tuple(b.shape)} of {name}", f"rank {rank}")
    if not is_lookup:  # PEFT has blocks in linears alone
        a, b = variant.without_blocks(name, a, b)
    # What a start has left of a table is in the file, if tables were saved. PEFT begins an embedding as plain LoRA.
    is_of_rest = bool(variant.parts) and own_VH is None and not is_lookup
    if is_of_rest and tables.is_tied:
        _refuse(where, f"{name} as a start has left it, of a base that ties it, and no table of its own", "one")
    return TableUpdate(
        own_VH=own_VH,
        own_bias_V=own_bias_V,
        rows_VR=a.T if is_lookup else b,
        columns_RH=b.T if is_lookup else a,
        scale=settings.scale_of(name),
        is_of_rest=is_of_rest,
        bias_V=parts.get(_BIAS),
        magnitude_V=None if is_lookup else parts.get(_MAGNITUDE),
        column_magnitude_H=parts.get(_MAGNITUDE) if is_lookup else None,
    )


def _tied(
    settings: LoraSettings,
    updates: dict[str, TableUpdate],
    tables: BaseTables,
    *,
    is_one: bool,
    has_one_pair: bool,
    where: Path,
) -> tuple[LoraSettings, dict[str, TableUpdate]]:
    """Of tables that the base ties: one for both, or two, which PEFT makes of the one that the file has, if it has."""
    embedding, head = tables.embeddings[0], tables.head
    both = {name: updates.get(name, TableUpdate()) for name in (embedding, head)}
    if has_one_pair and not _is_same_pair(both[embedding], both[head]):  # of which PEFT loads one for both
        _refuse(where, "different updates of embedding and head, with ensure_weight_tying", "one update")
    owns = [own for update in both.values() if (own := update.own_VH) is not None]
    if len(owns) == 2 and not torch.equal(*owns):
        _refuse(where, "different tables for embedding and head, which are one in the base", "one table")
    if owns:
        both = {name: replace(update, own_VH=owns[0]) for name, update in both.items()}
    if not is_one:
        changed = {name: update for name, update in both.items() if owns or name in updates}
        updates = {name: (updates | changed)[name] for name in tables.names if name in updates or name in changed}
        return _with_tables(settings, updates, tables), updates
    first, second = both[embedding], updates.pop(head, None)
    if second is not None and second.rows_VR is not None and not _is_same_sum(first, second):
        _refuse(where, "different updates of embedding and head, with ensure_weight_tying", "one update")
    updates[embedding] = first
    return replace(_with_tables(settings, updates, tables), tied_head=head), updates


def _with_tables(settings: LoraSettings, updates: Collection[str], tables: BaseTables) -> LoraSettings:
    chosen = tuple(name for name in tables.names if name in updates or name in settings.modules_to_save)
    return replace(settings, modules_to_save=chosen)


def _is_same_sum(one: TableUpdate, other: TableUpdate) -> bool:
    return _is_same_pair(one, other) and one.scale == other.scale and other.magnitude_V is None


def _is_same_pair(one: TableUpdate, other: TableUpdate) -> bool:
    if one.rows_VR is None or one.columns_RH is None or other.rows_VR is None or other.columns_RH is None:
        return False
    return torch.equal(one.rows_VR, other.rows_VR) and torch.equal(one.columns_RH, other.columns_RH)


def require_updates_fit(
    updates: Mapping[str, TableUpdate], shapes: Mapping[str, tuple[int, ...]], *, where: str
) -> None:
    """Refuse updates of tables of another size.

    Args:
        updates: by the full name of a table.
        shapes: `{table}.weight` -> [V, H], and `{head}.bias` of a head that has one.
        where: what to call the adapter in an error.

    Raises:
        ConfigError: names the first part that does not fit, or a token that the table does not have.
    """
    for name, update in updates.items():
        num_rows, hidden = shapes[f"{name}.weight"]
        bias_shape = shapes.get(f"{name}.bias", (0,))
        rank = 0 if update.rows_VR is None else update.rows_VR.shape[-1]
        ids_N = update.token_ids_N
        num_tokens = 0 if ids_N is None else ids_N.numel()
        if update.bias_V is not None and f"{name}.bias" not in shapes:
            found = f"lora_bias on {name}, which has no bias of its own"
            _refuse(where, found, "a head with one: no model file has a place for it", "Use it with PEFT.")
        for part, expected in (
            (update.own_VH, (num_rows, hidden)),
            (update.own_bias_V, bias_shape),
            (update.rows_VR, (num_rows, rank)),
            (update.bias_V, bias_shape),
            (update.columns_RH, (rank, hidden)),
            (update.magnitude_V, (num_rows,)),
            (update.column_magnitude_H, (hidden,)),
            (update.token_rows_NH, (num_tokens, hidden)),
        ):
            if part is not None and tuple(part.shape) != expected:
                found = f"{tuple(part.shape)} for {name} of {num_rows} rows and {hidden} columns"
                _refuse(where, found, f"{expected}", "Use the base that the adapter was trained on.")
        if ids_N is not None and num_tokens and int(ids_N.max()) >= num_rows:
            _refuse(where, f"token {int(ids_N.max())} of {name}", f"below {num_rows}", "Use the adapter's base.")


@torch.no_grad()
def update_table_(table_VH: Tensor, bias_V: Tensor | None, update: TableUpdate) -> None:
    """Make of a base's table what PEFT computes with, in place; sums are fp32, a block of rows at a time.

    Args:
        table_VH: of the base, in any floating-point dtype, to which the result is rounded.
        bias_V: of a head that has one.
        update: that fits both.
    """
    if bias_V is not None:
        bias_V.copy_(updated_bias(bias_V, update))
    device = table_VH.device
    block_rows = max(1, _BLOCK_ELEMENTS // table_VH.shape[1])
    blocks = [slice(first, first + block_rows) for first in range(0, table_VH.shape[0], block_rows)]
    column_scale_H = _column_scale(table_VH, update, blocks)
    for block in blocks:
        sum_QH = _summed(table_VH, update, block)
        if column_scale_H is not None:
            sum_QH = sum_QH * column_scale_H
        if update.magnitude_V is not None:
            norm_Q = torch.linalg.vector_norm(sum_QH, dim=1)
            norm_Q.masked_fill_(norm_Q == 0.0, 1.0)  # a row of zeros stays zero, as in `model.dora`
            sum_QH = sum_QH * (update.magnitude_V[block].to(device, torch.float32) / norm_Q).unsqueeze(1)
        table_VH[block] = sum_QH.to(table_VH.dtype)
    if update.token_ids_N is not None and update.token_rows_NH is not None:
        table_VH[update.token_ids_N.to(device)] = update.token_rows_NH.to(device, table_VH.dtype)


def updated_bias(bias_V: Tensor, update: TableUpdate) -> Tensor:
    """Of a head that has one, fp32, on its device; zeros beside trained rows, where PEFT 0.21 leaves it out."""
    if update.token_ids_N is not None:
        return torch.zeros(bias_V.shape, device=bias_V.device)
    own_V = (bias_V if update.own_bias_V is None else update.own_bias_V).to(bias_V.device, torch.float32)
    if update.bias_V is None:
        return own_V
    return torch.add(own_V, update.bias_V.to(bias_V.device, torch.float32), alpha=update.scale)


def _summed(table_VH: Tensor, update: TableUpdate, block: slice) -> Tensor:
    """Rows of W + s B A in fp32, [Q, H]."""
    device = table_VH.device
    sum_QH = (table_VH if update.own_VH is None else update.own_VH)[block].to(device, torch.float32)
    if update.rows_VR is None or update.columns_RH is None:
        return sum_QH
    rows_QR, columns_RH = (part.to(device, torch.float32) for part in (update.rows_VR[block], update.columns_RH))
    return torch.addmm(sum_QH, rows_QR, columns_RH, alpha=update.scale)


def _column_scale(table_VH: Tensor, update: TableUpdate, blocks: Sequence[slice]) -> Tensor | None:
    """The factor [H] on each column of the sum, fp32."""
    if update.column_magnitude_H is None:
        return None
    squares_H = torch.zeros(table_VH.shape[1], dtype=torch.float64, device=table_VH.device)
    for block in blocks:
        squares_H += _summed(table_VH, update, block).square_().sum(0)
    norm_H = squares_H.sqrt_().float()
    return update.column_magnitude_H.to(table_VH.device, torch.float32) / norm_H.masked_fill_(norm_H == 0.0, 1.0)


def _refuse(
    where: Path | str,
    found: str,
    expected: str,
    fix: str = "Merge it into its base with PEFT (merge_and_unload), and train on that.",
) -> NoReturn:
    raise ConfigError(where=str(where), found=found, expected=expected, fix=fix)
