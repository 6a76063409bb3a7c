"""`torch.compile` for code whose input has other sizes in every batch."""

import functools
from collections.abc import Callable
from typing import Any

import torch

# Past the limit, 8 by default, a function without graph breaks raises. Sizes are dynamic, and yet there are versions
# for 0 rows, 1 and (FlexAttention) one tile, for training, no_grad and inference_mode, and for each layout of input.
RECOMPILE_LIMIT = 64


def compile_dynamic(function: Callable, **options: Any) -> Callable:
    """`function` compiled for sizes that vary, without graph breaks, in up to `RECOMPILE_LIMIT` versions.

    The limit is set for its calls alone, and in each call, for autograd's threads, which run checkpointed layers again,
    would not see one set elsewhere. torch 2.11 has no argument for it.
    """
    compiled = torch.compile(function, dynamic=True, fullgraph=True, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):  # made anew: threads must not share one
            return compiled(*args, **kwargs)

    return call
