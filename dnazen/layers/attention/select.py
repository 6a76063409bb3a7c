"""Which back-end attention runs on: chosen once for a device and type, with the reason why each better one was not."""

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from dnazen.layers.attention.alibi import alibi_slopes
from dnazen.layers.attention.dense import Attention, attend_packed, eager_attention, sdpa_attention
from dnazen.layers.attention.flash import flash_attention_2, flash_attention_4
from dnazen.layers.attention.flex import packed_flex_attention

# the best first
BACKENDS = {
    "flash_attention_4": flash_attention_4,
    "flash_attention_2": flash_attention_2,
    "flex_attention": packed_flex_attention,
    "sdpa": sdpa_attention,
    "eager": eager_attention,
}
# What the check runs on: neighboring groups of sequences, together a batch. FlashAttention-4 compiles other kernels
# for more than 256 sequences, and for a longest one of at most 128, 192 or 256 rows (by architecture and head_dim), and
# FlexAttention for at most 128 rows in all; the batches are of each kind. Sequences are alone, empty, and whole tiles.
_PARITY_GROUPS: tuple[tuple[int, ...], ...] = (300,), tuple(i // 100 for i in range(300)), (45, 0, 17), (200, 1, 0, 128)
_PARITY_BATCHES = [slice(first, end) for first, end in ((0, 1), (2, 3), (3, 4), (0, 2), (1, 3), (1, 4))]


class Selection(NamedTuple):
    """The back-end, and for each better one why it was not taken."""

    name: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        return self.name + "".join(f"; not {name}: {reason}" for name, reason in self.reasons.items())


def packed_attention(
    name: str, cu_seqlens: Tensor, max_seqlen: int, total: int, slopes: Tensor | None = None
) -> Attention:
    """The attention of all layers of one encoder in one forward pass, on packed `[total, heads, head_dim]`.

    `name` is a key of `BACKENDS`; only "eager" returns the weights too. `cu_seqlens` is `[B + 1]` int32, and a sequence
    may be empty; with ALiBi's `slopes [heads]` fp32, `-slope * |i - j|` is added to the scores.

    Raises:
        ValueError, RuntimeError: `cu_seqlens` does not end at `total`. For "flex_attention" and the flash packages,
            where the host does not wait, that is an assertion on the device.
    """
    if total == 0 and name != "eager":
        return lambda query, key, value: (query + key + value, None)  # no row, but a (zero) gradient for all three
    if name not in ("eager", "sdpa"):  # these read all of it on the host, and say more
        torch._assert_async(cu_seqlens[-1] == total, f"cu_seqlens: expected to end at {total}, the number of rows")
    return BACKENDS[name](cu_seqlens, max_seqlen, total, slopes)


def select_attention(
    requested: str | None,
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    head_dim: int,
    training: bool = True,
) -> Selection:
    """The back-end to run: the one asked for, else the best that can train here and agrees with `eager`.

    Args:
        requested: a key of `BACKENDS`; None or "auto" for the best.
        device, dtype: of the states; under autocast, autocast's type.
        num_heads, head_dim: of the model.
        training: whether the one asked for needs a backward. What "auto" chooses does not depend on it.

    Raises:
        ValueError: the one asked for is unknown, cannot run here, or does not agree with `eager`; the message says why.
    """
    if requested in (None, "auto"):
        reasons: dict[str, str] = {}
        for name in BACKENDS:
            reason = _obstacle(name, device, dtype, num_heads, head_dim, True)
            if reason is None:
                return Selection(name, reasons)
            reasons[name] = reason
        raise RuntimeError(f"no attention runs on {device}: {reasons}")
    if requested not in BACKENDS:
        expected = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"attn_implementation: expected one of {expected}, found {requested!r}")
    if reason := _obstacle(requested, device, dtype, num_heads, head_dim, training):
        raise ValueError(f"attn_implementation: {requested} cannot run here: {reason}")
    return Selection(requested, {})


# by what `_obstacle` takes, what it returned: a choice is made in every forward pass, and the check takes a second
_OBSTACLES: dict[tuple, str | None] = {}


def _obstacle(
    name: str, device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int, training: bool
) -> str | None:
    """Why it cannot run, or None; what has passed with its backward is not checked again without."""
    device = torch.device("cpu") if device.type == "cpu" else device  # accelerate gives it an index
    with_backward, asked = ((name, device, dtype, num_heads, head_dim, kind) for kind in (True, training))
    if _OBSTACLES.get(with_backward, "not checked") is None:
        return None
    if asked not in _OBSTACLES:
        _OBSTACLES[asked] = _find_obstacle(*asked)
    return _OBSTACLES[asked]


def _find_obstacle(
    name: str, device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int, training: bool
) -> str | None:
    if name == "eager":
        return None
    if name == "flex_attention" and device.type != "cuda" and training:
        return f"it has no backward on a CPU, and this is {device}"
    if name.startswith("flash"):
        if device.type != "cuda":
            return f"it needs a CUDA device, and this is {device}"
        if reason := _flash_obstacle(name, torch.cuda.get_device_capability(device), dtype, head_dim):
            return reason
    try:
        return _disagreement(name, device, dtype, num_heads, head_dim, training)
    except Exception as error:  # whatever its compiler or launcher raises
        return f"its check failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _flash_obstacle(name: str, capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str | None:
    """What the packages' own documentation excludes, and whether the package is there."""
    found = "compute capability {}.{}".format(*capability)
    if name == "flash_attention_4":
        package, module, largest = "flash-attn-4", "flash_attn.cute.interface", 128
        if capability[0] not in (9, 10, 11):
            return (
                f"its backward with ALiBi needs Hopper or Blackwell (compute capability 9 to 11), and this is {found}"
            )
    else:
        package, module, largest = "flash-attn", "flash_attn.flash_attn_interface", 256
        if capability[0] < 8:
            return f"it needs Ampere or newer (compute capability 8), and this is {found}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bf16 or fp16, and this is {dtype}"
    if head_dim % 8 or head_dim > largest:
        return f"it needs a head_dim that is a multiple of 8 up to {largest}, and this is {head_dim}"
    try:
        importlib.import_module(module)
    except Exception as error:  # a package built for another torch or CUDA raises its own
        return f"package {package} cannot be imported: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


@torch.inference_mode(False)
def _disagreement(
    name: str, device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int, training: bool
) -> str | None:
    """How it differs from `eager` on random input, with ALiBi and without, or None if it does not.

    It may err twice as much as `eager` in the same type does (both against `eager` on fp64 input): the rule of
    FlashAttention's own tests. `eager` gets one group of sequences at a time, for it pads them.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, sum(lengths), num_heads, head_dim) for lengths in _PARITY_GROUPS]
    drawn = [torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for shape in shapes]

    def run(backend: str, batch: slice, slopes: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Context and, if training, the three gradients, `[1 or 4, total, heads, head_dim]` fp64."""
        lengths = [length for group in _PARITY_GROUPS[batch] for length in group]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
        *states, grad = (states.to(dtype).requires_grad_(training) for states in torch.cat(drawn[batch], dim=1))
        attention = packed_attention(backend, cu_seqlens, max(lengths), sum(lengths), slopes)
        # as both encoders call it: with ALiBi the three as one
        context, _ = attention(*states) if slopes is None else attend_packed(attention, torch.stack(states, dim=1))
        gradients = torch.autograd.grad(context, states, grad) if training else ()
        return torch.stack([context.detach(), *gradients]).double()

    with torch.autocast(device.type, enabled=False), torch.set_grad_enabled(training):
        for slopes in (alibi_slopes(num_heads, device), None):
            exact, same_type = (
                [run("eager", slice(group, group + 1), slopes, kind) for group in range(len(_PARITY_GROUPS))]
                for kind in (torch.float64, dtype)
            )
            for batch in _PARITY_BATCHES:
                found = run(name, batch, slopes, dtype)
                if not found.isfinite().all():
                    return "its output or gradient is not finite on small input"
                error, bound = (
                    (states - torch.cat(exact[batch], dim=1)).abs().max().item()
                    for states in (found, torch.cat(same_type[batch], dim=1))
                )
                bound = 2 * bound + 1e-5
                if error > bound:
                    return f"it differs from eager on small input by {error:.1e}, more than {bound:.1e}"
    return None
