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


def map_in_order(function: Callable[[Job], Any], jobs: Iterable[Job], num_workers: int) -> Iterator[tuple[Job, Any]]:
    """Yield (job, function(job)) for each job in turn, on `num_workers` forked processes; 1: in this one.

    The processes inherit `function` and all that it holds, memory maps included; jobs and results are pickled. At
    most `2 * num_workers` jobs are taken ahead of the one whose result is due. The processes end with this one, even
    when it is killed.
    """
    if num_workers == 1:
        for job in jobs:
            yield job, function(job)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(num_workers, context, _start, (function, os.getpid())) as pool:
        try:
            window = collections.deque()
            jobs = iter(jobs)
            while True:
                window.extend((job, pool.submit(_call, job)) for job in itertools.islice(jobs, 2 * num_workers - len(window)))
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


def _call(job: Any) -> Any:
    return _function(job)
