"""`dnazen explain`."""

import argparse
from typing import Any

from dnazen import defaults
from dnazen.cli.shared import add_model, add_output_dir, add_precision, add_sequences, new_command


def add_command(commands: argparse._SubParsersAction) -> None:
    text = (
        "write the G-grams that a model finds in sequences, and the attention that each gets (always eager attention)"
    )
    command = new_command(commands, "explain", text, run)
    add_model(command)
    add_sequences(command)
    text = "mark the G-grams that cover this motif (IUPAC codes, such as TATAWAW), and compare their attention"
    command.add_argument("--motif", metavar="CODES", help=text)
    add_precision(command, default=defaults.PRECISION)
    add_output_dir(command)


def run(**parameters: Any) -> None:
    from dnazen.inference.explain import explain, format_summary

    print(format_summary(explain(**parameters)))
