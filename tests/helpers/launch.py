"""Run the real entry point in real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dnazen.environment import free_port
from tests.helpers.warm import WarmProgram

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "dnazen" / "pretrain.py"
PROGRAMS = ROOT / "tests" / "programs"
SET_BY_US = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTORCH_ALLOC_CONF", "OMP_WAIT_POLICY"}


def environment() -> dict[str, str]:
    """One thread per process, this interpreter's launchers first, nothing that a launcher or command had set here."""
    kept = {key: value for key, value in os.environ.items() if key not in SET_BY_US}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PATH": path}


def command(launcher: str, processes: int, port: int, words: Sequence[object]) -> list[object]:
    """The command line that starts a script with its arguments by "python", "torchrun" or "deepspeed"."""
    lines = {
        "python": [sys.executable],
        "torchrun": ["torchrun", "--nproc_per_node", processes, "--master_port", port],
        "deepspeed": ["deepspeed", "--num_gpus", processes, "--master_port", port],
    }
    return [*lines[launcher], *words]


def rank_environments(processes: int, port: int, own: Mapping[str, str] | None = None) -> list[dict[str, str]]:
    """What each of so many processes finds in its environment, when a launcher starts it in its `own`."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    ranks = map(str, range(processes))
    return [{**(own or environment()), **meeting, "RANK": rank, "LOCAL_RANK": rank} for rank in ranks]


def flags(**arguments: Any) -> list[str]:
    """Arguments as words of a command line."""
    words = []
    for name, value in arguments.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


@contextmanager
def killed_at_the_end(program: WarmProgram | subprocess.Popen) -> Iterator[None]:
    """What is left of a program at the end of the block, and all that it started, is killed."""
    try:
        yield
    finally:
        if program.poll() is None:
            kill_trees(getattr(program, "pids", None) or [program.pid])
            program.wait(60)


def start(line: Sequence[object], output: Path, folder: Path | None = None) -> subprocess.Popen:
    """Start a command, its output in a file."""
    words = [str(word) for word in line]
    with output.open("w") as file:
        return subprocess.Popen(words, cwd=folder, env=environment(), stdout=file, stderr=subprocess.STDOUT)


@contextmanager
def started(
    output: Path, processes: int = 1, zero: int | None = None, launcher: str | None = None, script: Path = SCRIPT,
    **arguments: Any,
) -> Iterator[WarmProgram | subprocess.Popen]:  # fmt: skip
    """A run, its output in a file; killed, if it is still there at the end of the block.

    Args:
        processes, zero: how many, and the stage of ZeRO; None is no DeepSpeed.
        launcher: what starts it, as a user would (see `command`); None is a warm start.
        arguments: flags of the script.
    """
    words = [script, *([] if zero is None else ["--deepspeed", ROOT / "ds_configs" / f"zero{zero}.json"])]
    words += flags(**arguments)
    port = free_port()
    if launcher is None:
        is_plain = processes == 1 and zero is None
        ranks = [environment()] if is_plain else rank_environments(processes, port)
        program = WarmProgram(words, ranks, output)
    else:
        program = start(command(launcher, processes, port, words), output)
    with killed_at_the_end(program):
        yield program
    # a killed run leaves it behind, and none would reuse it, for each has a port of its own
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        path.unlink(missing_ok=True)


def run(expect: int | None = 0, **arguments: Any) -> subprocess.CompletedProcess:
    """Run to the end; fails with the output if the exit status is not `expect` (None: any but 0)."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.txt"
        with started(output, **arguments) as program:
            status = program.wait(600)
        text = output.read_text()
    good = status != 0 if expect is None else status == expect
    assert good, f"{arguments}: exit status {status}\n{text[-6000:]}"
    return subprocess.CompletedProcess(arguments, status, text)


def run_until(path: Path, output: Path, **arguments: Any) -> None:
    """Start a run and kill -9 all its processes as soon as `path` exists."""
    with started(output, **arguments) as program:
        deadline = time.monotonic() + 300
        while not path.exists():
            assert program.poll() is None, f"ended before {path} appeared:\n{output.read_text()[-6000:]}"
            assert time.monotonic() < deadline, f"{path} never appeared"
            time.sleep(0.002)


def run_program(script: Path, processes: int, *arguments: object, **variables: str) -> str:
    """Output of one of the tests' own scripts on so many processes of a group."""
    ranks = [{**rank, **variables} for rank in rank_environments(processes, free_port())]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.txt"
        program = WarmProgram([script, *arguments], ranks, output)
        with killed_at_the_end(program):
            status = program.wait(600)
        text = output.read_text()
    assert status == 0, text[-4000:]
    return text


def kill_trees(pids: list[int]) -> None:
    """SIGKILL processes and their descendants (a launcher starts new sessions)."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in listing.splitlines()[1:]]
    victims = list(pids)
    for victim in victims:
        victims += [child for child, parent in parents if parent == victim]
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            pass


def log_history(checkpoint: Path) -> list[dict[str, Any]]:
    """A checkpoint's log without what depends on the clock."""
    entries = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    clocked = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{key: value for key, value in entry.items() if key not in clocked} for entry in entries]


def steps(checkpoint: Path, *names: str) -> list[tuple[float, ...]]:
    """The named values of each training log entry, in order."""
    return [tuple(entry[name] for name in names) for entry in log_history(checkpoint) if names[0] in entry]


def copy_checkpoint(checkpoint: Path, output_dir: Path) -> None:
    """Leave `output_dir` as a run that was ended after this checkpoint would have."""
    shutil.copytree(checkpoint, output_dir / checkpoint.name)
