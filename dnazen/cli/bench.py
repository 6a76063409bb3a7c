"""`dnazen bench`."""

import argparse
from typing import Any

from dnazen import defaults
from dnazen.cli.shared import add_attention, add_corpus, add_output_dir, add_precision, new_command


def add_command(commands: argparse._SubParsersAction) -> None:
    command = new_command(commands, "bench", "measure how fast this machine trains", run)
    add_corpus(command)
    command.add_argument("--ngrams", required=True, metavar="DIR", help="folder that `dnazen ngrams extract` wrote")
    text = "size of the model, whose weights are random: tiny, base, large, xlarge, or a config.json (%(default)s)"
    command.add_argument("--model", default=defaults.MODEL_SIZE, metavar="SIZE", help=text)
    text = "measure these operators too, and compare; reference: the padded, dense path as published"
    command.add_argument("--impl", nargs="+", choices=("reference", "triton"), help=text)
    text = "how long to measure each, after a warm-up (%(default)s)"
    command.add_argument("--seconds", type=float, default=defaults.BENCH_SECONDS, metavar="S", help=text)
    text = "tokens of a micro-batch (that of pretraining, by the size of the model)"
    command.add_argument("--max-batch-tokens", type=int, metavar="N", help=text)
    add_precision(command, "of the training (bf16, as in pretraining)")
    text = "train under DeepSpeed: zero1, zero2, zero3, or a JSON file (without DeepSpeed)"
    command.add_argument("--deepspeed", metavar="CONFIG", help=text)
    text = "compile the layers, but not those of the reference"
    command.add_argument("--torch-compile", action="store_true", help=text)
    add_attention(command)
    text = "profile some further steps: which kernels take longest, and when a GPU is idle"
    command.add_argument("--profile", action="store_true", help=text)
    add_output_dir(command)


def run(corpus: str, ngrams: str, output_dir: str, **parameters: Any) -> None:
    from dnazen.pretraining.bench import bench, format_bench

    print(format_bench(bench(corpus, ngrams, output_dir, **parameters)))
