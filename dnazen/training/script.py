"""What the scripts that `deepspeed` starts have in common: arguments, errors, and how their processes end."""

import atexit
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from dnazen.environment import report_interrupt
from dnazen.files import InputError


def run_script(work: Callable[[], None]) -> int:
    """Run a script's work; the exit status is 1, with one line on stderr, for unusable input."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        work()
    except (InputError, OSError, FloatingPointError) as error:
        print(f"dnazen: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return report_interrupt()
    finally:
        leave_process_group()
    return 0


def parse_arguments(parser: HfArgumentParser, words: list[str] | None = None) -> tuple[Any, ...]:
    """The dataclasses of a command line (default: this process's).

    Raises:
        InputError: a dataclass refuses a value.
    """
    try:
        return parser.parse_args_into_dataclasses(words)
    except ValueError as error:  # an InputError is one too, and says the same again
        raise InputError(str(error)) from error


def refuse_flags(args: TrainingArguments, refused: dict[str, str]) -> None:
    """Raise InputError if one of the flags is not at its default; `refused` has the reason for each."""
    for name, reason in refused.items():
        if getattr(args, name) != args.__dataclass_fields__[name].default:
            raise InputError(f"--{name} {reason}")


def require_one_device(args: TrainingArguments) -> None:
    """Raise InputError if this process has several GPUs."""
    if args.n_gpu > 1:
        raise InputError(
            f"one process found {args.n_gpu} GPUs: start one process a GPU with `deepspeed` or "
            "`torchrun --nproc_per_node`, or choose one with CUDA_VISIBLE_DEVICES=0"
        )


def leave_process_group() -> None:
    """End communication between processes, and remove what DeepSpeed leaves behind."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # on a CPU DeepSpeed leaves 69 MB of shared memory behind for each process
    buffer = "deepspeed_allreduce_buffer_*_{MASTER_ADDR}_{MASTER_PORT}_{RANK}"
    if {"MASTER_ADDR", "MASTER_PORT", "RANK"} <= os.environ.keys():
        for path in Path("/dev/shm").glob(buffer.format_map(os.environ)):
            path.unlink(missing_ok=True)


def exit_process(status: int) -> NoReturn:
    """End this process, all work done, without tearing down the interpreter."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # native threads that ZeRO-3 leaves behind abort one in ten teardowns of the interpreter
    os._exit(status)
