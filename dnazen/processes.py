"""Work on several processes, with results in the order of the jobs."""

import collections
import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import numpy as np

from dnazen.files import Interrupted

Job = TypeVar("Job")
_PDEATHSIG = 1  # of Linux's prctl


def cut_blocks(offsets: np.ndarray, max_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield the first sequence and the end of blocks of whole sequences with at most `max_tokens` tokens.

    A longer sequence is a block by itself. Sequences of 3, 4 and 9 tokens (`offsets` 0, 3, 7, 16) with `max_tokens` 8
    give (0, 2) and (2, 3).

    Args:
        offsets: int64 `[n + 1]`: where each of n sequences starts.
    """
    first = 0
    while first < len(offsets) - 1:
        end = max(int(np.searchsorted(offsets, offsets[first] + max_tokens, side="right")) - 1, first + 1)
        yield first, end
        first = end


@contextlib.contextmanager
def fork_pool(function: Callable[[Any], Any], num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of forked processes: `pool.submit(call_forked, argument)` calls `function(argument)` in one of them.

    The processes inherit `function` and all that it holds, memory maps included; arguments and results are pickled.
    They die with the thread that submits first, and so with this process, even when it is killed.

    Raises:
        Interrupted: one of them was killed.
    """
    context = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(num_workers, context, _start, (function, os.getpid())) as pool:
            try:
                yield pool
            except BrokenProcessPool:
                if sys.version_info < (3, 11, 5):  # it would write to workers that are gone, for ever (CPython 94777)
                    pool._call_queue._reader.close()
                raise
            finally:
                pool.shutdown(cancel_futures=True)
    except BrokenProcessPool as error:
        text = "a worker was killed, perhaps for want of memory: use a lower --num-workers, and start again"
        raise Interrupted(text) from error


def call_forked(argument: Any) -> Any:
    """Call the function of this process' pool."""
    return _function(argument)


def map_in_order(function: Callable[[Job], Any], jobs: Iterable[Job], num_workers: int) -> Iterator[tuple[Job, Any]]:
    """Yield (job, function(job)) for each job in turn, on `num_workers` forked processes; 1: in this one.

    At most `2 * num_workers` jobs are taken ahead of the one whose result is due.

    Raises:
        Interrupted: a worker was killed.
    """
    if num_workers == 1:
        for job in jobs:
            yield job, function(job)
        return
    jobs = iter(jobs)
    with fork_pool(function, num_workers) as pool:
        window = collections.deque()
        while True:
            ahead = itertools.islice(jobs, 2 * num_workers - len(window))
            window.extend((job, pool.submit(call_forked, job)) for job in ahead)
            if not window:
                return
            job, future = window.popleft()
            yield job, future.result()


def _start(function: Callable, parent: int) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process, and the parent is the one to say so
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    die_with(parent)


def die_with(parent: int) -> None:
    """Have the system kill this process when the thread that started it ends, as it does when `parent` is killed.

    For Linux, in a process just forked; as `preexec_fn` of `subprocess.Popen` too.
    """
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)
