"""Importing bitsandbytes asks no hub for kernels, writes nothing, and brings no triton where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# Takes the place of the `kernels` package: whoever imports it leaves a mark.
FAKE_KERNELS = """
from pathlib import Path
Path(__file__).with_name("was-imported").write_text("")
def get_kernel(*arguments, **options):
    raise RuntimeError("the hub was asked")
"""
IMPORT_ORDER = """
import sys
sys.path.insert(0, sys.argv[1])
import qlora_trainer.hardware.quant_library as ours
assert "kernels" not in sys.modules
import torch
assert "triton" not in sys.modules or torch.cuda.is_available()
import triton  # no longer hidden
import bitsandbytes
assert ours.bitsandbytes is bitsandbytes
assert ours.functional is bitsandbytes.functional
packed, state = ours.functional.quantize_4bit(torch.ones(64, 64), quant_type="nf4")
assert torch.equal(ours.functional.dequantize_4bit(packed, state), torch.ones(64, 64))
assert not __import__("pathlib").Path(sys.argv[1], "was-imported").exists()
import kernels  # hidden for the length of the import only
"""


# What a CPU with AVX512-BF16 answers; only there does bitsandbytes ask for a kernel at all.
CPU_WITH_AVX512_BF16 = """
import ctypes, sys
load = ctypes.CDLL.__getattr__
ctypes.CDLL.__getattr__ = lambda library, name: (lambda: True) if name == "has_avx512bf16_cpu" else load(library, name)
"""
PLAIN_IMPORT = """
import sys
sys.path.insert(0, sys.argv[1])
import bitsandbytes
"""


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "kernels.py").write_text(FAKE_KERNELS)
    return subprocess.run(
        [sys.executable, "-c", CPU_WITH_AVX512_BF16 + script, str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_no_kernel_is_fetched_and_nothing_is_printed(tmp_path: Path) -> None:
    child = run(IMPORT_ORDER, tmp_path)

    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")
    assert (tmp_path / "was-imported").exists()  # by the last line: the fake would have been found


def test_a_plain_import_does_both(tmp_path: Path) -> None:
    """What the test above is worth: on such a CPU bitsandbytes alone asks the hub, and complains on stderr."""
    child = run(PLAIN_IMPORT, tmp_path)

    assert child.returncode == 0
    assert (tmp_path / "was-imported").exists()
    assert "kernels-community" in child.stderr
