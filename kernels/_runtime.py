"""What all operators share: the choice of implementation, and the check of a tensor."""

import importlib.util
import os

import torch

INTEGERS = (torch.int32, torch.int64)
IMPLEMENTATIONS = ("auto", "triton", "reference")
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # without importing it


def resolve_impl(impl: str, device: torch.device) -> str:
    """What to run for tensors on `device`: "triton" or "reference".

    "auto" is "triton" on a CUDA device where triton is installed, else "reference".

    Raises:
        ValueError: unknown `impl`.
        RuntimeError: "triton" was asked for by name and cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")
    if impl == "auto":
        return "triton" if _HAS_TRITON and device.type == "cuda" else "reference"
    if impl == "triton" and not _HAS_TRITON:
        raise RuntimeError("impl='triton' needs the package triton, which is not installed")
    if impl == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"impl='triton' needs CUDA tensors, or TRITON_INTERPRET=1 to interpret, got {device.type}")
    return impl


def check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Check one tensor of an operator's input, without a device synchronisation.

    Raises:
        TypeError: its dtype is none of `dtypes`.
        ValueError: its shape is not `shape`, or it is on another device.
    """
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the others, got {tensor.device}")


def check_states(name: str, tensor: torch.Tensor, *shape: int | str) -> None:
    """Check that a tensor is floating point and of that shape; a size that is only a word may be any.

    Raises:
        TypeError, ValueError: as `check_tensor`.
    """
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.dim() != len(shape) or any(size not in (found, str(size)) for size, found in zip(shape, tensor.shape)):
        raise ValueError(f"{name} must have shape [{', '.join(map(str, shape))}], got {list(tensor.shape)}")
