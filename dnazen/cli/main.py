"""The `dnazen` command: from FASTA files to a tokenizer, a corpus and its G-grams; models in published form."""

import argparse
import csv
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dnazen import __version__
from dnazen.analysis import motifs, stats
from dnazen.data.corpus import Corpus, build_corpus, summarize
from dnazen.data.tokenizer import build_tokenizer, load_tokenizer
from dnazen.files import InputError
from dnazen.ngram import build, extract, parts

_NGRAM_OPTIONS = {
    "min_pmi": "bits; pairs below are cut apart",
    "min_count": "drop G-grams that occur less often",
    "min_pair_count": "rarer pairs are cut apart",
    "min_len": "tokens of a G-gram at least",
    "max_len": "tokens of a G-gram at most",
    "long_pieces": "longer runs",
    "num_workers": "processes; same result",
    "device": "same result",
}
_NGRAM_CHOICES = {"long_pieces": ("drop", "split"), "device": ("cpu", "cuda")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 1, with one line on stderr, when the input or the disk is at fault.

    `dnazen doctor` also returns 1 when something that it looks at is not in order.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[0:1] == ["ngrams"] and words[1:2] and not words[1].startswith("-"):
        words[0:2] = [" ".join(words[0:2])]  # `ngrams` is a command by itself, and `ngrams ...` are others
    args = vars(_make_parser().parse_args(words))
    run, output = args.pop("run"), args.get("output_dir", args.get("output"))
    logging.basicConfig(format="dnazen: %(levelname)s: %(message)s", stream=sys.stderr)
    start = time.perf_counter()
    try:
        status = run(**args) or 0
    except (InputError, OSError) as error:
        # A full disk names no file.
        place = f"{output}: " if isinstance(error, OSError) and error.filename is None else ""
        print(f"dnazen: error: {place}{error}", file=sys.stderr)
        return 1
    if output is not None and int(os.environ.get("RANK", 0)) == 0:
        print(f"written to  {output} in {time.perf_counter() - start:.1f} s")
    return status


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dnazen", description="DNA language models over BPE tokens and G-grams.")
    parser.add_argument("--version", action="version", version=f"dnazen {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command")

    def add_command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        """A command that writes a folder; its name may be of two words, such as `ngrams merge`."""
        command = subparsers.add_parser(name, help=text, description=text)
        command.add_argument("--output-dir", required=True, metavar="DIR", help="where to write it; must not exist yet")
        command.set_defaults(run=run)
        return command

    def add_use(command: argparse.ArgumentParser) -> None:
        """What the commands that read sequences with a model share."""
        command.add_argument("--model", required=True, metavar="NAME", help="folder, or name on the Hugging Face hub")
        text = "FASTA, or CSV with a column `sequence`, plain or compressed"
        command.add_argument("--input", required=True, metavar="FILE", help=text)
        command.add_argument("--window", type=int, default=2040, help="bases read at once (%(default)s)")
        command.add_argument(
            "--stride", type=int, default=1020, help="bases between their starts at most (%(default)s)"
        )
        command.add_argument("--max-batch-tokens", type=int, default=8192, help="of a batch; same result (%(default)s)")

    def add_ngram_options(command: argparse.ArgumentParser, *names: str) -> None:
        for name in names:
            default, choices = extract.extract_ngrams.__kwdefaults__[name], _NGRAM_CHOICES.get(name)
            text = f"{_NGRAM_OPTIONS[name]} ({default})"
            options = dict(type=type(default), choices=choices, default=argparse.SUPPRESS, help=text)
            command.add_argument(f"--{name.replace('_', '-')}", **options)

    command = add_command("tokenizer", _tokenizer, "train a BPE tokenizer on FASTA files")
    command.add_argument("--fasta", nargs="+", required=True, metavar="FILE", help="FASTA, plain or compressed")
    text = "special tokens included (a token for each 5,000 bases: 256, 512, 1024, 2048 or 4096)"
    command.add_argument("--vocab-size", type=int, help=text)

    command = add_command("corpus", _corpus, "clean and tokenize FASTA files into a corpus on disk")
    group = command.add_mutually_exclusive_group(required=True)
    group.add_argument("--fasta", nargs="+", metavar="FILE", help="FASTA, plain or compressed; - for standard input")
    group.add_argument("--fasta-list", metavar="FILE", help="text file with the path of a FASTA file on each line")
    command.add_argument("--tokenizer", required=True, metavar="DIR", help="folder with tokenizer.json")
    command.add_argument("--max-tokens", type=int, default=510, help="tokens of a sequence at most (%(default)s)")
    command.add_argument("--min-length", type=int, default=64, help="drop pieces of fewer bases (%(default)s)")
    command.add_argument("--reverse-complement", action="store_true", help="add the other strand of every piece")
    command.add_argument("--dedup", action="store_true", help="drop pieces seen before, on either strand")
    group = command.add_mutually_exclusive_group()
    group.add_argument("--validation-fraction", type=float, default=0.01, help="pieces held out (%(default)s)")
    group.add_argument(
        "--validation-records", type=lambda text: text.split(","), metavar="NAME,...", help="records held out, whole"
    )
    command.add_argument(
        "--check-against", nargs="+", default=[], metavar="CSV", help="count its sequences that occur in the corpus"
    )
    command.add_argument("--num-workers", type=int, help="processes; same result (every core)")

    corpus = dict(required=True, metavar="DIR", help="folder written by `dnazen corpus`")
    command = add_command("ngrams", _ngrams, "extract the G-gram vocabulary of a corpus")
    command.add_argument("--corpus", **corpus)
    add_ngram_options(command, *_NGRAM_OPTIONS)

    command = add_command("ngrams count", _ngrams_count, "count in one of several corpora, or in a shard of one")
    command.add_argument("--corpus", **corpus)
    command.add_argument("--shard", type=_read_shard, default=(1, 1), metavar="I/N", help="the I-th of N even shares")
    text = "pairs of all corpora and shards, counted before; then runs of linked pairs are counted, for `merge`"
    command.add_argument("--pairs", nargs="+", default=[], metavar="DIR", help=text)
    add_ngram_options(command, *(name for name in _NGRAM_OPTIONS if name != "min_count"))

    command = add_command("ngrams merge", _ngrams_merge, "extract the G-grams of all that was counted")
    command.add_argument("--counts", nargs="+", required=True, metavar="DIR", help="of `dnazen ngrams count --pairs`")
    add_ngram_options(command, "min_count")

    command = add_command("ngrams stats", _ngrams_stats, "count the G-grams of data sets, as tables and pictures")
    _add_ngrams_arguments(command)
    command.add_argument(
        "--data", nargs="+", required=True, metavar="PATH", help="CSV files with a column 'sequence', folders, corpora"
    )

    command = add_command("ngrams motifs", _ngrams_motifs, "compare G-grams with known motifs")
    _add_ngrams_arguments(command)
    command.add_argument("--motifs", required=True, metavar="FILE", help="MEME, TRANSFAC or JASPAR format, also .gz")
    command.add_argument("--shuffles", type=int, default=199, help="p-values reach 1 / (this + 1) (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the shuffles (%(default)s)")

    command = add_command("bench", _bench, "measure training steps on this machine")
    command.add_argument("--corpus", required=True, metavar="DIR", help="folder written by `dnazen corpus`")
    command.add_argument("--ngrams", required=True, metavar="DIR", help="folder written by `dnazen ngrams`")
    command.add_argument("--model", default="tiny", help="tiny, base, large, xlarge, or a config.json (%(default)s)")
    command.add_argument("--impl", nargs="+", choices=("reference", "triton"), help="also measure these, and the ratio")
    command.add_argument("--seconds", type=float, default=30.0, help="of each, after a warm-up (%(default)s)")
    command.add_argument("--max-batch-tokens", type=int, help="tokens of a micro-batch (by model size)")
    command.add_argument("--precision", choices=("bf16", "fp32"), help="bf16, as pretraining, or fp32 (bf16)")
    command.add_argument(
        "--deepspeed", metavar="JSON", help="run under DeepSpeed with this configuration, as pretraining"
    )
    command.add_argument("--torch-compile", action="store_true", help="compile layers, but not those of the reference")
    command.add_argument("--attn-implementation", metavar="NAME", help="attention by name (the best that runs)")
    command.add_argument("--profile", action="store_true", help="profile some steps more: costly kernels, idle GPU")

    command = add_command("evaluate", _evaluate, "measure how well a model predicts hidden tokens, beside counting")
    command.add_argument("--model", required=True, metavar="NAME", help="folder, or name on the Hugging Face hub")
    command.add_argument("--corpus", required=True, metavar="DIR", help="what it was trained on, which is counted")
    text = "genomes to evaluate on (what the corpus holds out)"
    command.add_argument("--fasta", nargs="+", metavar="FILE", help=text)

    command = add_command("export", _export, "write a trained model in the form of the published ones")
    command.add_argument("--model", required=True, metavar="DIR", help="`final/` or `checkpoint-N/` of a training run")

    text = "write the vectors of sequences, of their tokens or of their bases"
    command = subparsers.add_parser("embed", help=text, description=text)
    command.set_defaults(run=_embed)
    add_use(command)
    command.add_argument("--output", required=True, metavar="FILE", help=".npy, .parquet or .h5; must not exist yet")
    poolings = ("mean", "max", "cls", "token", "base")
    command.add_argument("--pooling", choices=poolings, default="mean", help="what has a vector (%(default)s)")
    command.add_argument("--layer", type=int, help="states after this many layers, 0 for the embeddings (the last)")
    command.add_argument("--both-strands", action="store_true", help="average with the reverse complement's vector")
    command.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model (%(default)s)")

    command = add_command("explain", _explain, "write the G-grams of sequences and the attention that each gets")
    add_use(command)
    command.add_argument("--motif", help="IUPAC codes; mark the G-grams that cover it, and compare their attention")

    text = "score the variants of a VCF file with a masked-language model, as INFO fields"
    command = subparsers.add_parser("variants", help=text, description=text)
    command.set_defaults(run=_variants)
    command.add_argument("--model", required=True, metavar="NAME", help="folder, or name on the Hugging Face hub")
    command.add_argument("--vcf", required=True, metavar="FILE", help="the variants, plain or compressed")
    command.add_argument("--fasta", required=True, metavar="FILE", help="the reference, plain or compressed")
    command.add_argument("--output", required=True, metavar="FILE", help=".vcf or .vcf.gz; must not exist yet")
    command.add_argument("--flank", type=int, default=256, help="bases on either side of an allele (%(default)s)")
    command.add_argument("--max-batch-tokens", type=int, default=4096, help="of a batch; same result (%(default)s)")

    command = add_command("predict", _predict, "apply a fine-tuned model to a CSV file")
    command.add_argument("--model", required=True, metavar="DIR", help="`final/` of a fine-tuning run")
    command.add_argument("--data", required=True, metavar="CSV", help="columns as in training; label may be absent")
    command.add_argument("--attn-implementation", metavar="NAME", help="attention by name (the best here)")

    text = "fine-tune and test models on GUE, and report; run again, it goes on"
    command = subparsers.add_parser("gue", help=text, description=text)
    command.set_defaults(run=_gue)
    command.add_argument(
        "--output-dir", required=True, metavar="DIR", help="for report and jobs; may hold earlier ones"
    )
    command.add_argument("--data", required=True, metavar="DIR", help="GUE: prom/prom_core_tata/train.csv, ...")
    command.add_argument(
        "--model",
        nargs="+",
        required=True,
        dest="models",
        metavar="DIR",
        help="models to compare; kmer-lr: the baseline",
    )
    command.add_argument("--seeds", type=int, default=3, help="trainings of each model on each task (%(default)s)")
    command.add_argument("--tasks", type=lambda text: text.split(","), metavar="NAME,...", help="some data sets (all)")
    command.add_argument("--no-ngrams", action="store_true", help="run each model also with its G-grams hidden")
    command.add_argument("--learning-rate", type=float, default=3e-5, help="for all data sets (%(default)s)")
    group = command.add_mutually_exclusive_group()
    group.add_argument("--epochs", type=float, help="of each data set (DNABERT-2's protocol)")
    group.add_argument("--max-steps", type=int, help="steps of each data set, instead of epochs")
    command.add_argument("--jobs-per-device", type=int, help="at a time (what a GPU holds; or one a core)")

    text = "say what runs on this machine, and check the operators on small input"
    subparsers.add_parser("doctor", help=text, description=text).set_defaults(run=_doctor)
    return parser


def _add_ngrams_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--ngrams", required=True, metavar="DIR", help="written by `dnazen ngrams`, or ngram.json")
    command.add_argument("--tokenizer", metavar="DIR", help="folder with tokenizer.json (that of the G-grams)")


def _tokenizer(fasta: list[str], output_dir: str, vocab_size: int | None) -> None:
    tokenizer = build_tokenizer(fasta, output_dir, vocab_size)
    tokens = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens), key=len)
    asked = f" of {vocab_size:,} asked for" if vocab_size else ""
    print(f"tokens      {len(tokenizer):,}{asked}, special ones included")
    print(f"bases       {sum(map(len, tokens)) / len(tokens):.2f} a token on average, {len(tokens[-1])} at most")


def _refuse_several(command: str, instead: str = "") -> None:
    """InputError under `torchrun` and the like: each process would do all the work, and one would write."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        found = f"{os.environ['WORLD_SIZE']} (WORLD_SIZE)"
        expected = "one process, without torchrun or deepspeed"
        raise InputError(f"dnazen {command}: expected {expected}{instead}, found {found}")


def _corpus(
    fasta: list[str] | None, fasta_list: str | None, tokenizer: str, output_dir: str, **parameters: Any
) -> None:
    _refuse_several("corpus")
    paths = fasta or _read_list(fasta_list)
    print(summarize(build_corpus(paths, load_tokenizer(tokenizer), output_dir, **parameters)))


def _read_list(path: str) -> list[str]:
    """The paths in a text file, one a line; relative ones are relative to the working directory."""
    paths = [line.strip() for line in Path(path).read_text("utf-8-sig", "surrogateescape").splitlines() if line.strip()]
    if not paths:
        raise InputError(f"{path}: expected the path of a FASTA file on each line, found none")
    return paths


def _ngrams(corpus: str, output_dir: str, **parameters: Any) -> None:
    _refuse_several("ngrams", " (several machines: `dnazen ngrams count --shard I/N`, then `dnazen ngrams merge`)")
    _print_ngrams(build.build_ngrams(Corpus.open(corpus), output_dir, **parameters), output_dir)


def _ngrams_count(corpus: str, output_dir: str, **parameters: Any) -> None:
    _refuse_several("ngrams count")
    print(parts.summarize(parts.build_counts(Corpus.open(corpus), output_dir, **parameters)))


def _read_shard(text: str) -> tuple[int, int]:
    index, slash, number = text.partition("/")
    if not (slash and index.isdecimal() and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected I/N, such as 2/4, found {text}")
    return int(index), int(number)


def _ngrams_merge(counts: list[str], output_dir: str, **parameters: int) -> None:
    _refuse_several("ngrams merge")
    _print_ngrams(parts.merge_counts(counts, output_dir, **parameters), output_dir)


def _print_ngrams(manifest: dict[str, Any], output_dir: str) -> None:
    print(build.summarize(manifest))
    print("most frequent: count, PMI of the weakest pair in bits, tokens")
    with open(Path(output_dir) / build.TABLE_FILE) as file:
        for row in itertools.islice(csv.DictReader(file, delimiter="\t"), 10):
            print(f"{int(row['count']):>10,} {float(row['pmi']):6.2f}  {row['tokens']}")


def _ngrams_stats(**parameters: Any) -> None:
    print(stats.format_table(stats.build_statistics(**parameters).splits))


def _ngrams_motifs(**parameters: Any) -> None:
    print(motifs.summarize(motifs.build_motifs(**parameters)))


def _bench(corpus: str, ngrams: str, output_dir: str, **parameters: Any) -> None:
    from dnazen.pretraining.bench import bench, format_bench  # the models take seconds to import

    print(format_bench(bench(corpus, ngrams, output_dir, **parameters)))


def _evaluate(**parameters: Any) -> None:
    from dnazen.inference.evaluate import evaluate  # the models take seconds to import

    evaluation, text = evaluate(**parameters)
    print(evaluation.describe(text))


def _export(model: str, output_dir: str) -> None:
    from dnazen.models.export import export_model  # the models take seconds to import

    print(f"parameters  {export_model(model, output_dir):,}, in fp32, under their published names")


def _embed(**parameters: Any) -> None:
    from dnazen.inference.embed import embed  # the models take seconds to import

    counts = embed(**parameters)
    print(f"records     {counts['records']:,}, {counts['empty_records']:,} of them without A, C, G, T")
    print(f"bases       {counts['bases']:,} of A, C, G, T in {counts['windows']:,} windows")
    print(f"left out    {counts['other_letters']:,} other letters")
    print(f"vectors     {counts['rows']:,} of {counts['dimensions']:,} numbers")


def _explain(**parameters: Any) -> None:
    from dnazen.inference.explain import explain, format_summary  # the models take seconds to import

    print(format_summary(explain(**parameters)))


def _variants(**parameters: Any) -> None:
    from dnazen.inference.variants import variants  # the models take seconds to import

    counts = variants(**parameters)
    print(f"records     {counts['records']:,} with {counts['alleles']:,} alternative alleles")
    print(f"ambiguous   {counts['ambiguous']:,} records have a base where the reference has another code, such as R")
    print(f"scored      {counts['scored']:,} alleles")
    reasons = {"unspelled": "not in A, C, G, T", "unchanged": "equal to REF", "long": "too long"}
    print(f"not scored  {'; '.join(f'{counts[name]:,} {reason}' for name, reason in reasons.items())}")


def _predict(output_dir: str, **parameters: Any) -> None:
    from dnazen.finetuning.predict import predict  # the models take seconds to import

    num_rows, metrics = predict(output_dir=output_dir, **parameters)
    print(f"rows        {num_rows:,}")
    for name, value in metrics.items():
        print(f"{name:12}{value:.4f}")


def _gue(**parameters: Any) -> int:
    from dnazen.gue.launch import run_gue  # the models take seconds to import

    logging.getLogger("dnazen.gue").setLevel(logging.INFO)  # it takes hours, and says how far it is
    text, is_complete = run_gue(**parameters)
    print(text)
    return 0 if is_complete else 1


def _doctor() -> int:
    from dnazen.cli.doctor import examine  # PyTorch takes seconds to import

    status = 0
    for name, found, good in examine():
        print(f"{name:14}{found}" + ("" if good else "   <-- not in order"), flush=True)
        status |= not good
    return status


if __name__ == "__main__":
    sys.exit(main())
