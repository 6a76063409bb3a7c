"""`dnazen corpus`."""

import argparse
from pathlib import Path
from typing import Any

from dnazen import defaults
from dnazen.cli.shared import add_output_dir, new_command, read_names, require_one_process
from dnazen.files import InputError


def add_command(commands: argparse._SubParsersAction) -> None:
    command = new_command(commands, "corpus", "clean genomes, cut them into sequences and tokenize them", run)
    group = command.add_mutually_exclusive_group(required=True)
    text = "FASTA files, plain or compressed; - for standard input"
    group.add_argument("--fasta", nargs="+", metavar="FILE", help=text)
    group.add_argument("--fasta-list", metavar="FILE", help="text file with the path of a FASTA file on each line")
    text = "folder that `dnazen tokenizer` wrote, or another with a tokenizer.json"
    command.add_argument("--tokenizer", required=True, metavar="DIR", help=text)
    text = "tokens of a sequence, at most (%(default)s)"
    command.add_argument("--max-tokens", type=int, default=defaults.MAX_TOKENS, metavar="N", help=text)
    text = "bases of a piece, or auto: as many as fill its tokens (4 for each of --max-tokens)"
    command.add_argument("--piece-length", type=read_piece_length, metavar="N|auto", help=text)
    text = "drop sequences of fewer bases (%(default)s)"
    command.add_argument("--min-length", type=int, default=defaults.MIN_LENGTH, metavar="BASES", help=text)
    text = "add the reverse complement of every sequence"
    command.add_argument("--reverse-complement", action="store_true", help=text)
    text = "drop sequences that came before, on either strand"
    command.add_argument("--dedup", action="store_true", help=text)
    group = command.add_mutually_exclusive_group()
    text = "share of the sequences to hold out for validation (%(default)s)"
    default = defaults.VALIDATION_FRACTION
    group.add_argument("--validation-fraction", type=float, default=default, metavar="SHARE", help=text)
    text = "hold out these FASTA records, whole, in place of a share"
    group.add_argument("--validation-records", type=read_names, metavar="NAME,...", help=text)
    text = "CSV files with a column `sequence`, such as test sets: count their sequences that the corpus contains"
    command.add_argument("--check-against", nargs="+", default=[], metavar="CSV", help=text)
    text = "processes; they do not change the result (one for each core)"
    command.add_argument("--num-workers", type=int, metavar="N", help=text)
    add_output_dir(command)


def run(fasta: list[str] | None, fasta_list: str | None, tokenizer: str, output_dir: str, **parameters: Any) -> None:
    require_one_process("corpus")
    paths = fasta or read_list(fasta_list)
    from dnazen.data.corpus import build_corpus, summarize
    from dnazen.data.tokenizer import load_tokenizer

    print(summarize(build_corpus(paths, load_tokenizer(tokenizer), output_dir, **parameters)))


def read_piece_length(text: str) -> int | str:
    """A number of bases, or `auto`."""
    return text if text == "auto" else int(text)


def read_list(path: str) -> list[str]:
    """The paths in a text file, one a line; relative ones are relative to the working directory."""
    paths = [line.strip() for line in Path(path).read_text("utf-8-sig", "surrogateescape").splitlines() if line.strip()]
    if not paths:
        raise InputError(f"{path}: expected the path of a FASTA file on each line, found none")
    return paths
