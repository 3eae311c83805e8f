"""Configs that no model can have, or that are no text decoder's: one line, and nothing of transformers' beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.errors import ConfigError
from qlora_trainer.planning.model_config import read_model_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}
T5 = {"model_type": "t5", "d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 128, "d_kv": 16, "vocab_size": 256}
BERT = {"model_type": "bert"} | {name: LLAMA[name] for name in LLAMA if name.startswith(("hidden", "num_a", "num_h"))}
BERT |= {"intermediate_size": 128, "vocab_size": 256}


@pytest.mark.parametrize(
    "fields, found",
    [
        (LLAMA | {"hidden_size": 10**9}, "found heads of 250,000,000 numbers each; expected 1 to 4,096"),
        (LLAMA | {"head_dim": 0}, "found heads of 0 numbers each"),
        (LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 4, "hidden_size": 96}, "6 that share num_key"),
        (LLAMA | {"num_key_value_heads": 8}, "num_attention_heads 4 that share num_key_value_heads 8"),
        (LLAMA | {"num_key_value_heads": 0}, "num_attention_heads 4 that share num_key_value_heads 0"),
        (LLAMA | {"num_hidden_layers": 100_000}, "found num_hidden_layers 100,000; expected at most 1,024"),
        (LLAMA | {"vocab_size": 0}, "found vocab_size 0; expected at least 1"),
        (LLAMA | {"hidden_size": 65}, r"'validate_architecture': ValueError: The hidden size \(65\)"),
        (LLAMA | {"hidden_size": "64"}, "'hidden_size': TypeError: Field 'hidden_size' expected int"),
        (LLAMA | {"hidden_act": "foo"}, "KeyError: 'foo'"),
        (T5, r"Unrecognized configuration class .*T5Config.* AutoModelForCausalLM\.\);"),
        (BERT, "found a small copy whose losses differ"),
    ],
)
def test_what_is_no_decoder_is_one_line(
    fields: dict[str, Any], found: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A head size of 10^9 / 4 used to end in a traceback, heads that cannot be shared in a plan that fits."""
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=found) as caught:
        read_model_config(str(tmp_path))

    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_what_could_be_a_model_is_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    config, can_pack = read_model_config(str(tmp_path))
    assert (config.hidden_size, can_pack) == (64, True)
