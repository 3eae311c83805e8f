"""Every test runs without a network, and meets bitsandbytes through our import of it."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two workers share the cores: threads that spin hinder the other

# Before transformers or peft import bitsandbytes themselves: this import keeps it from asking the hub for a kernel.
import qlora_trainer.hardware.quant_library  # noqa: F401
from qlora_trainer.config.paths import require_on_disk
from qlora_trainer.data import token_cache
from qlora_trainer.data.token_maker import make_tokens
from qlora_trainer.errors import StorageError

# Where cores are shared, an example takes ten times longer now and then: no reason to fail. The same examples each
# time, so that the same commit is green or red each time; `pytest --hypothesis-profile=explore` looks for new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """What is there now stays: a collector need not walk through all of torch and the tests, as it does once a plan."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def tokens_are_made_here() -> Iterator[None]:
    """By the same function in this process: starting one of its own takes a second, for hundreds of tests. Nor is this
    one's heap given back around it, which takes a while where it is a gigabyte.

    That process is what `tests/data/test_token_process.py` is about; commands that tests run in children begin it, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "make_tokens_apart", make_tokens)
        patch.setattr(token_cache, "release_free_memory", lambda: None)
        yield


@pytest.fixture
def disk_folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder that is not kept in memory: pytest's own, or one beside the tests where /tmp is a tmpfs."""
    try:
        require_on_disk(tmp_path)
    except StorageError:
        with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
            yield Path(folder)
    else:
        yield tmp_path
