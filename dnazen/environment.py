"""What must be in the environment before torch is imported; imports nothing itself."""

import os


def grow_memory_segments() -> None:
    """Let CUDA's caching allocator grow its segments, unless the user has configured it.

    Each micro-batch has other sizes, so that segments of fixed size would be cached for ever more of them.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
