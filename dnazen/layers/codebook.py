"""A codebook that follows the states it encodes by moving averages, the same on every process (VQDNA, stage 1)."""

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dnazen_kernels.code_lookup import code_lookup, code_sums


class Codebook(nn.Module):
    """K codes of D numbers, each the mean of the states that were nearest to it of late.

    Buffers hold them, for no optimizer moves them: `start` places them by k-means on a first batch, and after that
    `update` moves them once a step. `forward` changes nothing, so that gradient checkpointing may call it twice. Both
    see the states of all processes of a group together, and what they draw at random follows from `seed` and the number
    of updates alone: every process has the same codes, and a run that goes on from a state dict goes on bit for bit.

    All is kept in fp32, whatever type the module is cast to.

    Secondary notes of VQDNA name the moving average. Its constants are the field's (van den Oord et al. 2017, appendix
    A.1), and so is giving a dead code a new place (Jukebox, Dhariwal et al. 2020, section 3.1).

    Args:
        num_codes: K.
        size: D.
        decay: of the averages, a step.
        epsilon: added to each count before codes are divided by it, as Laplace does.
        min_count: a code whose average count is lower is dead, and begins anew as a state of the batch.
        seed: of these choices.
    """

    codes: Tensor  # [K, D]
    counts: Tensor  # [K], of states of a step, averaged
    sums: Tensor  # [K, D], of these states, averaged
    num_updates: Tensor  # int64

    def __init__(
        self, num_codes: int, size: int, *, decay: float = 0.99, epsilon: float = 1e-5, min_count: float = 2.0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.decay, self.epsilon, self.min_count, self.seed = decay, epsilon, min_count, seed
        for name, shape in (("codes", (num_codes, size)), ("counts", (num_codes,)), ("sums", (num_codes, size))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The codes nearest to `states [N, D]`, N at least 1, none of them padding.

        Returns:
            the codes `[N, D]` in the type of `states`, to which their gradient goes as it is (straight through); which
            they are, `[N]` int64; and the commitment loss, fp32, the square of the difference, meant over rows and
            components, whose gradient pulls states to their codes.
        """
        indices = code_lookup(states, self.codes)
        nearest = self.codes[indices]
        # so written its value is the code's, to the bit
        output = nearest.to(states.dtype) + (states - states.detach())
        return output, indices, F.mse_loss(states.float(), nearest)

    @torch.no_grad()
    def start(self, states: Tensor, num_iterations: int = 10) -> None:
        """Place the codes by k-means on `states [N, D]` of all processes, from states drawn at even distances.

        A process may have none of them. `num_iterations` is at least 1.
        """
        self.codes.copy_(self._draw(states))
        for _ in range(num_iterations):
            counts, sums = self._sum(states, code_lookup(states, self.codes))
            self.codes.copy_(torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], self.codes))
        self.counts.copy_(counts)
        self.sums.copy_(self.codes * counts[:, None])

    @torch.no_grad()
    def update(self, states: Tensor, indices: Tensor) -> None:
        """Move the codes toward the `states [N, D]` of a step whose nearest they were, as `forward` said."""
        counts, sums = self._sum(states, indices)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.num_updates += 1
        total = self.counts.sum()
        smoothed = (self.counts + self.epsilon) / (total + len(self.counts) * self.epsilon) * total
        drawn = self._draw(states)
        is_dead = self.counts < self.min_count
        self.codes.copy_(torch.where(is_dead[:, None], drawn, self.sums / smoothed[:, None]))
        self.sums.copy_(torch.where(is_dead[:, None], drawn * self.min_count, self.sums))
        self.counts.clamp_(min=self.min_count)

    def _sum(self, states: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """How many states of all processes have each code, and their sums, both fp32."""
        counts, sums = code_sums(states, indices, len(self.codes))
        counts = _over_processes(counts)  # exact
        return counts.float(), _over_processes(sums)

    def _draw(self, states: Tensor) -> Tensor:
        """K rows of the states of all processes, `[K, D]` fp32: one of each K-th part, in the processes' order."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        lengths = torch.zeros(size, dtype=torch.int64, device=states.device)
        lengths[rank] = len(states)
        ends = _over_processes(lengths).cumsum(0)
        # num_updates is read by the host; on a GPU it waits for it, once a step
        uniforms = np.random.default_rng([self.seed, int(self.num_updates)]).random(len(self.codes))
        places = torch.from_numpy((np.arange(len(uniforms)) + uniforms) / len(uniforms)).to(states.device)
        row = (places * ends[-1]).long() - (ends[rank] - len(states))
        is_here = ((row >= 0) & (row < len(states)))[:, None]
        own = states[row.clamp(0, max(len(states) - 1, 0))].float() if len(states) else self.codes
        return _over_processes(torch.where(is_here, own, 0.0))

    def _apply(self, fn, recurse=True):
        """Moves to devices reach the buffers; casts do not."""

        def keep_type(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_type, recurse)


def _over_processes(tensor: Tensor) -> Tensor:
    """Summed over the processes of the group, in place; as it is where there is none."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
