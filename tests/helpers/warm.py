"""Programs in processes of their own, forked from one that has imported what takes seconds.

Each has its own arguments, environment, folder, output, exit status and signals, as if it had been started; only the
imports are spared. What depends on those is tested with real starts: the launchers, Ctrl-C, an installed package, the
main job.
"""

import atexit
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

_server = multiprocessing.get_context("forkserver")
_IMPORTED = """
    deepspeed deepspeed.runtime.zero.stage3 deepspeed.runtime.zero.muon.muon_optimizer peft sklearn.metrics
    matplotlib.backends.backend_agg matplotlib.pyplot
    dnazen.pretraining.run dnazen.finetuning.run dnazen.gue.launch dnazen.inference.embed
""".split()
# as it is imported DeepSpeed looks at the environment for the accelerator, which some tests hide
_server.set_forkserver_preload([] if torch.cuda.is_available() else _IMPORTED)


class WarmProgram:
    """A program on one process, or on several as `torchrun` starts it: the first that fails ends the others.

    Args:
        words: a script's path and its arguments, or `dnazen` and a command's, or `-m`, a module and its.
        environments: all variables of each process.
        output: a file that takes what they print.
        folder: where they run.
    """

    def __init__(
        self, words: Sequence[object], environments: Sequence[Mapping[str, str]], output: Path, folder: Path = Path()
    ) -> None:
        self._processes = []
        for variables in environments:
            arguments = [*map(str, words)], dict(variables), str(folder.resolve()), str(output)
            process = _server.Process(target=_become, args=arguments)
            with _as_environment(variables):  # the server's own, if this is the first
                process.start()
            self._processes.append(process)
        self.pids = [process.pid for process in self._processes]

    def poll(self) -> int | None:
        """The exit status of the first that failed, 0 if all ended well, None while they run."""
        statuses = [process.exitcode for process in self._processes]
        failed = next((status for status in statuses if status), None)
        if failed is None:
            return None if None in statuses else 0
        for process in self._processes:
            process.terminate()
            process.join(10)
            process.kill()
            process.join()
        return failed

    def wait(self, timeout: float) -> int:
        """Wait for the end; its status."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a program", timeout)
            multiprocessing.connection.wait([process.sentinel for process in self._processes], timeout=0.05)
        return status


@contextmanager
def _as_environment(variables: Mapping[str, str]) -> Iterator[None]:
    kept = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _become(words: list[str], variables: dict[str, str], folder: str, output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    if "TORCH_LOGS" in variables:
        torch._logging._internal._init_logs()  # which PyTorch does as it is imported
    words = ["-m", "dnazen.cli.main", *words[1:]] if words[0] == "dnazen" else words
    sys.argv = words[1:] if words[0] == "-m" else words
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
