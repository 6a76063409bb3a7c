"""Run the command in forked processes, which may be killed or work together."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

import torch

from dnazen.cli.main import main
from tests.helpers.launch import free_port


def run_forked(size: int, function: Callable[[int], int | None]) -> list[int]:
    """Call `function(rank)` in `size` processes that could form a group; their exit codes, -9 if killed."""
    port = str(free_port())

    def start(rank: int) -> None:
        torch.set_num_threads(1)  # the parent's threads do not survive a fork
        if size > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        sys.exit(function(rank))

    processes = [multiprocessing.get_context("fork").Process(target=start, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"one of {size} processes did not end")
    return [process.exitcode for process in processes]


def kill_at(name: str) -> None:
    """Kill -9 this process where it opens the file `name` to write it, or at "os.rename" where a folder is renamed.

    What was written last, before that file, is cut in half.
    """
    written = []

    def watch(event: str, details: tuple) -> None:
        if event == "open" and not isinstance(details[0], int) and set(details[1] or "") & set("wax+"):
            if os.path.basename(details[0]) == name:
                for path in written[-1:]:
                    os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(details[0])
        elif event == name == "os.rename" and os.path.isdir(details[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def run_command(size: int, *words: object, before: Callable[[int], None] = lambda rank: None) -> list[int]:
    """Run the command in `size` processes, each after `before(rank)`; their exit codes, -9 if killed."""

    def start(rank: int) -> int:
        before(rank)
        return main([str(word) for word in words])

    return run_forked(size, start)
