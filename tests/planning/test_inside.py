"""What is planned for the inside of our own operations is what they take, however many documents are in the row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_trainer.model.attention import packed_attention, packed_attention_backward
from qlora_trainer.planning.inside import ATTENTION, bytes_of
from qlora_trainer.planning.tracker import Inside, TensorSpec
from tests.hardware.profiled_memory import bytes_beyond_results

HEADS, HEAD_SIZE, NUM_TOKENS = 3, 32, 400
SCALE, SOFTCAP = 0.2, 0.0
TOLERANCE_BYTES = 4096  # of a handful of small tensors, such as positions


def spec(num_tokens: int) -> TensorSpec:
    return TensorSpec((1, HEADS, num_tokens, HEAD_SIZE), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("window", [100, 300])
@pytest.mark.parametrize("num_documents", [1, 2, 3])
def test_chunked_attention_takes_what_one_document_takes(window: int, num_documents: int) -> None:
    """Mutation tried: the op keeps a document's result while it works on the next one, 2 % of an evaluation."""
    lengths = [NUM_TOKENS] * num_documents
    q, k, v = (torch.randn(1, sum(lengths), HEADS, HEAD_SIZE).transpose(1, 2) for _ in range(3))
    out: list[Tensor] = []
    with torch.no_grad():

        def forward() -> tuple[Tensor, ...]:
            out[:] = packed_attention(q, k, v, lengths, SCALE, window, SOFTCAP)
            return tuple(out)

        found_bytes = bytes_beyond_results(forward)
        grad = torch.ones_like(out[0])

        def backward() -> tuple[Tensor, ...]:
            grads: tuple[Tensor, ...] = packed_attention_backward(
                grad, q, k, v, out[0], out[1], lengths, SCALE, window, SOFTCAP
            )
            return grads

        found_backward_bytes = bytes_beyond_results(backward)
    settings = ((NUM_TOKENS,), SCALE, window, SOFTCAP)
    qkv = (spec(NUM_TOKENS),) * 3
    out_spec = TensorSpec((1, NUM_TOKENS, HEADS, HEAD_SIZE), torch.float32, torch.device("cpu"))
    lse_spec = TensorSpec((1, HEADS, NUM_TOKENS), torch.float32, torch.device("cpu"))
    planned_bytes = bytes_of(Inside(0, ATTENTION[0], (*qkv, *settings)))
    planned_backward_bytes = bytes_of(Inside(0, ATTENTION[1], (out_spec, *qkv, out_spec, lse_spec, *settings)))
    assert found_bytes == pytest.approx(planned_bytes, abs=TOLERANCE_BYTES)
    assert found_backward_bytes == pytest.approx(planned_backward_bytes, abs=TOLERANCE_BYTES)
