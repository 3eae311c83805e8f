"""What variants of LoRA are beside the base as it was published: W + s B A of some rank.

* PiSSA (Meng et al., 2024) and OLoRA (Büyükakyüz, 2024) begin with a part of each weight, s B0 A0, by singular values
  or by QR. PEFT takes it from the base when the adapter is made, and again whenever one is loaded (0.21, `pissa_init`,
  `olora_init`), so it computes with W - s B0 A0 + s B A: LoRA on W with [B, -B0] and [A; A0], as its own conversion
  writes it. The part is found again in W. With DoRA the rows of the same sum are scaled.
* KaSA (arXiv:2412.06071) takes the R smallest singular parts out of W likewise, and trains B diag(d) A.
* BD-LoRA has a block-diagonal A or B, of which the file has the blocks.
* A linear that was trained whole has LoRA of full rank (`model.whole_linears`).
* QALoRA (arXiv:2309.14717), over GPTQ, multiplies A by the mean of each group of G inputs, times the number of groups
  P: each column of A stands for G inputs, times P / G. On linears that are not GPTQ's PEFT ignores it, and A is whole.

Other starts that change the base cannot be found again (docs/log.md, thirteenth session).

Legend: O out_features, I in_features, R rank, K the smaller of O and I.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_folder import AdapterFolder
from qlora_trainer.model.adapter_variants import Variant
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.streamed import DiskWeights
from qlora_trainer.model.table_updates import TableUpdate
from qlora_trainer.model.whole_linears import lora_of_full_rank

_FIX, _WRONG = "Use the base that the adapter was trained on.", "Point to another adapter folder."


@torch.no_grad()
def as_plain_lora(adapter: AdapterFolder, base_folder: Path) -> AdapterFolder:
    """The adapter without `variant`; itself where it has none. Takes up to minutes a weight: its singular values.

    Args:
        adapter: as it was read; its settings are those of the result already.
        base_folder: the base's, as it was published.

    Raises:
        ConfigError: a weight is missing there, has another shape, or is too small for KaSA's rank; or the scale of a
            part is not positive, of which PEFT makes no numbers.
    """
    variant, settings = adapter.variant, adapter.settings
    if variant is None:
        return adapter
    disk, weights = DiskWeights.of(base_folder, settings.layer_replication), dict(adapter.weights)
    for name in settings.targets:
        if name in variant.whole:
            weights |= _of_whole(name, weights.pop(f"{name}.weight"), settings, disk)
        if name in variant.whole or not {f"{name}.lora_A", f"{name}.lora_B"} <= weights.keys():
            continue  # which is refused where it is put on the base
        a_RI, b_OR = (weights[f"{name}.{leaf}"] for leaf in ("lora_A", "lora_B"))
        shape = disk.shape(f"{name}.weight") if f"{name}.weight" in disk.files else ()
        a_RI, b_OR = _whole(variant, name, (a_RI, b_OR), shape, settings.rank_of(name))
        if variant.has_blocks(name)[1] and settings.lora_bias:  # PEFT's blocks have none
            weights[f"{name}.lora_B_bias"] = torch.zeros(b_OR.shape[0])
        if variant.parts:
            weight_OI = disk.copied(f"{name}.weight", device=torch.device("cpu"), dtype=torch.float32)
            b_OR, a_RI = _beside(variant.parts, weight_OI, (b_OR, a_RI), settings.scale_of(name), name)
        weights[f"{name}.lora_A"], weights[f"{name}.lora_B"] = a_RI, b_OR
    updates = {name: _untaken(variant, name, own, disk) for name, own in adapter.updates.items()}
    return replace(adapter, weights=weights, updates=updates, variant=None)


def _of_whole(name: str, trained_OI: Tensor, settings: LoraSettings, disk: DiskWeights) -> dict[str, Tensor]:
    """What LoRA of full rank has of a linear that was trained whole."""
    shape = disk.shape(f"{name}.weight") if f"{name}.weight" in disk.files else ()
    if tuple(trained_OI.shape) != tuple(shape):
        raise ConfigError(
            where=f"the base's {name}.weight",
            found=f"{tuple(shape)}" if shape else "none",
            expected=f"{tuple(trained_OI.shape)}, as this adapter has it",
            fix=_FIX,
        )
    base_OI = disk.copied(f"{name}.weight", device=torch.device("cpu"), dtype=torch.float32)
    a_RI, b_OR = lora_of_full_rank(trained_OI, base_OI)
    found = {f"{name}.lora_A": a_RI, f"{name}.lora_B": b_OR}
    if settings.use_dora:
        found[f"{name}.lora_magnitude_vector"] = torch.linalg.vector_norm(trained_OI.float(), dim=1)
    if settings.lora_bias:
        found[f"{name}.lora_B_bias"] = torch.zeros(b_OR.shape[0])
    return found


def _whole(
    variant: Variant, name: str, pair: tuple[Tensor, Tensor], shape: Sequence[int], rank: int
) -> tuple[Tensor, Tensor]:
    """A and B as they are in the file, as [R, I] and [O, R] in fp32."""
    a, b = pair
    expected = variant.shapes_in_file(name, ((rank, shape[1]), (shape[0], rank)), a) if len(shape) == 2 else ()
    if (tuple(a.shape), tuple(b.shape)) != expected:
        raise ConfigError(
            where=f"the base's {name}.weight",
            found=f"{tuple(shape)}" if shape else "none",
            expected=f"a weight that lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} of this adapter fit",
            fix=_FIX,
        )
    a_RI, b_OR = variant.without_blocks(name, a.float(), b.float())
    if variant.may_pool and (num_groups := a_RI.shape[1]) < shape[1]:
        group_size = shape[1] // num_groups
        a_RI = a_RI.repeat_interleave(group_size, dim=1) * (num_groups / group_size)
    return a_RI, b_OR


def _beside(
    parts: Sequence[str], weight_OI: Tensor, pair: tuple[Tensor, Tensor], scale: float, name: str
) -> tuple[Tensor, Tensor]:
    """B [O, R] and A [R, I] beside the weight as it was, of an adapter beside one that these parts were taken from."""
    b_OR, a_RI = (own.float() for own in pair)
    rank, columns, rows = a_RI.shape[0], [b_OR], [a_RI]
    for part in parts:
        taken_OR, taken_RI = _taken(part, weight_OI, rank, scale, name)
        weight_OI = torch.addmm(weight_OI, taken_OR, taken_RI, alpha=-scale)
        columns.append(-taken_OR)
        rows.append(taken_RI)
    return torch.cat(columns, dim=1), torch.cat(rows)


def _taken(part: str, weight_OI: Tensor, rank: int, scale: float, name: str) -> tuple[Tensor, Tensor]:
    """B0 [O, R] and A0 [R, I], whose product times the scale PEFT takes out of the weight."""
    if part == "olora":
        q_OK, r_KI = torch.linalg.qr(weight_OI)
        return q_OK[:, :rank], r_KI[:rank]
    if scale <= 0.0:
        raise ConfigError(where=name, found=f"a scale of {scale:g}", expected="a positive lora_alpha", fix=_WRONG)
    u_OK, s_K, v_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    if part == "pissa":
        root_R = (s_K[:rank] / scale).sqrt()
        return u_OK[:, :rank] * root_R, v_KI[:rank] * root_R.unsqueeze(1)
    first = s_K.numel() - rank
    if first <= 0:  # as in PEFT
        raise ConfigError(
            where=f"the base's {name}.weight",
            found=f"{tuple(weight_OI.shape)}",
            expected=f"more singular values than KaSA's rank, {rank}",
            fix=_FIX,
        )
    return u_OK[:, first:] * (s_K[first:] / scale), v_KI[first:]


def _untaken(variant: Variant, name: str, update: TableUpdate, disk: DiskWeights) -> TableUpdate:
    """The same of a table; one that the adapter's file has is there as it was left, as PEFT loads it."""
    if not update.is_of_rest or update.rows_VR is None or update.columns_RH is None:
        return update
    weight_VH = disk.copied(f"{name}.weight", device=torch.device("cpu"), dtype=torch.float32)
    pair = (update.rows_VR, update.columns_RH)
    rows_VR, columns_RH = _beside(variant.parts, weight_VH, pair, update.scale, name)
    return replace(update, rows_VR=rows_VR, columns_RH=columns_RH, is_of_rest=False)
