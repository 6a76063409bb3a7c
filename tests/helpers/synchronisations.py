"""A stretch of code that must not wait for the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}


class ForbidSynchronisation(TorchDispatchMode):
    """Raises on operators whose result's shape or value the host must wait for; on a GPU, CUDA's own check helps."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.on_gpu = device.type == "cuda"

    def __enter__(self):
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        return super().__enter__()

    def __exit__(self, *error):
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = [index for index in indices if index is not None and index.dtype in (torch.bool, torch.uint8)]
        sizes_unknown = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITS or masks or sizes_unknown:
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))
