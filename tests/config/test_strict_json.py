"""JSON that is written in one way."""

from __future__ import annotations

import hashlib

from qlora_trainer.config.strict_json import json_sha256


def test_a_digest_is_of_these_bytes() -> None:
    """Checkpoints and caches that are there hold it: another form would refuse every resume."""
    expected = hashlib.sha256(b'{"a": [1, "\\u00e9"], "b": null}').hexdigest()
    assert json_sha256({"b": None, "a": [1, "\u00e9"]}) == expected
