from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qlora_trainer.errors import ConfigError, StorageError
from qlora_trainer.planning.plan import FrontierCell, Plan
from qlora_trainer.report.frontier_plot import write_frontier_plot
from qlora_trainer.report.frontier_table import length_label, size_label, speed_label
from tests.report.made_plan import MIB, failing_plan, fitting_plan, frontier, gpu_plan

ORANGE = (0xE8, 0x59, 0x0C)
HATCH = (0xC8, 0xCC, 0xD2)


def pixels(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    from matplotlib.image import imread

    return np.round(255 * np.asarray(imread(path))[..., :3]).astype(np.uint8)


def num_pixels(path: Path, colour: tuple[int, int, int]) -> int:
    return int((pixels(path) == np.array(colour, np.uint8)).all(axis=-1).sum())


def test_the_plot_is_a_png_of_1200_by_700(tmp_path: Path) -> None:
    path = tmp_path / "frontier.png"
    write_frontier_plot(fitting_plan(), path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (1200, 700)
    assert pixels(path).shape == (700, 1200, 3)  # decodes to its end
    assert num_pixels(path, ORANGE) > 500  # the chosen cell's outline
    assert num_pixels(path, HATCH) > 500
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_plan_gives_the_same_bytes_whatever_the_user_prefers(tmp_path: Path) -> None:
    import matplotlib

    one, two = tmp_path / "one.png", tmp_path / "two.png"
    write_frontier_plot(fitting_plan(), one)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "savefig.dpi": 17, "figure.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        write_frontier_plot(fitting_plan(), two)
        assert dict(matplotlib.rcParams) == before
    assert one.read_bytes() == two.read_bytes()
    write_frontier_plot(gpu_plan(), two)  # replaces
    assert one.read_bytes() != two.read_bytes()


def many_cells() -> tuple[FrontierCell, ...]:
    """A spread of speeds that asks for a logarithmic scale, in as many cells as can be read."""
    return tuple(
        FrontierCell(rank=2**i, seq_len=2**j, micro_batch_tokens=2**j, tokens_per_second=1e6 / 2**j)
        for i in range(10)
        for j in range(7, 18)
    )


@pytest.mark.parametrize(
    "plan",
    [
        failing_plan(),
        replace(failing_plan(), frontier=frontier(10 * MIB, 1.0)),
        replace(fitting_plan(), frontier=fitting_plan().frontier[:1]),
        replace(fitting_plan(), frontier=fitting_plan().frontier[::2]),
        replace(fitting_plan(), frontier=many_cells()),
        replace(fitting_plan(), model=f"/models/模型 $x^$ \x1b[31m{'long ' * 40}", device="NVIDIA " * 9),
    ],
    ids=["does not fit", "nothing fits", "one cell", "holes", "many cells", "odd names"],
)
def test_odd_frontiers_are_drawn_without_a_warning(plan: Plan, tmp_path: Path) -> None:
    write_frontier_plot(plan, tmp_path / "a.PNG")
    assert pixels(tmp_path / "a.PNG").shape == (700, 1200, 3)


@pytest.mark.parametrize(
    "name, found",
    [
        ("plot.pdf", "found a plot that ends in '.pdf'; expected one that ends in .png"),
        ("plot", "found a plot without an ending"),
        ("missing/plot.png", "found no folder "),
        ("file/plot.png", "found no folder "),
    ],
)
def test_a_wrong_path_is_told_in_one_line(name: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        write_frontier_plot(fitting_plan(), tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: {found}")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_plan_without_a_frontier_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a plan without a frontier"):
        write_frontier_plot(replace(fitting_plan(), frontier=()), tmp_path / "plot.png")


def test_what_the_disk_refuses_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    path.mkdir()
    with pytest.raises(StorageError, match=r"plot.png: found a folder; expected a file") as caught:
        write_frontier_plot(fitting_plan(), path)
    assert "output.dir" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_matplotlib_is_told_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        write_frontier_plot(fitting_plan(), tmp_path / "plot.png")


def test_matplotlib_is_imported_for_a_plot_only_and_pyplot_never(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
import qlora_trainer.report.frontier_table
import qlora_trainer.report.plan_tables
from qlora_trainer.report.frontier_plot import write_frontier_plot
from tests.report.made_plan import fitting_plan
assert not {{"matplotlib", "torch"}} & set(sys.modules)
write_frontier_plot(fitting_plan(), Path({str(tmp_path / "a.png")!r}))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    "label, numbers, texts",
    [
        (length_label, (192, 512, 1024, 1500, 2048, 131072), ("192", "512", "1k", "1500", "2k", "128k")),
        (speed_label, (7.314, 86.42, 913.4, 999.7, 12_400, 2e6), ("7.31", "86.4", "913", "1.00k", "12.4k", "2.00M")),
    ],
)
def test_labels(label: Callable[[float], str], numbers: tuple[float, ...], texts: tuple[str, ...]) -> None:
    assert tuple(map(label, numbers)) == texts


@pytest.mark.parametrize(
    "tokens, text", [(0, "-"), (256, "256 tok"), (1024, "1"), (1536, "1.5"), (2047, "1.9"), (65536, "64")]
)
def test_sizes_are_in_documents_and_never_too_large(tokens: int, text: str) -> None:
    cell = FrontierCell(rank=8, seq_len=1024, micro_batch_tokens=tokens, tokens_per_second=1.0)
    assert size_label(cell) == text
