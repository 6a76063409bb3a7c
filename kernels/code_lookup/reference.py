"""Nearest codes, and the sums of each code's rows, in plain PyTorch."""

import torch

_SCORES_AT_ONCE = 2**22  # of a row and a code, so that many rows do not fill the memory


def code_lookup_chunked(states: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """`argmin_k |codes[k]|^2 - 2 <states[n], codes[k]>` in fp32, which is that of the squared distance; the first of
    several.

    `states` is `[N, D]`, `codes` `[K, D]`; returns `[N]` int64.
    """
    codes = codes.float()
    norms = codes.square().sum(1)
    with torch.autocast(states.device.type, enabled=False):
        return torch.cat(
            [
                torch.addmm(norms, rows.float(), codes.T, alpha=-2).argmin(1)
                for rows in states.split(max(_SCORES_AT_ONCE // len(codes), 1))
            ]
        )


def code_sums_index_add(
    states: torch.Tensor, indices: torch.Tensor, num_codes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many rows have each code, `[K]` int64, and the sums of these rows, `[K, D]` fp32, one row at a time."""
    counts = torch.zeros(num_codes, dtype=torch.int64, device=states.device)
    sums = torch.zeros(num_codes, states.shape[1], dtype=torch.float32, device=states.device)
    return counts.index_add_(0, indices, torch.ones_like(indices)), sums.index_add_(0, indices, states.float())
