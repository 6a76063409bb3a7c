"""`dnazen evaluate`."""

import argparse
from typing import Any

from dnazen import defaults
from dnazen.cli.shared import add_attention, add_model, add_output_dir, add_precision, new_command


def add_command(commands: argparse._SubParsersAction) -> None:
    text = "measure how well a model predicts hidden tokens, beside what counting predicts"
    command = new_command(commands, "evaluate", text, run)
    add_model(command)
    text = "folder that `dnazen corpus` wrote, which the model was trained on; its training part is what is counted"
    command.add_argument("--corpus", required=True, metavar="DIR", help=text)
    text = "genomes to evaluate on: FASTA files, plain or compressed (what the corpus holds out)"
    command.add_argument("--fasta", nargs="+", metavar="FILE", help=text)
    add_precision(command, default=defaults.PRECISION)
    add_attention(command)
    add_output_dir(command)


def run(**parameters: Any) -> None:
    from dnazen.inference.evaluate import evaluate

    evaluation, text = evaluate(**parameters)
    print(evaluation.describe(text))
