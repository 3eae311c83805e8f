from __future__ import annotations

from pathlib import Path

import pytest

from qlora_trainer.config.bases import BaseKind, base_kind
from qlora_trainer.config.load import load_config
from qlora_trainer.config.schema import RunConfig

CONFIGS = Path(__file__).parents[2] / "configs"


def shipped(name: str) -> RunConfig:
    return load_config(CONFIGS / name)


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    config = load_config(path)
    assert path.suffix == ".yaml"
    assert config.output.dir.startswith("runs/")  # git ignores it
    assert config.output.dir != "runs/default"  # two examples do not meet in one folder


def test_the_quickstart_needs_no_hub() -> None:
    config = shipped("quickstart.yaml")
    assert base_kind(config.model.base) is BaseKind.ALIAS
    assert (config.data.train, config.data.eval) == ("quickstart-data/train.jsonl", "quickstart-data/eval.jsonl")


def test_the_hub_example_names_a_hub_id() -> None:
    assert base_kind(shipped("hub_7b.yaml").model.base) is BaseKind.HUB
