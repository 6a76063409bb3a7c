"""The `dnazen` command."""

import argparse
import logging
import sys
from collections.abc import Sequence

from dnazen import __version__
from dnazen.cli import corpus, ngrams, tokenizer
from dnazen.files import InputError

COMMANDS = (tokenizer, corpus, ngrams)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 1, with one line on stderr, when the input or the disk is at fault."""
    parser = argparse.ArgumentParser(prog="dnazen", description="DNA language models over BPE tokens and G-grams.")
    parser.add_argument("--version", action="version", version=f"dnazen {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    logging.basicConfig(format="dnazen: %(levelname)s: %(message)s", stream=sys.stderr)
    try:
        args.run(args)
    except (InputError, OSError) as error:
        # A full disk names no file.
        place = f"{args.output_dir}: " if isinstance(error, OSError) and error.filename is None else ""
        print(f"dnazen: error: {place}{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
