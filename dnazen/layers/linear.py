"""A linear layer at the head of a sub-layer, whose input goes on as the residual: one pass for both gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _LinearAndInput(torch.autograd.Function):
    """`F.linear(input, weight, bias)`, and `input`; its two gradients are summed by the matrix product that makes one.

    PyTorch would write the product's gradient and then add the other to it, in a pass of its own.
    """

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight)  # the parameter itself, not a view of it: ZeRO-3 takes its memory away
        return F.linear(input, weight, bias), input

    @staticmethod
    def backward(ctx, grad_output: Tensor | None, grad_input: Tensor | None) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        if grad_output is None:
            return grad_input, None, None
        rows, grad_weight, grad_bias = grad_output.flatten(0, -2), None, None
        if ctx.needs_input_grad[0]:
            product = rows @ weight if grad_input is None else torch.addmm(grad_input.flatten(0, -2), rows, weight)
            grad_input = product.view(input.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = rows.T @ input.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_input, grad_weight, grad_bias


class SharedInputLinear(nn.Linear):
    """`nn.Linear` that can hand its input on; by `project` alone, so that what wraps linear layers sees a plain one."""

    def forward(self, input: Tensor, hands_input_on: bool = False) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        if not hands_input_on:
            return super().forward(input)
        if torch.is_autocast_enabled(input.device.type):  # product and residual are of two types
            return super().forward(input), input
        return _LinearAndInput.apply(input, self.weight, self.bias)


def project(linear: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """`linear(hidden_states)`, and `hidden_states` for whoever reads them next.

    Where `linear` is a `SharedInputLinear`, and not an adapter around one, the matrix product that makes the gradient
    by the first adds to that by the second.
    """
    if isinstance(linear, SharedInputLinear):
        return linear(hidden_states, hands_input_on=True)
    return linear(hidden_states), hidden_states
