"""Compile FlashAttention-4's forward and backward for a Hopper GPU, through our back-end, on a machine without one.

The package compiles for the architecture that the environment names, and launches nothing on fake tensors. A PyTorch
for CPUs has no autograd of CUDA tensors, so forward and backward of the package's autograd function are called one
after the other. Prints how many kernels were compiled.
"""

import sys
import types

import torch
from flash_attn.cute import interface
from torch._subclasses.fake_tensor import FakeTensorMode

from dnazen.layers.attention.flash import flash_attention_4


def _forward_and_backward(*args):
    context = types.SimpleNamespace(set_materialize_grads=lambda _: None)
    context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
    output = interface.FlashAttnVarlenFunc.forward(context, *args)
    query, key, value, *_ = interface.FlashAttnVarlenFunc.backward(context, torch.empty_like(output[0]), None)
    assert query.shape == key.shape == value.shape == output[0].shape
    return output


def main(num_heads: int, head_dim: int) -> None:
    interface.FlashAttnVarlenFunc.apply = _forward_and_backward
    shape = 3000, num_heads, head_dim
    with FakeTensorMode(), torch.no_grad():
        states = [torch.empty(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)]
        for num_sequences, max_seqlen in ((160, 512), (300, 45)):
            cu_seqlens = torch.empty(num_sequences + 1, dtype=torch.int32, device="cuda")
            for slopes in (torch.empty(num_heads, device="cuda"), None):
                context, _ = flash_attention_4(cu_seqlens, max_seqlen, shape[0], slopes)(*states)
                assert context.shape == shape
    for kernel in ("_flash_attn_fwd", "_flash_attn_bwd"):
        print(kernel, len(getattr(interface, kernel).compile_cache.cache))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
