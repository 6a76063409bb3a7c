"""What runs on this machine, and whether it gives the right results: devices, versions, operators, attention."""

import importlib.metadata
import os
import platform
import shutil
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from dnazen.layers.attention import select_attention
from dnazen_kernels.ngram_edges import NgramEdges
from dnazen_kernels.ngram_fusion import residual_layer_norm
from dnazen_kernels.ngram_masking import ngram_masking
from dnazen_kernels.ngram_matching import NgramTable, ngram_matching

PACKAGES = (
    "dnazen", "torch", "triton", "deepspeed", "transformers", "tokenizers", "accelerate", "numpy", "flash-attn",
    "flash-attn-4",
)  # fmt: skip


def examine() -> Iterator[tuple[str, str, bool]]:
    """What was looked at, what was found, and whether that is in order; one after the other, as each is known."""
    memory = psutil.virtual_memory().total / 2**30
    yield (
        "system",
        f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores, {memory:.0f} GiB",
        True,
    )
    for name in PACKAGES:
        yield name, _version(name), True
    if not torch.cuda.is_available():
        yield "GPU", "none that PyTorch can use; everything runs on the CPU", True
        compiler, headers = shutil.which("c++"), Path(sysconfig.get_path("include"), "Python.h").is_file()
        found = f"compiler {compiler or 'missing'}, Python's headers {'found' if headers else 'missing'}"
        yield "DeepSpeed", f"compiles a small piece of itself: {found}", compiler is not None and headers
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        name = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}"
        yield f"GPU {index}", f"{name}, CUDA {torch.version.cuda}", True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # base's heads; choosing checks each back-end against eager attention on small input
    attention = select_attention(None, device, dtype, num_heads=12, head_dim=64)
    for name, reason in attention.reasons.items():
        yield "attention", f"not {name}: {reason}", True
    yield "attention", f"{attention.name}, which agrees with eager attention", True
    for name, check in (("matching", _matching), ("masking", _masking), ("fusion", _fusion)):
        yield name, *_compare(check, device)


def conclude(faults: Sequence[str]) -> str:
    """What this machine can do, in a line; `faults` are the names of what is not in order."""
    if faults:
        return f"not ready: mend what is marked as not in order ({', '.join(dict.fromkeys(faults))})"
    if not torch.cuda.is_available():
        return "ready to use models and to train `tiny`, on the CPU; to train larger ones takes a GPU"
    names = [torch.cuda.get_device_properties(index).name for index in range(torch.cuda.device_count())]
    attention = select_attention(None, torch.device("cuda"), torch.bfloat16, num_heads=12, head_dim=64).name
    return f"ready to train and to use models on {len(names)} x {names[0]}, with {attention}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compare(operator: Callable[[torch.device, str], list[Tensor]], device: torch.device) -> tuple[str, bool]:
    """Run an operator's kernels and its reference on the same small input."""
    try:
        found = operator(device, "triton")
    except Exception as error:  # whatever stops a kernel is what the user must read
        return f"reference; no kernels: {error}", device.type == "cpu"
    expected = operator(torch.device("cpu"), "reference")
    # fp32 sums of up to 400 terms of order 1, in another order; integers must be equal
    good = all(torch.allclose(a.cpu(), b, rtol=1e-4, atol=1e-4) for a, b in zip(found, expected, strict=True))
    return f"kernels, which {'agree' if good else 'DO NOT agree'} with the reference", good


def _batch() -> tuple[Tensor, Tensor, NgramTable]:
    """Four sequences of 100 tokens, and 300 G-grams, many of which occur in them."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(5, 32, (400,), generator=generator)
    cu_seqlens = torch.arange(0, 401, 100, dtype=torch.int32)
    starts = torch.randint(0, 395, (300,), generator=generator).tolist()
    ngrams = sorted({tuple(input_ids[start : start + 2 + start % 4].tolist()) for start in starts})
    return input_ids, cu_seqlens, NgramTable.build(ngrams, range(1, len(ngrams) + 1), vocab_size=32)


def _matching(device: torch.device, impl: str) -> list[Tensor]:
    input_ids, cu_seqlens, table = _batch()
    moved = input_ids.to(device), cu_seqlens.to(device), table.to(device)
    matches = ngram_matching(*moved, capacity=(1200, 4000), impl=impl)
    return [matches.ngram_input_ids, matches.ngram_cu_seqlens, *matches.edges, matches.counts]


def _matches(device: torch.device) -> dict[str, Any]:
    """Arguments of `ngram_masking`."""
    input_ids, cu_seqlens, table = _batch()
    matches = ngram_matching(input_ids, cu_seqlens, table, impl="reference")
    return {
        "input_ids": input_ids.to(device),
        "ngram_input_ids": matches.ngram_input_ids.to(device),
        "ngram_cu_seqlens": matches.ngram_cu_seqlens.to(device),
        "edges": matches.edges.to(device),
    }


def _masking(device: torch.device, impl: str) -> list[Tensor]:
    random = torch.rand(400, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    maskable, ids = torch.ones(400, dtype=torch.bool, device=device), torch.arange(5, 32, device=device)
    arguments = {"mlm_probability": 0.15, "mask_token_id": 4, "maskable_ids": ids, "impl": impl}
    masked = ngram_masking(maskable=maskable, random=random, **_matches(device), **arguments)
    return [tensor for field in masked for tensor in (field if isinstance(field, NgramEdges) else [field])]


def _fusion(device: torch.device, impl: str) -> list[Tensor]:
    """The fused layer end, forward and backward."""
    matches = _matches(device)
    generator = torch.Generator().manual_seed(2)
    sizes = ((400, 64), (400, 64), (64,), (64,), (len(matches["ngram_input_ids"]), 64))
    inputs = [torch.randn(size, generator=generator).to(device).requires_grad_() for size in sizes]
    out = residual_layer_norm(*inputs[:4], 1e-12, inputs[4], matches["edges"], impl=impl)
    return [out.detach(), *torch.autograd.grad((out * out).sum() / 64, inputs)]
