"""`dnazen tokenizer`."""

import argparse

from dnazen.cli.shared import add_output_dir, new_command


def add_command(commands: argparse._SubParsersAction) -> None:
    command = new_command(commands, "tokenizer", "train a BPE tokenizer on genomes", run)
    command.add_argument("--fasta", nargs="+", required=True, metavar="FILE", help="FASTA files, plain or compressed")
    text = "tokens, special ones included, 9 to 4096 (256, 512, 1024, 2048 or 4096: about one for each 5,000 bases)"
    command.add_argument("--vocab-size", type=int, metavar="N", help=text)
    add_output_dir(command)


def run(fasta: list[str], output_dir: str, vocab_size: int | None) -> None:
    from dnazen.data.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(fasta, output_dir, vocab_size)
    tokens = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens), key=len)
    asked = f" of {vocab_size:,} asked for" if vocab_size else ""
    print(f"tokens      {len(tokenizer):,}{asked}, special ones included")
    print(f"bases       {sum(map(len, tokens)) / len(tokens):.2f} a token on average, {len(tokens[-1])} at most")
