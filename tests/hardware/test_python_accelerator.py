"""The accelerator that is Python only: fake tensors live on it, and it is told from the host."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

from qlora_trainer.hardware.python_accelerator import NAME, python_accelerator

python_accelerator()  # before any test runs: autograd's engine counts the devices at its first backward


@pytest.fixture
def device() -> torch.device:
    found = python_accelerator()
    assert found is not None
    return found


def test_there_is_one_and_it_stays(device: torch.device) -> None:
    assert device.type == NAME
    assert python_accelerator() is device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_backward_run_on_fake_tensors(device: torch.device, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        layer = nn.Linear(16, 8, device=device, dtype=dtype)
        x = torch.empty(4, 16, device=device, dtype=dtype, requires_grad=True)
        loss = layer(x).float().square().mean()
        loss.backward()
        assert loss.device.type == NAME
        for leaf in (x, *layer.parameters()):
            assert leaf.grad is not None
            assert (leaf.grad.device.type, leaf.grad.dtype, leaf.grad.shape) == (NAME, dtype, leaf.shape)


def test_host_and_device_do_not_mix(device: torch.device) -> None:
    with FakeTensorMode():
        on_device, on_host = torch.empty(4, device=device), torch.empty(4)
        with pytest.raises(RuntimeError, match="device"):
            _ = on_device + on_host
        assert (on_device + on_host.to(device)).device.type == NAME
        assert on_device.cpu().device.type == "cpu"


def test_autocast_can_be_asked_about(device: torch.device) -> None:
    """transformers' rotary embeddings switch autocast off by the type of the device they are on."""
    with FakeTensorMode(), torch.autocast(device_type=device.type, enabled=False):
        assert torch.empty(4, device=device).dtype == torch.float32


def test_real_tensors_do_not_live_on_it(device: torch.device) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(4, device=device).sum()


@pytest.mark.parametrize("error", [AttributeError("gone"), RuntimeError("taken"), TypeError("changed")])
def test_a_torch_that_cannot_make_one_has_none(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(backend_registration, "_setup_privateuseone_for_python_backend", fail)
    assert python_accelerator.__wrapped__() is None


def test_nothing_is_registered_by_the_import() -> None:
    """A GPU of another maker may want the name; only who plans takes it."""
    code = (
        "import torch; import qlora_trainer.hardware.python_accelerator;"
        "assert torch._C._get_privateuse1_backend_name() == 'privateuseone'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
