"""`dnazen gue`."""

import argparse
import logging
from typing import Any

from dnazen import defaults
from dnazen.cli.shared import add_attention, add_precision, new_command, read_names


def add_command(commands: argparse._SubParsersAction) -> None:
    text = "fine-tune and test models on the benchmark GUE, and report; run again, it goes on"
    command = new_command(commands, "gue", text, run)
    text = "folder of GUE, with prom/prom_core_tata/train.csv and so on"
    command.add_argument("--data", required=True, metavar="DIR", help=text)
    text = "the models to compare: folders, or names on the Hugging Face hub; kmer-lr: a baseline that counts k-mers"
    command.add_argument("--model", nargs="+", required=True, dest="models", metavar="MODEL", help=text)
    text = "data sets by name, such as prom_core_tata,mouse/2 (all that are there)"
    command.add_argument("--tasks", type=read_names, metavar="NAME,...", help=text)
    text = "how often to fine-tune each model on each data set, with another seed each time (%(default)s)"
    command.add_argument("--seeds", type=int, default=defaults.GUE_SEEDS, metavar="N", help=text)
    text = "fine-tune each model once more with its G-grams hidden"
    command.add_argument("--no-ngrams", action="store_true", help=text)
    text = "for all data sets (%(default)s)"
    command.add_argument("--learning-rate", type=float, default=defaults.GUE_LEARNING_RATE, metavar="RATE", help=text)
    group = command.add_mutually_exclusive_group()
    group.add_argument("--epochs", type=float, metavar="N", help="of each data set (DNABERT-2's protocol)")
    group.add_argument("--max-steps", type=int, metavar="N", help="steps of each data set, in place of epochs")
    text = "fine-tunings at a time on each GPU (what fits it), or on the CPU (one for each core)"
    command.add_argument("--jobs-per-device", type=int, metavar="N", help=text)
    add_precision(command, "of the training (bf16 on a GPU, fp32 on a CPU)")
    add_attention(command)
    text = "folder to write report and results to; it may hold those of an earlier run, which goes on"
    command.add_argument("--output-dir", required=True, metavar="DIR", help=text)


def run(**parameters: Any) -> int:
    from dnazen.gue.launch import run_gue

    logging.getLogger("dnazen.gue").setLevel(logging.INFO)  # it takes hours, and says how far it is
    text, is_complete = run_gue(**parameters)
    print(text)
    return 0 if is_complete else 1
