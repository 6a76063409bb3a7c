"""`dnazen plan`."""

import argparse
from typing import Any

from dnazen import defaults
from dnazen.cli.shared import add_attention, new_command


def add_command(commands: argparse._SubParsersAction) -> None:
    text = "say what a pretraining will take, before a machine is paid for: hours, memory, disk"
    command = new_command(commands, "plan", text, run)
    group = command.add_mutually_exclusive_group(required=True)
    group.add_argument("--bases", type=float, metavar="N", help="bases of the corpus, such as 35e9")
    text = "hours of training, instead: which size is worth them, and how much it will read"
    group.add_argument("--hours", type=float, metavar="H", help=text)
    text = "size of the model, with --bases: tiny, base, large, xlarge, or a config.json (%(default)s)"
    command.add_argument("--model", default=defaults.MODEL_SIZE, metavar="SIZE", help=text)
    text = "GPUs of a machine, such as 8xH100; H100, H200, H800 and A100 are known"
    command.add_argument("--gpus", required=True, metavar="NxNAME", help=text)
    command.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (%(default)s)")
    text = "zero1, zero2 or zero3 (%(default)s)"
    command.add_argument("--deepspeed", default="zero2", metavar="STAGE", help=text)
    text = "tokens of a micro-batch on each GPU (that of pretraining, by the size of the model)"
    command.add_argument("--max-batch-tokens", type=int, metavar="N", help=text)
    text = "micro-batches of a step on each GPU (%(default)s)"
    command.add_argument("--gradient-accumulation-steps", type=int, default=1, metavar="N", help=text)
    command.add_argument("--gradient-checkpointing", action="store_true", help="compute each layer twice, keep less")
    text = "how often the corpus is read, as in pretraining (%(default)s)"
    command.add_argument("--num-train-epochs", type=float, default=3.0, metavar="N", help=text)
    add_attention(command)
    text = "CPU cores that corpus and G-grams are made on (%(default)s)"
    command.add_argument("--cores", type=int, default=16, metavar="N", help=text)
    text = "bench.json of `dnazen bench` on such a GPU, to correct the prediction by"
    command.add_argument("--bench", metavar="FILE", help=text)


def run(
    bases: float | None, hours: float | None, model: str, max_batch_tokens: int | None, num_train_epochs: float,
    cores: int, bench: str | None, attn_implementation: str | None, gradient_accumulation_steps: int,
    gradient_checkpointing: bool, **machine: Any,
) -> None:  # fmt: skip
    from dnazen.planning.plan import Calibration, calibrate, choose_size, make_plan, make_setting, settings_by_size
    from dnazen.planning.text import format_plan, format_sizes

    given = {
        **machine, "attention": attn_implementation, "accumulation": gradient_accumulation_steps,
        "checkpointing": gradient_checkpointing,
    }  # fmt: skip
    calibration = Calibration() if bench is None else calibrate(bench)
    if hours is not None:
        print(format_sizes(*choose_size(settings_by_size(**given), calibration, hours), hours, calibration))
        return
    setting = make_setting(model, max_batch_tokens=max_batch_tokens, **given)
    print(format_plan(make_plan(setting, calibration, bases, num_train_epochs, cores)))
