"""Speed of real training steps, loader to optimizer, and how much of the device's arithmetic they use."""

from dnazen.pretraining.bench.processes import bench
from dnazen.pretraining.bench.text import format_bench

__all__ = ["bench", "format_bench"]
