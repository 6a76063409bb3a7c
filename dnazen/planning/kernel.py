"""What a GPU is given to do: kernels by what they move and compute, and the parts of a step that they make up."""

from typing import NamedTuple

from dnazen.planning.devices import Prices, Rate


class Kernel(NamedTuple):
    """Something launched once."""

    num_bytes: float  # read and written, each operand once
    flops: float = 0.0  # by the formula of what it computes
    engine: str = ""  # "matmul", or "forward" or "backward" of attention: the rate of its FLOPs
    size: float = 0.0  # that the rate depends on: the summed dimension; rows of a sequence
    filled: float = 0.0  # FLOPs in all where tiles are filled up; 0: `flops`
    draws: float = 0.0  # blocks of four words from the random generator

    def seconds(self, prices: Prices) -> float:
        """Its arithmetic, its traffic or its random numbers, whichever takes longest; at least the floor."""
        computing = 0.0
        if self.engine:
            rate: Rate = getattr(prices, self.engine)
            computing = rate.seconds(self.filled or self.flops, self.size)
        return max(computing, self.num_bytes / prices.bandwidth, self.draws / prices.philox, prices.floor)


class Part(NamedTuple):
    """A part of the step, and how many times the step has it."""

    name: str
    times: int
    forward: list[Kernel]
    backward: list[Kernel]

    @property
    def kernels(self) -> list[Kernel]:
        return self.forward + self.backward

    @property
    def launches(self) -> int:
        return self.times * len(self.kernels)

    def total(self, field: str) -> float:
        """The sum of a field of its kernels, over all times."""
        return self.times * sum(getattr(kernel, field) for kernel in self.kernels)

    def seconds(self, prices: Prices) -> float:
        return self.times * sum(kernel.seconds(prices) for kernel in self.kernels)
