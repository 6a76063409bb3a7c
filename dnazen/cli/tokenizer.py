"""`dnazen tokenizer`: train a BPE tokenizer on genomes."""

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dnazen.data.fasta import read_clean_runs
from dnazen.data.tokenizer import MAX_VOCAB_SIZE, train_tokenizer
from dnazen.files import atomic_directory


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("tokenizer", help="train a BPE tokenizer on FASTA files", description=__doc__)
    parser.add_argument("--fasta", nargs="+", required=True, metavar="FILE", help="FASTA, plain or compressed")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="where to write it; must not exist yet")
    parser.add_argument("--vocab-size", type=int, default=MAX_VOCAB_SIZE, help="tokens, special ones included (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    tokenizer = build_tokenizer(args.fasta, args.output_dir, args.vocab_size)
    tokens = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens), key=len)
    print(f"tokens      {len(tokenizer):,} of {args.vocab_size:,} asked for, special ones included")
    print(f"bases       {sum(map(len, tokens)) / len(tokens):.2f} a token on average, {len(tokens[-1])} in {tokens[-1]}")
    print(f"written to  {args.output_dir} in {time.perf_counter() - start:.1f} s")


def build_tokenizer(
    fasta_paths: Sequence[str | PathLike], output_dir: str | PathLike, vocab_size: int = MAX_VOCAB_SIZE
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on FASTA files and save it as a new folder; errors as in `read_fasta` and `train_tokenizer`."""
    with atomic_directory(output_dir) as directory:
        tokenizer = train_tokenizer(_with_progress(read_clean_runs(fasta_paths)), vocab_size)
        tokenizer.save_pretrained(directory)
    return tokenizer


def _with_progress(sequences: Iterable[str]) -> Iterator[str]:
    with tqdm(desc="reading", unit=" bases", unit_scale=True) as progress:
        for sequence in sequences:
            yield sequence
            progress.update(len(sequence))
