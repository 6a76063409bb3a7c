"""`dnazen embed`."""

import argparse
from typing import Any

from dnazen import defaults
from dnazen.cli.shared import add_attention, add_model, add_precision, add_sequences, new_command


def add_command(commands: argparse._SubParsersAction) -> None:
    text = "write the vectors of sequences, of their tokens or of their bases"
    command = new_command(commands, "embed", text, run)
    add_model(command)
    add_sequences(command)
    text = "new file to write; its name ends in .npy, .parquet or .h5"
    command.add_argument("--output", required=True, metavar="FILE", help=text)
    text = "a vector for each sequence (mean or max over its tokens; cls), each token or each base (%(default)s)"
    poolings = ("mean", "max", "cls", "token", "base")
    command.add_argument("--pooling", choices=poolings, default=defaults.POOLING, help=text)
    text = "take the states after so many layers; 0: the embeddings (the last layer's)"
    command.add_argument("--layer", type=int, metavar="N", help=text)
    text = "average with the vector of the reverse complement"
    command.add_argument("--both-strands", action="store_true", help=text)
    add_precision(command, default=defaults.PRECISION)
    add_attention(command)


def run(**parameters: Any) -> None:
    from dnazen.inference.embed import embed

    counts = embed(**parameters)
    print(f"records     {counts['records']:,}, {counts['empty_records']:,} of them without A, C, G, T")
    print(f"bases       {counts['bases']:,} of A, C, G, T in {counts['windows']:,} windows")
    print(f"left out    {counts['other_letters']:,} other letters")
    print(f"vectors     {counts['rows']:,} of {counts['dimensions']:,} numbers")
