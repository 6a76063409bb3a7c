"""Linear layers: quick in bf16 on every CPU, and with a residual's gradient added by the matrix product."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# else PyTorch multiplies bf16 matrices in a plain loop, some ten times as slowly as those of fp32
_CPU_MULTIPLIES_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
# A function in Python costs the host some 0.1 ms; on fewer elements the pass that it saves is not worth them.
MIN_ELEMENTS = 2**24


class Linear(nn.Linear):
    """PyTorch's; where a CPU cannot multiply in bf16, it multiplies in fp32 and rounds the result.

    That is what bf16 is elsewhere too: sums in fp32, rounded once. So is the backward's.
    """

    def forward(self, input: Tensor) -> Tensor:
        return multiply(input, self.weight, self.bias)


def multiply(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, as `Linear` computes it."""
    if not _is_bf16_without_products(input):
        return F.linear(input, weight, bias)
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.float()
        return F.linear(input.float(), weight.float(), bias).bfloat16()


def _is_bf16_without_products(input: Tensor) -> bool:
    """Whether PyTorch would multiply this input in bf16 on a CPU that cannot."""
    if _CPU_MULTIPLIES_BF16 or not input.is_cpu:
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
    return dtype == torch.bfloat16


class _LinearAndInput(torch.autograd.Function):
    """`F.linear(input, weight, bias)`, and `input`, the residual; the product that makes one gradient adds the other.

    PyTorch would add them in a pass of its own, and `torch.addmm` on a GPU, up to torch 2.13, copies what it adds to.
    So the product is added in place, to the residual's gradient, which must be nobody else's by then. It is what the
    backward of the sub-layer's LayerNorm made; that shares it with the way back through the sub-layer at most, and all
    of that way lies before the gradient by the first output.
    """

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight)  # the parameter, not a view of it, which would keep ZeRO-3's memory
        return F.linear(input, weight, bias), input

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor | None, grad_input: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return grad_input, None, None
        input, weight = ctx.saved_tensors
        rows, grad_weight, grad_bias = grad_output.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            product = rows @ weight if grad_input is None else grad_input.flatten(0, -2).addmm_(rows, weight)
            grad_input = product.view(input.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = rows.T @ input.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_input, grad_weight, grad_bias


class SharedInputLinear(Linear):
    """A linear layer that can hand its input on, to `project` alone: what wraps linear layers sees a plain one."""

    def forward(  # type: ignore[override]
        self, input: Tensor, hands_input_on: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        if not hands_input_on:
            return super().forward(input)
        # the compiler finds product and sum by itself; under autocast they are of two types
        is_plain = torch.compiler.is_compiling() or input.numel() < MIN_ELEMENTS or _is_bf16_without_products(input)
        device_type = input.device.type
        if is_plain or torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            return super().forward(input), input
        return _LinearAndInput.apply(input, self.weight, self.bias)


def project(linear: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """`linear(hidden_states)`, and `hidden_states` for the residual, to be used once.

    Where `linear` is a `SharedInputLinear`, and not an adapter around one, the matrix product that makes the gradient
    by the first adds to that by the second.
    """
    if isinstance(linear, SharedInputLinear):
        return linear(hidden_states, hands_input_on=True)
    return linear(hidden_states), hidden_states
