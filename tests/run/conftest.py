"""One tiny base for all runs, one cache of its NF4 form; each plan is made, and each config accepted, once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model import acceptance
from qlora_trainer.model import base as base_module
from qlora_trainer.planning.budget import Budget
from qlora_trainer.planning.make_plan import make_plan
from qlora_trainer.planning.plan import Plan
from qlora_trainer.run import evaluation, knobs, planned
from tests.run.tiny_run import write_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True, scope="session")
def accepted_once() -> Iterator[None]:
    """Equal configs get equal answers: a small copy of the base is a fifth of a tiny run."""
    working, found = acceptance.require_accepted, dict[str, bool]()

    def remembered(config: PreTrainedConfig) -> bool:
        key = config.to_json_string(use_diff=False)
        if key not in found:
            found[key] = working(config)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_module, "require_accepted", remembered)
        yield


@pytest.fixture(autouse=True, scope="session")
def in_one_thread() -> Iterator[None]:
    """Tiny products take longer in two, and two workers share the cores; commands that tests begin take all."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (knobs, evaluation):
            patch.setattr(module, "num_cpu_threads", lambda: 1)
        yield


@pytest.fixture(scope="session")
def made_plans() -> dict[tuple[object, ...], Plan]:
    return {}


@pytest.fixture(scope="module")
def plans_made_once(made_plans: dict[tuple[object, ...], Plan]) -> Iterator[None]:
    """Equal configs get equal plans, whatever memory is free at the moment: planning is half of a tiny run."""

    def remembered(config: RunConfig, budget: Budget, *, model_config: PreTrainedConfig, **options: Any) -> Plan:
        asked = config.model_dump_json(exclude={"output": True, "model": True, "data": {"train", "eval"}})
        key = (asked, budget.compute_dtype, model_config.to_json_string(), options["documents"])
        if key not in made_plans:
            made_plans[key] = make_plan(config, budget, model_config=model_config, **options)
        return made_plans[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned, "make_plan", remembered)
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[bool, Path]:
    """By whether they tie embedding and head."""
    return {True: base, False: write_base(tmp_path_factory.mktemp("untied"), is_tied=False)}
