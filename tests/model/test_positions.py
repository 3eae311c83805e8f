"""How long a document may be: what the config says, and less where a longer one would change its neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, Phi3Config, PreTrainedConfig
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from qlora_trainer.errors import ConfigError
from qlora_trainer.model.positions import max_positions, require_positions

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64,
}


def longrope_config() -> Phi3Config:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    positions: dict[str, Any] = {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
    return Phi3Config(**sizes, **positions, rope_parameters={"rope_theta": 1e4, "factor": 4.0, **LONGROPE})


def test_a_config_says_its_positions() -> None:
    assert max_positions(LlamaConfig(max_position_embeddings=512)) == 512
    assert max_positions(GPT2Config(n_positions=128)) == 128
    assert max_positions(PreTrainedConfig()) is None


def test_longrope_has_those_of_its_first_frequencies() -> None:
    """Beyond them a short document's frequencies are those that its longest neighbour asks for.

    Mutation tried: the config's positions alone.
    """
    config = longrope_config()
    assert max_positions(config) == 64
    rotary, x = Phi3RotaryEmbedding(config), torch.zeros(1, 1, 16)

    def cosines(*lengths: int) -> torch.Tensor:
        positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        cosine: torch.Tensor = rotary(x, positions)[0][:, :10]
        return cosine

    alone = cosines(10)
    assert torch.equal(cosines(10, 64), alone)
    assert not torch.equal(cosines(10, 65), alone)


def test_each_type_of_layer_counts() -> None:
    config = LlamaConfig(max_position_embeddings=256)
    config.rope_parameters = {"full": {"rope_type": "default"}, "sliding": dict(LONGROPE)}
    assert max_positions(config) == 64


def test_longer_documents_are_refused_and_told_why() -> None:
    """LongRoPE is named only where it is the reason."""
    require_positions(10**9, PreTrainedConfig(), "endless")
    require_positions(512, LlamaConfig(max_position_embeddings=512), "short")
    with pytest.raises(ConfigError, match=r"^data\.seq_len: found 513 .* at most 512, the positions of short\. Lower"):
        require_positions(513, LlamaConfig(max_position_embeddings=512), "short")
    with pytest.raises(ConfigError, match=r"at most 64, the positions of phi \(LongRoPE: of its first frequencies\)"):
        require_positions(65, longrope_config(), "phi")
