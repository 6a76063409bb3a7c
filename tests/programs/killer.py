"""Run the entry point in this process and die by SIGKILL in the middle of writing a file of a checkpoint.

Arguments: `--kill-at FILE --kill-step N`, then those of pretrain.py. The first half of FILE is written, the rest
is not. FILE `rename` means: all is written, and the folder is about to get its name.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import torch

import dnazen.pretraining.checkpoint as checkpoint_module

SCRIPT = Path(__file__).resolve().parents[2] / "dnazen" / "pretrain.py"
arguments = sys.argv[1:]
kill_at, kill_step = (arguments.pop(arguments.index(flag) + 1) for flag in ("--kill-at", "--kill-step"))
for flag in ("--kill-at", "--kill-step"):
    arguments.remove(flag)


def dying(write, find_path):
    """`write`, but fatal halfway through the chosen file."""

    def wrapped(*args, **kwargs):
        result = write(*args, **kwargs)
        path = Path(find_path(*args, **kwargs))
        if path.name == kill_at and f".checkpoint-{kill_step}.tmp" in path.parts:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def dying_rename(temporary: Path, final: Path) -> None:
    if kill_at == "rename" and final.name == f"checkpoint-{kill_step}":
        os.kill(os.getpid(), signal.SIGKILL)
    publish(temporary, final)


torch.save = dying(torch.save, lambda value, path, *args, **kwargs: path)
checkpoint_module.write_json = dying(checkpoint_module.write_json, lambda path, value: path)
publish, checkpoint_module.publish_folder = checkpoint_module.publish_folder, dying_rename
sys.argv = [str(SCRIPT), *arguments]
runpy.run_path(str(SCRIPT), run_name="__main__")
