"""One finished tiny run for all tests of this room, and a cache of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.run.tiny_run import run_to_end, tiny_config, write_base


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Off the user's cache, and on one thread: the matrices are tiny."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "export-cache"))
        yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The folder of a run that has finished; nobody changes it."""
    folder = tmp_path_factory.mktemp("finished")
    run_to_end(tiny_config(folder, base, "lora.dtype=float32"))
    return folder / "run"
