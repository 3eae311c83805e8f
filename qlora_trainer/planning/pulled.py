"""A dry model for a while as a run with certain levers has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from qlora_trainer.config.levers import NO_LEVERS, Levers
from qlora_trainer.model import nf4
from qlora_trainer.model.pull_levers import pull_levers
from qlora_trainer.planning.dry_model import DryModel


@contextmanager
def pulled(dry: DryModel, levers: Levers) -> Iterator[None]:
    """While active, `dry` is as a run with `levers` has it; before and after, nothing is pulled."""
    if dry.model.device.type == "cpu":  # a mapped base stays where it is, and a fake one is mapped nowhere
        levers = replace(levers, base_residency="device")
    head = dry.model.head
    dense_VH = head.weight
    with dry.fake_mode:
        if levers.nf4_head:
            head.hold(packed_head(dry, dry.model.device))
        pull_levers(dry.model, levers)
    try:
        yield
    finally:
        with dry.fake_mode:
            pull_levers(dry.model, NO_LEVERS)
        if levers.nf4_head:
            head.hold(dense_VH)


def packed_head(dry: DryModel, device: torch.device) -> nf4.NF4Weight:
    """The head of a dry model in NF4, its scales quantized where those of its linears are."""
    head = dry.model.head
    code = next(iter(dry.model.linears.values())).code
    return nf4.empty((head.out_features, head.in_features), code=code, device=device)
