"""A dry model for a while as a run with certain levers has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from qlora_trainer.config.levers import NO_LEVERS, Levers
from qlora_trainer.model.pull_levers import pull_levers
from qlora_trainer.planning.dry_model import DryModel


@contextmanager
def pulled(dry: DryModel, levers: Levers) -> Iterator[None]:
    """While active, `dry` is as a run with `levers` has it; before and after, nothing is pulled."""
    if dry.model.device.type == "cpu":  # a mapped base stays where it is, and a fake one is mapped nowhere
        levers = replace(levers, base_residency="device")
    with dry.fake_mode:
        pull_levers(dry.model, levers)
    try:
        yield
    finally:
        with dry.fake_mode:
            pull_levers(dry.model, NO_LEVERS)
