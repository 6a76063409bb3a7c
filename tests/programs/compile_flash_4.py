"""Compile FlashAttention-4's forward and backward for a Hopper GPU, through our back-end, on a machine without one.

The package compiles for the architecture that the environment names, and launches nothing on fake tensors. A PyTorch
for CPUs has no autograd of CUDA tensors, so forward and backward of the autograd functions, the package's and ours, are
called one after the other. Prints how many kernels were compiled.
"""

import sys
import types

import torch
from flash_attn.cute import interface
from torch._subclasses.fake_tensor import FakeTensorMode

from dnazen.layers.attention import attend_packed, flash


def _call_both_ways(function: type[torch.autograd.Function]) -> None:
    def apply(*args):
        context = types.SimpleNamespace(set_materialize_grads=lambda _: None)
        context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
        output = function.forward(context, *args)
        outputs = output if isinstance(output, tuple) else (output,)
        gradients = function.backward(context, torch.empty_like(outputs[0]), *[None] * (len(outputs) - 1))
        for argument, gradient in zip(args, gradients, strict=True):
            assert gradient is None or gradient.shape == argument.shape
        return output

    function.apply = apply


def main(num_heads: int, head_dim: int) -> None:
    _call_both_ways(interface.FlashAttnVarlenFunc)
    _call_both_ways(flash._PackedFlashAttention4)
    shape = 3000, num_heads, head_dim
    with FakeTensorMode(), torch.no_grad():
        qkv = torch.empty(3000, 3, num_heads, head_dim, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        states = [torch.empty(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)]
        for num_sequences, max_seqlen in ((160, 512), (300, 45)):
            cu_seqlens = torch.empty(num_sequences + 1, dtype=torch.int32, device="cuda")
            for slopes in (torch.empty(num_heads, device="cuda"), None):
                attention = flash.flash_attention_4(cu_seqlens, max_seqlen, shape[0], slopes)
                context, _ = attention(*states) if slopes is None else attend_packed(attention, qkv)
                assert context.shape == shape
    for kernel in ("_flash_attn_fwd", "_flash_attn_bwd"):
        print(kernel, len(getattr(interface, kernel).compile_cache.cache))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
