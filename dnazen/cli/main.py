"""The `dnazen` command: from FASTA files to a trained model, and what it is used for."""

import argparse
import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dnazen import __version__
from dnazen.cli import (
    bench,
    corpus,
    doctor,
    embed,
    evaluate,
    explain,
    export,
    gue,
    ngrams,
    plan,
    predict,
    tokenizer,
    training,
    variants,
)
from dnazen.environment import let_idle_threads_sleep, report_interrupt
from dnazen.files import InputError, require_new_directory, require_new_file

# in the order of their use
_COMMANDS = (
    plan, tokenizer, corpus, ngrams, training, evaluate, predict, embed, explain, variants, export, gue, bench, doctor,
)  # fmt: skip
_EPILOG = "`dnazen COMMAND --help` says what a command takes; defaults stand in brackets."
# arguments that are files or folders to read, never a model's name on the hub
_READ = ("corpus", "counts", "data", "fasta", "fasta_list", "input", "motifs", "ngrams", "vcf")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 1, with one line on stderr, when the input or the disk is at fault.

    130 after Ctrl-C. `dnazen doctor` also returns 1 when something that it looks at is not in order.
    """
    args = vars(parse_arguments(sys.argv[1:] if argv is None else argv))
    let_idle_threads_sleep()
    run, output = args.pop("run"), args.get("output_dir", args.get("output"))
    logging.basicConfig(format="dnazen: %(levelname)s: %(message)s", stream=sys.stderr)
    start = time.perf_counter()
    try:
        _check_paths(args, may_exist=run is gue.run)
        status = run(**args) or 0
    except InputError as error:
        print(f"dnazen: error: {_name_flags(str(error), args)}", file=sys.stderr)
        return 1
    except OSError as error:
        place = f"{output}: " if error.filename is None else ""  # a full disk names no file
        print(f"dnazen: error: {place}{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return report_interrupt()
    if output is not None:
        print(f"written to  {output} in {time.perf_counter() - start:.1f} s")
    return status


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command as `run`, and its arguments; `flags` are those that a training script is to read."""
    words = list(words)
    if words[0:1] == ["ngrams"] and words[1:2] and words[1].startswith("--") and words[1] != "--help":
        words.insert(1, "extract")  # `dnazen ngrams --corpus ...` is short for it
    text = "DNA language models over BPE tokens and G-grams."
    parser = argparse.ArgumentParser(prog="dnazen", description=text, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"dnazen {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for module in _COMMANDS:
        module.add_command(commands)
    args, flags = parser.parse_known_args(words)
    if vars(args).pop("takes_flags", False):
        args.flags = flags
    elif flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return args


def _check_paths(args: dict[str, Any], may_exist: bool) -> None:
    """InputError for a path that is not there, or an output that is: at once, before what takes seconds to import."""
    for name in _READ:
        value = args.get(name) or []
        for path in [value] if isinstance(value, str) else value:
            if path != "-" and not Path(path).exists():
                raise InputError(f"{path}: no such file or folder, given as --{name.replace('_', '-')}")
    if "output_dir" in args and not may_exist:
        require_new_directory(Path(args["output_dir"]))
    if "output" in args:
        require_new_file(Path(args["output"]))


def _name_flags(message: str, args: dict[str, Any]) -> str:
    """The message of a function about its parameters, `min_len and max_len: ...`, with flags in place of them."""
    match = re.match(r"[a-z_]+((, | and )[a-z_]+)*(?=:)", message)
    names = re.split(", | and ", match[0]) if match else []
    if not any(name in args and str(args[name]) != name for name in names):  # a file may be called `data`
        return message
    flags = re.sub("[a-z_]+(?=,| and|$)", lambda name: f"--{name[0].replace('_', '-')}", match[0])
    return flags + message[match.end() :]


if __name__ == "__main__":
    sys.exit(main())
