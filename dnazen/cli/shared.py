"""What several commands share: arguments, and the refusal of several processes.

The modules of commands import nothing heavy at their top, so that help comes at once; their `run` does.
"""

import argparse
import os
from collections.abc import Callable

from dnazen import defaults
from dnazen.files import InputError


def new_command(
    commands: argparse._SubParsersAction, name: str, text: str, run: Callable, description: str | None = None
) -> argparse.ArgumentParser:
    """A command that `run` carries out; `text` is its help, and its description if there is no longer one."""
    command = commands.add_parser(name, help=text, description=description or text)
    command.set_defaults(run=run)
    return command


def add_output_dir(command: argparse.ArgumentParser) -> None:
    text = "new folder to write; it must not exist yet, or be empty"
    command.add_argument("--output-dir", required=True, metavar="DIR", help=text)


def add_model(command: argparse.ArgumentParser) -> None:
    text = "the model: its folder, or its name on the Hugging Face hub (owner/name)"
    command.add_argument("--model", required=True, metavar="MODEL", help=text)


def add_corpus(command: argparse.ArgumentParser) -> None:
    command.add_argument("--corpus", required=True, metavar="DIR", help="folder that `dnazen corpus` wrote")


def add_ngrams(command: argparse.ArgumentParser) -> None:
    text = "folder that `dnazen ngrams extract` wrote, or an ngram.json"
    command.add_argument("--ngrams", required=True, metavar="PATH", help=text)


def add_sequences(command: argparse.ArgumentParser) -> None:
    """Input of the commands that read sequences of any length."""
    text = "the sequences: FASTA, or CSV with a column `sequence`; plain or compressed"
    command.add_argument("--input", required=True, metavar="FILE", help=text)
    text = "bases that the model reads at once; longer sequences are cut into windows of so many (%(default)s)"
    command.add_argument("--window", type=int, default=defaults.WINDOW_BASES, metavar="BASES", help=text)
    text = "bases from the start of a window to that of the next, at most (%(default)s)"
    command.add_argument("--stride", type=int, default=defaults.STRIDE_BASES, metavar="BASES", help=text)
    add_max_batch_tokens(command, defaults.MAX_BATCH_TOKENS)


def add_max_batch_tokens(command: argparse.ArgumentParser, default: int) -> None:
    text = "tokens of a batch: more take more memory; the result is the same but for rounding (%(default)s)"
    command.add_argument("--max-batch-tokens", type=int, default=default, metavar="N", help=text)


def add_precision(command: argparse.ArgumentParser, text: str = "of the model (%(default)s)", **default: str) -> None:
    command.add_argument("--precision", choices=defaults.PRECISIONS, help=text, **default)


def add_attention(command: argparse.ArgumentParser) -> None:
    text = "attention to compute with, such as sdpa; `dnazen doctor` lists which run here (the best that runs)"
    command.add_argument("--attn-implementation", metavar="NAME", help=text)


def read_names(text: str) -> list[str]:
    """The names in a list that is separated by commas."""
    return text.split(",")


def require_one_process(command: str, instead: str = "") -> None:
    """InputError under `torchrun` and the like: each process would do all the work, and one would write."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        found = f"{os.environ['WORLD_SIZE']} (WORLD_SIZE)"
        expected = "one process, without torchrun or deepspeed"
        raise InputError(f"dnazen {command}: expected {expected}{instead}, found {found}")
