"""Run the real entry point in real processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dnazen.environment import free_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "dnazen" / "pretrain.py"
PROGRAMS = ROOT / "tests" / "programs"
SET_BY_US = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTORCH_ALLOC_CONF", "OMP_WAIT_POLICY"}


def environment() -> dict[str, str]:
    """One thread per process, this interpreter's launchers first, nothing that a launcher or command had set here."""
    kept = {key: value for key, value in os.environ.items() if key not in SET_BY_US}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PATH": path}


def command(
    processes: int = 1, zero: int | None = None, launcher: str | None = None, script: Path = SCRIPT, **arguments: Any
) -> list[str]:
    """The command line: with DeepSpeed if a ZeRO stage is given.

    Several processes are `torchrun`'s, unless `launcher` is "deepspeed". One process needs no launcher: what they would
    tell it is in its environment, and each of theirs takes seconds to start.
    """
    port = str(free_port())
    if launcher == "deepspeed":
        line = ["deepspeed", "--num_gpus", str(processes), "--master_port", port, str(script)]
    elif processes > 1:
        line = ["torchrun", "--nproc_per_node", str(processes), "--master_port", port, str(script)]
    elif zero is not None:
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        line = ["env", *(f"{name}={value}" for name, value in alone.items()), sys.executable, str(script)]
    else:
        line = [sys.executable, str(script)]
    if zero is not None:
        line += ["--deepspeed", str(ROOT / "ds_configs" / f"zero{zero}.json")]
    return line + flags(**arguments)


def flags(**arguments: Any) -> list[str]:
    """Arguments as words of a command line."""
    words = []
    for name, value in arguments.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def run(expect: int | None = 0, **arguments: Any) -> subprocess.CompletedProcess:
    """Run to the end; fails with the output if the exit status is not `expect` (None: any but 0)."""
    line = command(**arguments)
    result = subprocess.run(
        line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    remove_shared_memory(line)
    good = result.returncode != 0 if expect is None else result.returncode == expect
    assert good, f"{' '.join(line)}: exit status {result.returncode}\n{result.stdout[-6000:]}"
    return result


def torchrun(script: Path, processes: int, *arguments: object, **variables: str) -> str:
    """Output of one of the tests' own scripts on so many processes, which may import the tests."""
    line = ["torchrun", "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    line += map(str, (script, *arguments))
    variables = {**environment(), "PYTHONPATH": str(ROOT), **variables}
    result = subprocess.run(line, env=variables, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def run_until(path: Path, **arguments: Any) -> None:
    """Start a run and kill -9 all its processes as soon as `path` exists."""
    line = command(**arguments)
    process = subprocess.Popen(
        line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, f"ended before {path} appeared:\n{process.stdout.read().decode()[-6000:]}"
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.002)
    kill_tree(process.pid)
    process.wait()
    process.stdout.close()
    remove_shared_memory(line)


def remove_shared_memory(line: list[str]) -> None:
    """Delete what a killed run left; each run has a port of its own, so that none would ever be reused."""
    ports = re.findall(r"(?:--master_port |MASTER_PORT=)(\d+)", " ".join(line))
    for path in (path for port in ports for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*")):
        path.unlink(missing_ok=True)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and its descendants (the launcher starts new sessions)."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in listing.splitlines()[1:]]
    victims = [pid]
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
