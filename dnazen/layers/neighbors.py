"""The rows beside each row of a packed batch, within its sequence."""

import torch
from torch import Tensor


class Neighbors:
    """Which rows have a neighbor of their own sequence at each distance, up to `reach` on either side.

    Args:
        cu_seqlens: `[B + 1]`, where sequences begin and end.
        num_rows: T.
    """

    def __init__(self, cu_seqlens: Tensor, num_rows: int, reach: int) -> None:
        position = torch.arange(num_rows, device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens[1:-1], position, right=True)
        start, end = cu_seqlens[sequence], cu_seqlens[sequence + 1]
        self._is_inside = {}
        for distance in range(-reach, reach + 1):
            if distance:
                neighbor = position + distance
                self._is_inside[distance] = ((neighbor >= start) & (neighbor < end)).unsqueeze(1)

    def at(self, states: Tensor, distance: int) -> Tensor:
        """`states [T, D]`, finite, of the rows so far to the right; zero where the sequence has none."""
        # rolled, not gathered: the backward of a gather adds in no fixed order on a GPU
        return states.roll(-distance, 0) * self._is_inside[distance] if distance else states
