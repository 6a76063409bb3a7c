"""`dnazen ngrams stats`: the G-grams in data sets, as tables and pictures (paper, Appendix A and Figure 2).

How the columns are read is in `dnazen.analysis.stats_counts`.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from dnazen import __version__
from dnazen.analysis.stats_counts import NgramStatistics, SplitStatistics, collect_statistics, find_sources
from dnazen.analysis.stats_pictures import plot_statistics
from dnazen.data.tokenizer import tokenizer_checksum
from dnazen.files import atomic_directory, write_json
from dnazen.ngram.vocab import MANIFEST_FILE, NgramVocabulary, open_ngrams

_TABLE_HEADER = ("data set", "split", "instances", "tokens", "total", "distinct", "average", "covered")


def build_statistics(
    ngrams: str | PathLike, data: Sequence[str | PathLike], output_dir: str | PathLike, tokenizer: str | None = None
) -> NgramStatistics:
    """Write tables and pictures of the G-grams `ngrams` in `data` (see `find_sources`) into a folder.

    `stats.csv` has a row for each split, `ngrams.csv` one for each G-gram, with the number of instances of each data
    set that it occurs in; `manifest.json` says what was read.

    Raises:
        InputError: see `find_sources`, `collect_statistics` and `dnazen.ngram.vocab.open_ngrams`.
    """
    sources = find_sources(data)
    vocabulary, tokenizer = open_ngrams(ngrams, tokenizer)
    with atomic_directory(output_dir) as directory:
        statistics = collect_statistics(sources, vocabulary, tokenizer)
        _write_tables(directory, statistics, vocabulary, tokenizer)
        plot_statistics(directory, statistics, vocabulary, tokenizer)
        manifest = {
            "dnazen_version": __version__,
            "ngrams": {"path": str(ngrams), "checksum": vocabulary.checksum, "num_ngrams": len(vocabulary.ngrams)},
            "tokenizer_checksum": tokenizer_checksum(tokenizer),
            "sources": [{**source._asdict(), "path": str(source.path)} for source in sources],
        }
        write_json(directory / MANIFEST_FILE, manifest)
    return statistics


def format_table(splits: Iterable[SplitStatistics]) -> str:
    """The columns of the paper's Appendix A, and the share of tokens in G-grams, as text."""
    rows = [_TABLE_HEADER]
    for s in splits:
        sizes = [f"{size:,}" for size in (s.instances, s.tokens, s.total, s.distinct)]
        rows.append((s.dataset, s.split, *sizes, f"{s.average:.1f}", f"{100 * s.covered_tokens / s.tokens:.1f} %"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    )


def _write_tables(
    directory: Path, statistics: NgramStatistics, vocabulary: NgramVocabulary, tokenizer: PreTrainedTokenizerBase
) -> None:
    with open(directory / "stats.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*asdict(statistics.splits[0]), "average"])
        writer.writerows([*asdict(split).values(), f"{split.average:.4f}"] for split in statistics.splits)
    with open(directory / "ngrams.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "tokens", "bases", "length", "pmi", *statistics.counts])
        counts_of_ngrams = zip(*statistics.counts.values(), strict=True)
        columns = vocabulary.ids, vocabulary.ngrams, statistics.pmis, counts_of_ngrams
        for ngram_id, ngram, pmi, counts in zip(*columns, strict=True):
            tokens = tokenizer.convert_ids_to_tokens(ngram)
            bits = "" if np.isnan(pmi) else f"{pmi:.4f}"
            writer.writerow([ngram_id, " ".join(tokens), "".join(tokens), len(ngram), bits, *counts])
