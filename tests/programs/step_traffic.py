"""Under torchrun, on one CPU process: bytes that DeepSpeed reads and writes for a parameter in a step, as JSON: of one
micro-batch, and of three.

From the gradient, as the backward leaves it, to the new weight in bf16; each operation's inputs and outputs, but not a
reduction over one process, which on a GPU is none.
"""

import json
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnazen.training.script import exit_process, leave_process_group
from tests.helpers.zero_engine import build_engine, take_norm_at_once

NUM_TENSORS, SIZE = 6, 100_000
FREE = {"allreduce_", "empty", "empty_like", "new_empty_strided"}  # and all that only views


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Bytes(TorchDispatchMode):
    """Adds up the bytes that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name, aliases = func.overloadpacket.__name__, [value.alias_info for value in func._schema.returns]
        if name in FREE or aliases and all(alias is not None and not alias.is_write for alias in aliases):
            return result
        read, written = tensors(args), tensors(result)
        if name == "copy_":  # what it writes to is not read
            read = read[1:]
        elif name.startswith("_fused_adamw"):  # which returns nothing: all but the gradient is written
            written = tensors((args[0], args[2:]))
        self.total += sum(leaf.nbytes for leaf in read + written)
        return result


def count(stage: int, bucket: int, accumulation: int) -> float:
    """Bytes a parameter, of the second step, the first that makes no states."""
    model = nn.ParameterList(torch.ones(SIZE) for _ in range(NUM_TENSORS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    engine = build_engine(model, optimizer, stage, accumulation=accumulation, reduce_bucket_size=bucket)
    take_norm_at_once(engine)
    for _ in range(2):
        with Bytes() as moved:
            for _ in range(accumulation):
                engine.backward(sum(parameter.sum() for parameter in model))
                engine.step()
    engine.destroy()
    parameters = [tensor.detach().requires_grad_() for tensor in model]
    with Bytes() as own:  # of the backward itself
        sum(parameter.sum() for parameter in parameters).backward()
    return (moved.total - accumulation * own.total) / (NUM_TENSORS * SIZE)


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    cases = {"ZeRO-1": (1, 10**6), "ZeRO-2": (2, 10**6), "ZeRO-2, large": (2, SIZE - 1)}
    counts = {name: [count(*case, accumulation) for accumulation in (1, 3)] for name, case in cases.items()}
    print(json.dumps(counts), flush=True)
    leave_process_group()
    exit_process(0)
