"""What this process compiles while it trains."""

import importlib.util
import sys
from typing import Any

import torch


class Compilations:
    """Counts what this process compiles, or loads compiled: Dynamo's graphs, Triton's kernels (those that a graph
    brings belong to the graph), FlashAttention-4's kernels.
    """

    def __init__(self) -> None:
        self._triton_kernels = 0
        if importlib.util.find_spec("triton"):
            import triton

            triton.knobs.runtime.jit_post_compile_hook = self._count_kernel

    def _count_kernel(self, **_: Any) -> None:
        self._triton_kernels += 1

    def total(self) -> int:
        """So far."""
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return graphs + self._triton_kernels + sum(len(cache.cache) for cache in self._flash_attention_4_caches())

    def counts(self, attention: str) -> bool:
        """Whether kernels of that back-end are among the total: FlashAttention-4's are only where its caches are found,
        by the name that they have in 4.0.0b36.
        """
        return attention != "flash_attention_4" or len(self._flash_attention_4_caches()) > 0

    def _flash_attention_4_caches(self) -> list[Any]:
        interface = vars(sys.modules.get("flash_attn.cute.interface", object)).values()
        caches = (getattr(item, "compile_cache", None) for item in interface)
        # functions may share one
        return list({id(cache): cache for cache in caches if hasattr(cache, "cache")}.values())
