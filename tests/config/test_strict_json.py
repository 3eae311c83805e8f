"""JSON that is written in one way, and read with suspicion."""

from __future__ import annotations

import hashlib

import pytest

from qlora_trainer.config.strict_json import decode, json_sha256


def test_a_digest_is_of_these_bytes() -> None:
    """Checkpoints and caches that are there hold it: another form would refuse every resume."""
    expected = hashlib.sha256(b'{"a": [1, "\\u00e9"], "b": null}').hexdigest()
    assert json_sha256({"b": None, "a": [1, "\u00e9"]}) == expected


@pytest.mark.parametrize(
    "text, reason",
    [
        (b'{"a": 1e999}', "the number 1e999 is beyond all floats"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "an integer of 5,000 digits"),
    ],
)
def test_numbers_that_nothing_holds_are_refused(text: bytes, reason: str) -> None:
    """Mutation tried: Python's own reading, which makes an infinity of the first."""
    with pytest.raises(ValueError, match=reason):
        decode(text)
    assert decode(b'{"a": [1e308, -0.5, 7]}') == {"a": [1e308, -0.5, 7]}
