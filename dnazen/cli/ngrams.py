"""`dnazen ngrams`: extract, count, merge, stats and motifs."""

import argparse
import csv
import itertools
from pathlib import Path
from typing import Any

from dnazen import defaults
from dnazen.cli.shared import add_corpus, add_ngrams, add_output_dir, new_command, require_one_process

# name, default, choices, meaning
_THRESHOLDS = (
    ("min_pmi", defaults.MIN_PMI, None, "least pointwise mutual information of two tokens that stay together, in bits"),
    ("min_pair_count", defaults.MIN_PAIR_COUNT, None, "least occurrences of two tokens that stay together"),
    ("min_len", defaults.MIN_LEN, None, "tokens of a G-gram, at least"),
    ("max_len", defaults.MAX_LEN, None, "tokens of a G-gram, at most 5"),
    (
        "long_pieces",
        defaults.LONG_PIECES,
        ("drop", "split"),
        "what becomes of longer runs of tokens",
    ),
)
_MIN_COUNT = ("min_count", defaults.MIN_COUNT, None, "least occurrences of a G-gram")
_RESOURCES = (
    ("num_workers", defaults.NUM_WORKERS, None, "processes on the CPU; they do not change the result"),
    ("device", defaults.DEVICE, ("cpu", "cuda"), "where to count; it does not change the result"),
)


def add_command(commands: argparse._SubParsersAction) -> None:
    text = "extract, count, merge and examine G-grams, which are frequent runs of tokens"
    epilog = "`dnazen ngrams --corpus ...` is short for `dnazen ngrams extract --corpus ...`."
    commands = commands.add_parser("ngrams", help=text, description=text, epilog=epilog)
    commands = commands.add_subparsers(required=True, metavar="command")

    command = new_command(commands, "extract", "extract the G-grams of a corpus", extract)
    add_corpus(command)
    _add_options(command, *_THRESHOLDS, _MIN_COUNT, *_RESOURCES)
    add_output_dir(command)

    text = "count in one corpus of several, or in a share of one, for `merge`"
    description = (
        "Count in one corpus of several, or in a share of one. Twice for each: first pairs of tokens; then, with "
        "--pairs and perhaps thresholds, the runs of tokens that `dnazen ngrams merge` makes G-grams of."
    )
    command = new_command(commands, "count", text, count, description)
    add_corpus(command)
    text = "count the I-th of N even shares of the corpus, from 1/N to N/N (1/1: all of it)"
    command.add_argument("--shard", type=_read_shard, default=(1, 1), metavar="I/N", help=text)
    text = "the first counts of all corpora and shares, this one's among them"
    command.add_argument("--pairs", nargs="+", default=[], metavar="DIR", help=text)
    _add_options(command, *_THRESHOLDS, *_RESOURCES)
    add_output_dir(command)

    command = new_command(commands, "merge", "extract the G-grams of all that was counted", merge)
    text = "folders that `dnazen ngrams count --pairs ...` wrote, of all corpora and shares"
    command.add_argument("--counts", nargs="+", required=True, metavar="DIR", help=text)
    _add_options(command, _MIN_COUNT)
    add_output_dir(command)

    command = new_command(commands, "stats", "count the G-grams in data sets, as tables and pictures", stats)
    _add_vocabulary(command)
    text = "CSV files with a column `sequence`, folders of them, corpora"
    command.add_argument("--data", nargs="+", required=True, metavar="PATH", help=text)
    add_output_dir(command)

    command = new_command(commands, "motifs", "compare G-grams with known motifs", motifs)
    _add_vocabulary(command)
    text = "known motifs in MEME, TRANSFAC or JASPAR format, plain or .gz"
    command.add_argument("--motifs", required=True, metavar="FILE", help=text)
    text = "times that G-grams are shuffled for comparison; the least p-value is 1 / (N + 1) (%(default)s)"
    command.add_argument("--shuffles", type=int, default=defaults.SHUFFLES, metavar="N", help=text)
    text = "seed of the shuffles (%(default)s)"
    command.add_argument("--seed", type=int, default=0, metavar="N", help=text)
    add_output_dir(command)


def _add_options(command: argparse.ArgumentParser, *options: tuple[str, Any, tuple[str, ...] | None, str]) -> None:
    """Parameters of `extract_ngrams`, each passed on only if given: without --pairs thresholds are refused."""
    for name, default, choices, text in options:
        metavar = None if choices else "BITS" if isinstance(default, float) else "N"
        kind = dict(type=type(default), choices=choices, metavar=metavar, default=argparse.SUPPRESS)
        command.add_argument(f"--{name.replace('_', '-')}", help=f"{text} ({default})", **kind)


def _add_vocabulary(command: argparse.ArgumentParser) -> None:
    add_ngrams(command)
    text = "folder with the tokenizer.json that the G-grams were made with (the one beside them)"
    command.add_argument("--tokenizer", metavar="DIR", help=text)


def _read_shard(text: str) -> tuple[int, int]:
    index, slash, number = text.partition("/")
    if not (slash and index.isdecimal() and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected I/N, such as 2/4, found {text}")
    return int(index), int(number)


def extract(corpus: str, output_dir: str, **parameters: Any) -> None:
    instead = " (several machines: `dnazen ngrams count --shard I/N`, then `dnazen ngrams merge`)"
    require_one_process("ngrams extract", instead)
    from dnazen.data.corpus import Corpus
    from dnazen.ngram.build import build_ngrams

    _print_ngrams(build_ngrams(Corpus.open(corpus), output_dir, **parameters), output_dir)


def count(corpus: str, output_dir: str, **parameters: Any) -> None:
    require_one_process("ngrams count")
    from dnazen.data.corpus import Corpus
    from dnazen.ngram.parts import build_counts, summarize

    print(summarize(build_counts(Corpus.open(corpus), output_dir, **parameters)))


def merge(counts: list[str], output_dir: str, **parameters: int) -> None:
    require_one_process("ngrams merge")
    from dnazen.ngram.parts import merge_counts

    _print_ngrams(merge_counts(counts, output_dir, **parameters), output_dir)


def _print_ngrams(manifest: dict[str, Any], output_dir: str) -> None:
    from dnazen.ngram.build import TABLE_FILE, summarize

    print(summarize(manifest))
    print("most frequent: count, PMI of the weakest pair in bits, tokens")
    with open(Path(output_dir) / TABLE_FILE) as file:
        for row in itertools.islice(csv.DictReader(file, delimiter="\t"), 10):
            print(f"{int(row['count']):>10,} {float(row['pmi']):6.2f}  {row['tokens']}")


def stats(**parameters: Any) -> None:
    from dnazen.analysis.stats import build_statistics, format_table

    print(format_table(build_statistics(**parameters).splits))


def motifs(**parameters: Any) -> None:
    from dnazen.analysis.motifs import build_motifs, summarize

    print(summarize(build_motifs(**parameters)))
