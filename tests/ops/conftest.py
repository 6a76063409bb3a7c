"""Devices of the operators' tests: kernels run interpreted on the CPU, or compiled on a GPU if there is one."""

import os

import pytest
import torch

# Triton reads this when a kernel is defined, so it must stand before the first import of any triton_impl module.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """Where `impl="triton"` runs."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1, which is set where there is no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def poisoned_memory(monkeypatch) -> None:
    """Fresh memory holds NaN, or the smallest integer, so that an element no kernel wrote is seen."""

    def poison(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)

        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
