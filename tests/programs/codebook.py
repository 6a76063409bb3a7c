"""A codebook that is started, updated three times and saved, on processes of a group: each has its part of the rows."""

import sys

import torch
import torch.distributed as dist

from dnazen.layers.codebook import Codebook


def rows(step: int) -> torch.Tensor:
    """Whole numbers: their sums are exact, so that it does not matter who adds which."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(-3, 4, (101, 6), generator=generator).float()


def run(parts: slice) -> dict[str, torch.Tensor]:
    """What is left after a start and three updates; every other code dies."""
    codebook = Codebook(16, 6, decay=0.5, min_count=4.0, seed=3)
    codebook.start(rows(0)[parts], num_iterations=3)
    for step in (1, 2, 3):
        states = rows(step)[parts]
        codebook.update(states, codebook(states)[1])
    return codebook.state_dict()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(run(slice(0, 37) if rank == 0 else slice(37, None)), f"{sys.argv[1]}/{rank}.pt")
    dist.destroy_process_group()
