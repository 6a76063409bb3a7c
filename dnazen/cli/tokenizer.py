"""`dnazen tokenizer`: train a BPE tokenizer on genomes."""

import argparse
import time
from collections.abc import Iterator

from tqdm import tqdm

from dnazen.data.fasta import read_fasta
from dnazen.data.tokenizer import MAX_VOCAB_SIZE, save_tokenizer, train_tokenizer
from dnazen.files import atomic_directory


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("tokenizer", help="train a BPE tokenizer on FASTA files", description=__doc__)
    parser.add_argument("--fasta", nargs="+", required=True, metavar="FILE", help="FASTA, plain or compressed")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="where to write it; must not exist yet")
    parser.add_argument("--vocab-size", type=int, default=MAX_VOCAB_SIZE, help="special tokens included (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    with atomic_directory(args.output_dir) as directory:
        tokenizer = train_tokenizer(_read_sequences(args.fasta), args.vocab_size)
        save_tokenizer(tokenizer, directory)
    tokens = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens), key=len)
    print(f"tokens      {len(tokenizer):,} of {args.vocab_size:,} asked for, special ones included")
    print(f"bases       {sum(map(len, tokens)) / len(tokens):.2f} a token on average, {len(tokens[-1])} at most")
    print(f"written to  {args.output_dir} in {time.perf_counter() - start:.1f} s")


def _read_sequences(paths: list[str]) -> Iterator[str]:
    with tqdm(desc="reading", unit=" bases", unit_scale=True) as progress:
        for path in paths:
            for record in read_fasta(path):
                yield record.sequence
                progress.update(len(record.sequence))
