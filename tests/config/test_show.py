from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_trainer.config.did_you_mean import DOTTED_KEYS, SECTIONS
from qlora_trainer.config.load import load_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.config.show import json_schema, render_yaml, to_yaml

UNUSUAL = (
    "model.base=owner/name",
    "data.train='1e5'",
    'data.eval="été: \\x85 # 1"',
    "data.seq_len=64",
    "data.columns={prompt: 'my query', completion: \"no\"}",
    "lora.target_modules=[q_proj, 'no']",
    "lora.alpha=1e-3",
    "training.max_grad_norm=null",
    "training.learning_rate=1e-20",
    "memory.budget=1.5GiB",
    "memory.host_budget=1000000001",
    "memory.activation_checkpointing=true",
    "output.trackers=[tensorboard]",
)


@pytest.fixture
def config() -> RunConfig:
    return load_config(None, UNUSUAL)


@pytest.mark.parametrize("write", [render_yaml, to_yaml])
def test_written_configs_are_read_back_equal(config: RunConfig, write: object, tmp_path: Path) -> None:
    assert callable(write)
    path = tmp_path / "config.yaml"
    path.write_text(write(config), encoding="utf-8")
    assert load_config(path) == config


def test_the_resolved_dump_has_every_key_and_readable_sizes(config: RunConfig) -> None:
    text = to_yaml(config)
    assert all(f"  {key.partition('.')[2]}:" in text for key in DOTTED_KEYS)
    assert "budget: 1536MiB" in text
    assert "host_budget: 1000000001B" in text


def test_every_key_is_printed_under_its_meaning_and_default(config: RunConfig) -> None:
    lines = render_yaml(config).splitlines()
    words = " ".join(line.strip().removeprefix("# ") for line in lines)
    for section, keys in SECTIONS.items():
        assert f"{section}:" in lines
        for key, description in keys.items():
            assert sum(line.startswith(f"  {key}:") for line in lines) >= 1
            assert f"{description} (" in words
    assert "what is learned then depends on memory.budget. (default: 16)" in words
    assert "(required)" in words
    assert max(map(len, lines)) <= 120


def test_schema_describes_every_key_and_forbids_others() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    for section, reference in schema["properties"].items():
        definition = schema["$defs"][reference["$ref"].rpartition("/")[2]]
        assert definition["additionalProperties"] is False
        assert {key: entry["description"] for key, entry in definition["properties"].items()} == SECTIONS[section]
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["model", "data"]


def test_schema_lets_a_size_be_text() -> None:
    budget = json_schema()["$defs"]["MemorySection"]["properties"]["budget"]
    assert {"integer", "string"} == {branch["type"] for branch in budget["anyOf"]}
