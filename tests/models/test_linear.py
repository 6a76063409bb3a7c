"""Linear layers in bf16, on CPUs that multiply it and on those that do not."""

import pytest
import torch
from torch import nn

from dnazen.layers import linear
from dnazen.layers.linear import Linear


@pytest.fixture(params=[False, True], ids=["without bf16", "with bf16"])
def multiplies_bf16(request, monkeypatch) -> bool:
    monkeypatch.setattr(linear, "_CPU_MULTIPLIES_BF16", request.param)
    return request.param


def _run(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients by input, weight and bias."""
    x = x.clone().requires_grad_()
    output = layer(x)
    output.backward(grad.to(output.dtype))
    return [output.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("by_autocast", [False, True], ids=["weights in bf16", "autocast"])
@pytest.mark.parametrize("bias", [True, False])
def test_bf16_is_the_exact_product_rounded(multiplies_bf16, bias, by_autocast):
    torch.manual_seed(0)
    layer, x, grad = Linear(24, 40, bias=bias).bfloat16(), torch.randn(2, 19, 24).bfloat16(), torch.randn(2, 19, 40)
    grad = grad.bfloat16()
    exact = nn.Linear(24, 40, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    expected = _run(exact, x.double(), grad.double())
    dtype = torch.bfloat16
    if by_autocast:
        layer, x, dtype = layer.float(), x.float(), torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=by_autocast):
        found = _run(layer, x, grad)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] + [dtype] * (len(found) - 1)
    # half a unit in the last of bf16's 8 bits; the sums before, of numbers of order 1, are in fp32
    torch.testing.assert_close([tensor.double() for tensor in found], expected, rtol=2**-8, atol=2e-5)


def test_fp32_is_pytorchs_bit_for_bit(multiplies_bf16):
    torch.manual_seed(0)
    layer, x, grad = Linear(24, 40), torch.randn(19, 24), torch.randn(19, 40)
    plain = nn.Linear(24, 40)
    plain.load_state_dict(layer.state_dict())
    for found, expected in zip(_run(layer, x, grad), _run(plain, x, grad), strict=True):
        assert torch.equal(found, expected)
