"""How a run trades time for memory beyond recomputing: values that a plan decides and the model is told. No torch.

None of them changes what is learned, but `nf4_head`, which only `quantization.head` pulls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TableResidency = Literal["device", "host"]
BaseResidency = Literal["device", "streamed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Levers:
    """What is pulled; the default is nothing.

    Attributes:
        tile_tokens: rows that MLP and projections take at a time inside a recomputed layer; 0 for all of them.
        embedding_residency: where embedding and head live.
        nf4_head: whether the head is stored in NF4.
        optimizer_on_host: master and moments live in host memory and are updated there.
        base_residency: "streamed" keeps the packed layers on the host (on a CPU, in the mapped cache), two on the
            device at a time.
    """

    tile_tokens: int = 0
    embedding_residency: TableResidency = "device"
    nf4_head: bool = False
    optimizer_on_host: bool = False
    base_residency: BaseResidency = "device"


NO_LEVERS = Levers()
