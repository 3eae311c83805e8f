"""Numbers as a person reads them."""

from __future__ import annotations

import math


def format_bytes(num_bytes: int) -> str:
    """Binary units, three digits: "1.42 GiB", "97.5 MiB", "512 B"."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000 or unit == "GiB":  # from 1000 on in the next unit: "0.98 GiB", not "1000 MiB"
            break
        size /= 1024
    if unit == "B":
        return f"{num_bytes} B"
    decimals = 2 if size < 10 else 1 if size < 100 else 0
    return f"{size:.{decimals}f} {unit}"


def format_seconds(seconds: float) -> str:
    """How long something took: "0.42 s", "9.5 s", "42 s", then as `format_clock`."""
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 59.5 else format_clock(seconds)


def format_clock(seconds: float) -> str:
    """Hours, minutes and seconds as a clock shows them, which changes calmly: "0:07", "12:30", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_loss(loss: float | None) -> str:
    """Four decimals, so that columns of losses line up; a dash where there is none."""
    return "-" if loss is None else f"{loss:.4f}"


def format_change(before: float, after: float) -> str:
    """ "-41.2 %" or "+3.0 %"; empty where there is nothing to compare with."""
    if not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return ""
    return f"{(after / before - 1) * 100:+.1f} %"


def counted(number: int, noun: str) -> str:
    """ "1 document", "1,234 documents"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
