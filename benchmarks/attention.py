"""One back-end of attention at the sizes of a step of the base model: its time, and how far it is from fp32.

    python -m benchmarks.attention --attn-implementation NAME --output FILE [--small]

Writes JSON: for the tokens (65,536 in 300 sequences, with ALiBi) and the G-grams (3,000, at most 45 in each), the 20,
50 and 80 % quantiles of a layer's forward and backward, and of the set-up that all layers share, in ms; and the
largest error of context and gradients against `eager` in fp32, beside that of `eager` in the same type: a back-end may
err twice as much (the rule of FlashAttention's tests).
`--small` is for a machine without a GPU.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import run
from benchmarks.registry import Case
from dnazen.files import write_json
from dnazen.layers.attention import Attention, alibi_slopes, packed_attention, select_attention

NUM_HEADS, HEAD_DIM = 12, 64  # of base


class Shape(NamedTuple):
    """Rows in all, sequences, the longest one's rows at most, and whether scores fall with distance."""

    total: int
    num_sequences: int
    longest: int
    alibi: bool

    def lengths(self) -> np.ndarray:
        """Of the sequences: uneven, the same in every run; some may be empty."""
        generator = np.random.default_rng(0)
        weights = generator.exponential(size=self.num_sequences)
        lengths = np.minimum((weights / weights.sum() * self.total).astype(int), self.longest)
        while missing := self.total - int(lengths.sum()):
            room = np.flatnonzero(lengths < self.longest)
            lengths[generator.choice(room, min(missing, len(room)), replace=False)] += 1
        return lengths


# kernels are others for more than 256 sequences and for short ones
SHAPES = {"tokens": Shape(65_536, 300, 512, True), "G-grams": Shape(3_000, 300, 45, False)}
SMALL = {"tokens": Shape(300, 5, 128, True), "G-grams": Shape(20, 5, 9, False)}


def set_up(name: str, shape: Shape, device: torch.device) -> Callable[[], Attention]:
    """What a forward pass does once for all its layers."""
    lengths = shape.lengths()
    offsets = torch.from_numpy(np.concatenate([[0], lengths.cumsum()])).to(device, torch.int32)
    slopes = alibi_slopes(NUM_HEADS, device) if shape.alibi else None
    longest = int(lengths.max())
    return lambda: packed_attention(name, offsets, longest, shape.total, slopes)


def attend(attention: Attention, states: Tensor) -> Case:
    """A Case of one layer; `states` is query, key, value and the context's gradient, `[4, total, heads, head_dim]`."""
    *leaves, grad = (tensor.detach().clone().requires_grad_() for tensor in states)
    return Case(lambda: attention(*leaves)[0], leaves, grad.detach(), lambda output: output)


def results(name: str, shape: Shape, states: Tensor) -> Tensor:
    """Context and the three gradients, fp32."""
    case = attend(set_up(name, shape, states.device)(), states)
    context = case.run()
    return torch.stack([context.detach(), *torch.autograd.grad(context, case.leaves, case.grad)]).float()


def measure(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Errors and times of one back-end on one shape."""
    generator = torch.Generator(device).manual_seed(0)
    states = torch.randn(4, shape.total, NUM_HEADS, HEAD_DIM, generator=generator, device=device).to(dtype)
    exact = results("eager", shape, states.float())
    error, allowed = ((results(other, shape, states) - exact).abs().max().item() for other in (name, "eager"))
    del exact
    prepare = set_up(name, shape, device)
    case = attend(prepare(), states)
    times = {mode: run.measure_case(case, mode, device)[0] for mode in ("fwd", "bwd")}
    times["set-up"] = run.quantiles_ms(prepare, device, [])
    return {"error": error, "error_of_eager": allowed, "agrees": error <= 2 * allowed + 1e-5, "ms": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attn-implementation", required=True, metavar="NAME")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if args.small:
        run.CPU_SECONDS = 0.1
    name = select_attention(args.attn_implementation, device, dtype, NUM_HEADS, HEAD_DIM).name
    shapes = SMALL if args.small else SHAPES
    write_json(args.output, {what: measure(name, shape, device, dtype) for what, shape in shapes.items()})


if __name__ == "__main__":
    main()
