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


def let_idle_threads_sleep() -> None:
    """Let PyTorch's threads on a CPU sleep as soon as they have nothing to do, unless the user has set how they wait.

    OpenMP's own default is to spin for milliseconds. Beside other work that takes the processor from the very thread
    that is waited for: training then runs at a tenth of its speed.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


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
