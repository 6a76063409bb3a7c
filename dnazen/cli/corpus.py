"""`dnazen corpus`: clean and tokenize genomes into a corpus on disk."""

import argparse
import time

from dnazen.data.shards import build_corpus, summarize
from dnazen.data.tokenizer import load_tokenizer


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("corpus", help="tokenize FASTA files into a corpus on disk", description=__doc__)
    parser.add_argument("--fasta", nargs="+", required=True, metavar="FILE", help="FASTA, plain or compressed")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder with tokenizer.json")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="where to write it; must not exist yet")
    parser.add_argument("--max-tokens", type=int, default=510, help="tokens of a sequence at most (%(default)s)")
    parser.add_argument("--min-length", type=int, default=64, help="drop pieces of fewer bases (%(default)s)")
    parser.add_argument("--reverse-complement", action="store_true", help="add the other strand of every piece")
    parser.add_argument("--validation-fraction", type=float, default=0.01, help="pieces held out (%(default)s)")
    parser.add_argument("--num-workers", type=int, help="threads (every core)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    manifest = build_corpus(
        args.fasta,
        load_tokenizer(args.tokenizer),
        args.output_dir,
        max_tokens=args.max_tokens,
        min_length=args.min_length,
        reverse_complement=args.reverse_complement,
        validation_fraction=args.validation_fraction,
        num_workers=args.num_workers,
    )
    print(summarize(manifest))
    print(f"written to  {args.output_dir} in {time.perf_counter() - start:.1f} s")
