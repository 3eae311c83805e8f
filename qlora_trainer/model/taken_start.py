"""PiSSA and OLoRA: what such an adapter is beside the base as it was published, which is plain LoRA of twice the rank.

PEFT begins them with a part of each weight, s B0 A0, which it takes from the base: once when the adapter is made, and
again whenever one is loaded (0.21, `pissa_init`, `olora_init`). So it computes with W - s B0 A0 + s B A, and that is
LoRA on W with [B, -B0] and [A; A0], as its own conversion writes it. The part is found again in W, as PEFT finds it: by
singular values (Meng et al., 2024), or by QR (Büyükakyüz, 2024). With DoRA the rows of the same sum are scaled.

Other starts that change the base cannot be found again (docs/log.md, thirteenth session).

Legend: O out_features, I in_features, R rank.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.adapter_folder import AdapterFolder
from qlora_trainer.model.base import weight_files
from qlora_trainer.model.streamed import DiskWeights


@torch.no_grad()
def as_plain_lora(adapter: AdapterFolder, base_folder: Path) -> AdapterFolder:
    """The adapter without `start`; itself where it has none. Takes up to minutes a weight: its singular values.

    Args:
        adapter: as it was read; its settings are those of the result already.
        base_folder: the base's, as it was published.

    Raises:
        ConfigError: a weight is missing there, or has another shape.
    """
    if adapter.start is None:
        return adapter
    disk, weights = DiskWeights(weight_files(base_folder)), dict(adapter.weights)
    for name in adapter.settings.targets:
        if not {f"{name}.lora_A", f"{name}.lora_B"} <= weights.keys():
            continue  # which is refused where it is put on the base
        a_RI, b_OR = (weights[f"{name}.{leaf}"].float() for leaf in ("lora_A", "lora_B"))
        weight_OI = _weight(disk, f"{name}.weight", (b_OR.shape[0], a_RI.shape[1]))
        first_OR, first_RI = _first_part(adapter.start, weight_OI, a_RI.shape[0], adapter.settings.scale_of(name))
        weights[f"{name}.lora_A"] = torch.cat([a_RI, first_RI])
        weights[f"{name}.lora_B"] = torch.cat([b_OR, -first_OR], dim=1)
    return replace(adapter, weights=weights, start=None)


def _first_part(start: str, weight_OI: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """B0 [O, R] and A0 [R, I], whose product times the scale PEFT takes out of the weight."""
    if start == "olora":
        q_OK, r_KI = torch.linalg.qr(weight_OI)
        return q_OK[:, :rank], r_KI[:rank]
    u_OK, s_K, v_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    root_R = (s_K[:rank] / scale).sqrt()
    return u_OK[:, :rank] * root_R, v_KI[:rank] * root_R.unsqueeze(1)


def _weight(disk: DiskWeights, name: str, shape: tuple[int, int]) -> Tensor:
    found = disk.copied(name, device=torch.device("cpu"), dtype=torch.float32) if name in disk.files else None
    if found is None or tuple(found.shape) != shape:
        raise ConfigError(
            where=f"the base's {name}",
            found="none" if found is None else f"{tuple(found.shape)}",
            expected=f"{shape}: what this adapter has taken from it at its start is to be found again",
            fix="Use the base that the adapter was trained on.",
        )
    return found
