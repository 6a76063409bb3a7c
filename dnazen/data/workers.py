"""Work on several processes, with results in the order of the jobs."""

import collections
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Job = TypeVar("Job")


def fork_pool(function: Callable[[Any], Any], num_workers: int) -> ProcessPoolExecutor:
    """A pool of forked processes to which `call_forked` can be submitted.

    The processes inherit `function` and all that it holds, memory maps included; arguments and results are pickled.
    They end with this process, even when it is killed.
    """
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("fork"), _start, (function, os.getpid()))


def call_forked(argument: Any) -> Any:
    """Call the function of this process' pool."""
    return _function(argument)


def map_in_order(function: Callable[[Job], Any], jobs: Iterable[Job], num_workers: int) -> Iterator[tuple[Job, Any]]:
    """Yield (job, function(job)) for each job in turn, on `num_workers` forked processes; 1: in this one.

    At most `2 * num_workers` jobs are taken ahead of the one whose result is due.
    """
    if num_workers == 1:
        for job in jobs:
            yield job, function(job)
        return
    jobs = iter(jobs)
    with fork_pool(function, num_workers) as pool:
        window = collections.deque()
        try:
            while True:
                ahead = itertools.islice(jobs, 2 * num_workers - len(window))
                window.extend((job, pool.submit(call_forked, job)) for job in ahead)
                if not window:
                    return
                job, future = window.popleft()
                yield job, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start(function: Callable, parent: int) -> None:
    global _function
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
