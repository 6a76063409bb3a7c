"""ALiBi: a bias on attention scores that falls linearly with distance (Press et al. 2022)."""

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache  # a copy to the device in every forward pass would make the host wait for it
@torch.inference_mode(False)  # else, made in inference, they could not be saved for a later backward
def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """ALiBi's slopes, `[num_heads]` fp32 (Press et al. 2022, section 3, and their rule for other head counts).

    For n = 2^k heads the geometric sequence that starts at 2^(-8/n) with that ratio; for any other n the slopes of the
    power of two below n, then every second slope of the power of two above it. The tensor is shared: do not change it.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    exponents = [8 * (head + 1) / power for head in range(power)]
    exponents += [4 * (head + 1) / power for head in range(0, 2 * (num_heads - power), 2)]
    return torch.tensor([2.0**-exponent for exponent in exponents], dtype=torch.float32, device=device)


def alibi_bias(slopes: Tensor, max_seqlen: int) -> Tensor:
    """Bidirectional ALiBi, `-slope_h * |i - j|`: `[num_heads, max_seqlen, max_seqlen]` fp32."""
    position = torch.arange(max_seqlen, device=slopes.device, dtype=torch.float32)
    return slopes[:, None, None] * -(position[:, None] - position[None, :]).abs()
