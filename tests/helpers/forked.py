"""Run the command in a forked process, which may be killed: without the seconds that a new interpreter takes."""

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import torch

from dnazen.cli.main import main


def heed_interrupts() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so do the processes that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start_forked(function: Callable[[], int | None]) -> BaseProcess:
    """A process that calls `function` and exits with what it returns."""

    def start() -> None:
        heed_interrupts()
        torch.set_num_threads(1)  # the parent's threads do not survive a fork
        sys.exit(function())

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    return process


def run_forked(function: Callable[[], int | None]) -> int:
    """The exit code of a process that calls `function`, -9 if killed."""
    process = start_forked(function)
    process.join(120)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError("the process did not end")
    return process.exitcode


def run_command(*words: object, before: Callable[[], None] = lambda: None) -> int:
    """Run the command in a process of its own, after `before()`; its exit code, -9 if killed."""

    def run() -> int:
        before()
        return main([str(word) for word in words])

    return run_forked(run)


def kill_at(name: str, kind: int = signal.SIGKILL, tears: bool = True) -> None:
    """Kill -9 this process where it opens the file `name` to write it, or at "os.rename" where a folder is renamed.

    `kind` may be another signal. What was opened last, before that file, is cut in half if `tears`.
    """
    written = []

    def watch(event: str, details: tuple) -> None:
        if event == "open" and not isinstance(details[0], int) and set(details[1] or "") & set("wax+"):
            if os.path.basename(details[0]) == name:
                for path in written[-1:] if tears else ():
                    os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), kind)
            written.append(details[0])
        elif event == name == "os.rename" and os.path.isdir(details[0]):
            os.kill(os.getpid(), kind)

    sys.addaudithook(watch)


def limit_files(size: int, is_fatal: bool) -> None:
    """Let no file of this process grow beyond `size` bytes; what fits is written.

    What does not fit is an error, as of a full disk, or, if fatal, kills the process on the spot by SIGXFSZ.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if is_fatal else signal.SIG_IGN)
