"""Linear layers that are quick in bf16 on every CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# else PyTorch multiplies bf16 matrices in a plain loop, some ten times as slowly as those of fp32
_CPU_MULTIPLIES_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Linear(nn.Linear):
    """PyTorch's; where a CPU cannot multiply in bf16, it multiplies in fp32 and rounds the result.

    That is what bf16 is elsewhere too: sums in fp32, rounded once. So is the backward's.
    """

    def forward(self, input: Tensor) -> Tensor:
        if _CPU_MULTIPLIES_BF16 or not input.is_cpu or _product_dtype(input) != torch.bfloat16:
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias).bfloat16()


def _product_dtype(input: Tensor) -> torch.dtype:
    """In which PyTorch would multiply a tensor on a CPU."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
