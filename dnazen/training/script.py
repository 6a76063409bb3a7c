"""What the scripts that `deepspeed` starts have in common: arguments, errors, and how their processes end."""

import atexit
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import transformers
from transformers import HfArgumentParser

from dnazen.environment import report_interrupt
from dnazen.files import InputError

if TYPE_CHECKING:  # PyTorch takes seconds to import, and a refused command line does without
    from transformers import TrainingArguments


def run_script(work: Callable[[], None]) -> int:
    """Run a script's work; the exit status is 1, with one line on stderr, for unusable input."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # DeepSpeed says it in each process as it is imported; what a run runs on, the run says itself
    logging.getLogger("DeepSpeed").addFilter(lambda record: not record.getMessage().startswith("Setting accelerator"))
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


def parse_arguments(parser: HfArgumentParser, words: list[str] | None = None, **options: Any) -> tuple[Any, ...]:
    """The dataclasses of a command line (default: this process's); `options` are those of the parser.

    Raises:
        InputError: a dataclass refuses a value.
    """
    try:
        return parser.parse_args_into_dataclasses(words, **options)
    except ValueError as error:  # an InputError is one too, and says the same again
        raise InputError(str(error)) from error


def flag(name: str) -> str:
    """How an argument is written on the command line: `--learning-rate` for `learning_rate`."""
    return "--" + name.replace("_", "-")


def refuse_flags(args: Any, refused: dict[str, str], dataclass: type | None = None) -> None:
    """Raise InputError if one of the flags is not at its default; `refused` has the reason for each.

    `args` is a dataclass, or has the attributes of `dataclass`.
    """
    fields = (dataclass or args).__dataclass_fields__
    for name, reason in refused.items():
        if getattr(args, name) != fields[name].default:
            raise InputError(f"{flag(name)} {reason}")


def require_reporters(names: str | list[str] | None) -> None:
    """Raise InputError if a value of `--report-to` is unknown, or its package is not installed."""
    from transformers.integrations import integration_utils

    known = {"all", "none", *integration_utils.INTEGRATION_TO_CALLBACK}
    for name in [names] if isinstance(names, str) else names or []:
        if name not in known:
            raise InputError(f"--report-to: expected one of {', '.join(sorted(known))}, found {name!r}")
        is_available = getattr(integration_utils, f"is_{name}_available", None)
        if is_available is not None and not is_available():
            package = {"tensorboard": "tensorboardX"}.get(name, name)
            raise InputError(f"--report-to {name} needs a package that is not installed: pip install {package}")


def require_one_device(args: "TrainingArguments") -> None:
    """Raise InputError if this process has several GPUs."""
    if args.n_gpu > 1:
        raise InputError(
            f"one process found {args.n_gpu} GPUs: start one process a GPU with `deepspeed` or "
            "`torchrun --nproc-per-node`, or choose one with CUDA_VISIBLE_DEVICES=0"
        )


def quieten(is_main_process: bool) -> None:
    """Keep from the terminal what a user cannot act on; errors, and what the main process says of ours, stay."""
    if not is_main_process:
        logging.getLogger("dnazen").setLevel(logging.ERROR)  # one process says it
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # of reading and writing files; training has its own


def leave_process_group() -> None:
    """End communication between processes, and remove what DeepSpeed leaves behind."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
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
