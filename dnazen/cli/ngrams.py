"""`dnazen ngrams`: extract the G-gram vocabulary of a corpus."""

import argparse
import csv
import itertools
from pathlib import Path

from dnazen.data.shards import Corpus
from dnazen.ngram.extract import build_ngrams, summarize

PARAMETERS = ("min_pmi", "min_count", "min_pair_count", "min_len", "max_len", "num_workers", "long_pieces")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("ngrams", help="extract G-grams from a corpus", description=__doc__)
    parser.add_argument("--corpus", required=True, metavar="DIR", help="folder written by `dnazen corpus`")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="where to write; must not exist yet")
    parser.add_argument("--min-pmi", type=float, default=2.0, help="bits; pairs below are cut apart (%(default)s)")
    parser.add_argument("--min-count", type=int, default=5, help="drop G-grams that occur less often (%(default)s)")
    parser.add_argument("--min-pair-count", type=int, default=5, help="rarer pairs are cut apart (%(default)s)")
    parser.add_argument("--min-len", type=int, default=2, help="tokens of a G-gram at least (%(default)s)")
    parser.add_argument("--max-len", type=int, default=5, help="tokens of a G-gram at most (%(default)s)")
    parser.add_argument("--long-pieces", choices=("drop", "split"), default="drop", help="longer runs (%(default)s)")
    parser.add_argument("--num-workers", type=int, default=1, help="processes; same result (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    parameters = {name: getattr(args, name) for name in PARAMETERS}
    manifest = build_ngrams(Corpus.open(args.corpus), args.output_dir, **parameters)
    print(summarize(manifest))
    print("most frequent: count, PMI of the weakest pair in bits, tokens")
    with open(Path(args.output_dir) / "ngrams.tsv") as file:
        for row in itertools.islice(csv.DictReader(file, delimiter="\t"), 10):
            print(f"{int(row['count']):>10,} {float(row['pmi']):6.2f}  {row['tokens']}")
    print(f"written to  {args.output_dir}")
