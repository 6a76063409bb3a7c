"""What must hold before torch is imported, which takes seconds; imports nothing heavy itself."""

import os
import socket
import sys


def grow_memory_segments() -> None:
    """Let CUDA's caching allocator grow its segments, unless the user has configured it.

    Each micro-batch has other sizes, so that segments of fixed size would be cached for ever more of them.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def free_port() -> int:
    """A port of this machine for the processes of a run to meet at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def stand_alone() -> None:
    """Set what a launcher sets for the only process of a run: DeepSpeed wants to be told that it is alone."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def report_interrupt() -> int:
    """Say in one line that Ctrl-C ended this process; returns its exit status, as shells have it."""
    print("dnazen: interrupted", file=sys.stderr)
    return 130
