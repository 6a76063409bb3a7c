"""ALiBi for FlashAttention-4, in CuTe: imported only where that package runs.

The package calls both functions with vectors of scores (already scaled) and of indices within a sequence.
"""

import cutlass
from cutlass import cute
from cutlass._mlir.dialects import math as mlir_math


@cute.jit
def alibi(scores, batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    """`scores - slope * |q_idx - kv_idx|`, with the slope of the head from `aux_tensors[0]`, `[heads]` fp32."""
    head = cute.make_rmem_tensor(1, cutlass.Int32)
    head.store(head_idx)
    slope = cute.make_rmem_tensor(1, cutlass.Float32)
    slope[0] = aux_tensors[0][head[0]]
    difference = q_idx - kv_idx
    distance = cute.TensorSSA(mlir_math.absi(difference), difference.shape, difference.dtype)
    return scores - slope.load() * distance.to(cutlass.Float32)


@cute.jit
def alibi_backward(grad, scores, batch_idx, head_idx, q_idx, kv_idx, seqlen_info, aux_tensors):
    """The derivative by the score is 1."""
    return grad
