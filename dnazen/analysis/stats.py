"""Statistics of the G-grams in data sets: the columns of the paper's Appendix A, its Figure 2, and more.

How the columns are read. An instance is a row of a CSV file or a sequence of a corpus, whole: nothing is truncated and
no limit of G-grams per sequence is applied (the paper's 127 G-grams in a SARS-CoV-2 instance exceed the published
limit of 30). "Total" adds up, over the instances, the G-grams that occur in each; one that occurs twice in an
instance is one G-gram there, as it is for the model. "Distinct" is how many different ones occur in the split, and
"average" is total / instances, which the paper's own figures obey. A frequency is a G-gram's share of the total.
"""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dnazen import __version__
from dnazen.data.corpus import SPLITS, Corpus
from dnazen.data.tables import read_sequences
from dnazen.data.tokenizer import tokenizer_checksum
from dnazen.files import InputError, atomic_directory, write_json
from dnazen.ngram.count import PairCounts, add_pairs, encode_pairs, token_size
from dnazen.ngram.links import measure_pmis
from dnazen.ngram.vocab import MANIFEST_FILE, NgramVocabulary, open_ngrams
from dnazen.processes import cut_blocks
from dnazen_kernels.ngram_matching import ngram_matching
from dnazen_kernels.ngram_matching.table import token_bits

_BATCH_SEQUENCES = 2048  # at most; and
_BATCH_TOKENS = 1 << 18  # about so many tokens, whose matches take some 30 MB
_CSV = re.compile(r".+\.csv(\.(gz|bz2|xz|zst))?")
_SPLIT_ORDER = ("train", "dev", "validation", "test")
_HEATMAP_NGRAMS = 60
_TABLE_HEADER = ("data set", "split", "instances", "tokens", "total", "distinct", "average", "covered")


class Source(NamedTuple):
    """One split of one data set."""

    group: str  # the folder of related data sets that it lies in, such as GUE's `tf`
    dataset: str
    split: str
    path: Path  # of a CSV file, or of a corpus


@dataclass
class SplitStatistics:
    """What one split of one data set holds; a row of the paper's Appendix A, and more."""

    group: str
    dataset: str
    split: str
    instances: int = 0
    tokens: int = 0
    unknown_tokens: int = 0  # letters other than A, C, G, T
    covered_tokens: int = 0  # in one G-gram or more
    total: int = 0
    distinct: int = 0

    @property
    def average(self) -> float:
        """G-grams of an instance."""
        return self.total / self.instances


@dataclass
class NgramStatistics:
    """Counts over all data; the G-grams are in the order of the vocabulary."""

    splits: list[SplitStatistics]
    counts: dict[str, np.ndarray] = field(default_factory=dict)  # by data set: instances with each G-gram, int64 [G]
    pmis: np.ndarray | None = None  # bits [G]: of the weakest pair of neighbours in all data; nan where not seen


def find_sources(paths: Sequence[str | PathLike]) -> list[Source]:
    """The splits that lie under `paths`: CSV files, folders of them (such as GUE's) at any depth, corpora.

    A data set is called by its path in the folder that was given; a file given by itself, by the two folders it is in.

    Raises:
        InputError: nothing there; a folder without a CSV file; two splits of one name.
    """
    sources: list[Source] = []
    for path in (Path(path).absolute() for path in paths):
        if (path / MANIFEST_FILE).is_file():
            sources += [Source(path.name, path.name, split, path) for split in SPLITS]
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*.csv*") if _CSV.fullmatch(file.name))
            if not files:
                raise InputError(f"{path}: expected CSV files in this folder (.csv, .csv.gz), or a corpus, found none")
            for file in files:
                parts = file.parent.relative_to(path).parts
                group = parts[0] if len(parts) > 1 else path.name
                sources.append(Source(group, "/".join(parts) or path.name, file.name.split(".")[0], file))
        elif path.is_file():
            folders = path.parts[-3:-1]
            sources.append(Source(folders[0], "/".join(folders), path.name.split(".")[0], path))
        else:
            raise InputError(f"{path}: expected a CSV file, a folder of them, or a corpus, found nothing")
    names = [(source.dataset, source.split) for source in sources]
    for name in names:
        if names.count(name) > 1:
            same = " and ".join(str(other.path) for other in sources if (other.dataset, other.split) == name)
            raise InputError(f"{same}: expected data sets of different names, found {' '.join(name)} twice; give the "
                             "folder that both are in")  # fmt: skip
    order = {split: i for i, split in enumerate(_SPLIT_ORDER)}
    return sorted(sources, key=lambda s: (s.group, s.dataset, order.get(s.split, len(order)), s.split))


def collect_statistics(
    sources: Sequence[Source], vocabulary: NgramVocabulary, tokenizer: PreTrainedTokenizerBase
) -> NgramStatistics:
    """Match the G-grams in all sources, in batches; the memory needed does not grow with the data.

    PMI is that of the extraction (`measure_pmis`), with the counts of tokens and pairs in all sources together. Their
    table takes 128 MiB for 4,096 tokens.

    Raises:
        InputError: a file cannot be read, has no sequence, or is a corpus of another tokenizer.
    """
    table = vocabulary.table(len(tokenizer))
    rows = np.full(vocabulary.vocab_size, -1)
    rows[vocabulary.ids] = np.arange(len(vocabulary.ids))
    bits = token_bits(len(tokenizer), 2)
    token_counts, pair_counts = (torch.zeros(1 << n * bits, dtype=torch.int64) for n in (1, 2))
    statistics = NgramStatistics([])
    with tqdm(desc="matching", unit=" tokens", unit_scale=True, disable=None) as progress:
        for source in sources:
            split = SplitStatistics(source.group, source.dataset, source.split)
            counts = np.zeros(len(vocabulary.ngrams), np.int64)
            for tokens, cu_seqlens in _iterate_batches(source, tokenizer):
                tokens = torch.from_numpy(tokens)
                matches = ngram_matching(tokens, torch.from_numpy(cu_seqlens), table)
                counts += np.bincount(rows[matches.ngram_input_ids.numpy()], minlength=len(counts))
                split.instances += len(cu_seqlens) - 1
                split.tokens += len(tokens)
                split.unknown_tokens += int((tokens == tokenizer.unk_token_id).sum())
                split.covered_tokens += int(matches.token_offsets.diff().count_nonzero())
                add_pairs(token_counts, pair_counts, tokens, *encode_pairs(tokens, cu_seqlens, bits))
                progress.update(len(tokens))
            split.total, split.distinct = int(counts.sum()), int(np.count_nonzero(counts))
            statistics.splits.append(split)
            statistics.counts[source.dataset] = statistics.counts.get(source.dataset, 0) + counts
    statistics.pmis = _ngram_pmis(PairCounts(token_counts.numpy(), pair_counts.numpy()), vocabulary.ngrams)
    return statistics


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


def _iterate_batches(source: Source, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens without special ones, int64, and `cu_seqlens`, of a source's instances in order."""
    if (source.path / MANIFEST_FILE).is_file():
        corpus = Corpus.open(source.path, verify=source.split == SPLITS[0])  # once is enough
        if (found := tokenizer_checksum(corpus.tokenizer)) != (expected := tokenizer_checksum(tokenizer)):
            raise InputError(f"{source.path}: expected a corpus with tokenizer {expected}, found {found}")
        for tokens, offsets in getattr(corpus, source.split).shards:
            for first, end in cut_blocks(offsets, _BATCH_TOKENS):
                block = np.asarray(tokens[offsets[first] : offsets[end]], np.int64)
                yield block, (offsets[first : end + 1] - offsets[first]).astype(np.int32)
        return
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    sequences = read_sequences(source.path)
    while batch := list(itertools.islice(sequences, _BATCH_SEQUENCES)):
        ids = [encoding.ids for encoding in encode(batch, add_special_tokens=False)]
        cu_seqlens = np.cumsum([0, *map(len, ids)]).astype(np.int32)
        yield np.fromiter(itertools.chain.from_iterable(ids), np.int64, cu_seqlens[-1]), cu_seqlens


def _ngram_pmis(table: PairCounts, ngrams: Sequence[tuple[int, ...]]) -> np.ndarray:
    """PMI in bits of each G-gram's weakest pair, fp64 `[G]`; nan where a pair was not seen."""
    bits = token_size(table.tokens)
    codes = np.array([a << bits | b for ngram in ngrams for a, b in itertools.pairwise(ngram)], np.int64)
    with np.errstate(divide="ignore", invalid="ignore"):
        pmis = measure_pmis(table.tokens, table.pairs.sum(), codes, table.pairs[codes])
    pmis[table.pairs[codes] == 0] = np.nan
    starts = np.cumsum([0, *(len(ngram) - 1 for ngram in ngrams)])[:-1]
    return np.minimum.reduceat(pmis, starts)


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


def plot_statistics(
    directory: Path, statistics: NgramStatistics, vocabulary: NgramVocabulary, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write `lengths.png`, `rank_frequency.png`, `pmi.png`, `coverage.png` and `heatmap.png`."""
    from matplotlib.figure import Figure

    def draw(height: float = 4, columns: int = 1) -> tuple[Figure, Any]:
        figure = Figure(figsize=(7, height), layout="constrained")
        return figure, figure.subplots(1, columns)

    counts = statistics.counts
    total = sum(counts.values())

    figure, (left, right) = draw(columns=2)
    spellings = [tokenizer.convert_ids_to_tokens(ngram) for ngram in vocabulary.ngrams]
    for axes, unit, lengths in (
        (left, "tokens", np.array([len(tokens) for tokens in spellings])),
        (right, "bases", np.array([sum(map(len, tokens)) for tokens in spellings])),
    ):
        values = np.arange(lengths.min(), lengths.max() + 1)
        for label, weights, width in (("vocabulary", np.ones(len(lengths)), 0.9), ("in the data", total, 0.45)):
            shares = np.bincount(lengths, weights, minlength=values[-1] + 1)[values[0] :] / max(weights.sum(), 1)
            axes.bar(values, shares, width, label=label)
        axes.set(xlabel=f"length of G-grams ({unit})", ylabel="share")
        axes.legend()
    figure.savefig(directory / "lengths.png", dpi=120)

    figure, axes = draw()
    for dataset, values in counts.items():
        frequencies = np.sort(values[values > 0])[::-1] / max(values.sum(), 1)
        axes.plot(np.arange(1, len(frequencies) + 1), frequencies, label=dataset, linewidth=1)
    axes.set(xlabel="rank of G-gram", ylabel="share of the data set's G-grams")
    if total.any():
        axes.set(xscale="log", yscale="log")
    axes.legend(fontsize=6, ncols=1 + len(counts) // 12)
    figure.savefig(directory / "rank_frequency.png", dpi=120)

    figure, axes = draw()
    seen = ~np.isnan(statistics.pmis)
    lengths = np.array([len(ngram) for ngram in vocabulary.ngrams])
    edges = np.histogram_bin_edges(statistics.pmis[seen], 60) if seen.any() else np.arange(3)
    groups = [statistics.pmis[seen & (lengths == length)] for length in np.unique(lengths)]
    axes.hist(groups, edges, stacked=True, label=[f"{length} tokens" for length in np.unique(lengths)])
    axes.set(xlabel="PMI of the weakest pair, in these data (bits)", ylabel="G-grams")
    axes.legend()
    figure.savefig(directory / "pmi.png", dpi=120)

    labels = [f"{split.dataset} {split.split}" for split in statistics.splits]
    figure, axes = draw(height=1.5 + 0.14 * len(labels))
    shares = [100 * split.covered_tokens / split.tokens for split in statistics.splits]
    axes.barh(labels[::-1], shares[::-1])
    axes.set(xlabel="tokens in one G-gram or more (%)", xlim=(0, 100))
    axes.tick_params(axis="y", labelsize=6)
    axes.margins(y=0.01)
    figure.savefig(directory / "coverage.png", dpi=120)

    _plot_heatmap(directory / "heatmap.png", statistics, [_shorten(" ".join(tokens)) for tokens in spellings])


def _shorten(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:21]}..."


def _plot_heatmap(path: Path, statistics: NgramStatistics, names: Sequence[str]) -> None:
    """The paper's Figure 2: frequencies, by group and by data set, of the most frequent G-grams of each data set."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    by_group: dict[str, Any] = {}
    for split in {split.dataset: split for split in statistics.splits}.values():
        by_group[split.group] = by_group.get(split.group, 0) + statistics.counts[split.dataset]
    panels = [panel for panel in (by_group, statistics.counts) if len(panel) > 1 or panel is statistics.counts]
    frequencies = [{name: counts / max(counts.sum(), 1) for name, counts in panel.items()} for panel in panels]
    by_rank = np.array([np.argsort(-row, kind="stable")[:_HEATMAP_NGRAMS] for row in frequencies[-1].values()]).T
    chosen = list(dict.fromkeys(by_rank.flat))[:_HEATMAP_NGRAMS]
    height = 2.0 + sum(0.5 + 0.18 * len(panel) for panel in panels)
    figure = Figure(figsize=(11, height), layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=[len(panel) for panel in panels])[:, 0]
    for axes, panel in zip(grid, frequencies, strict=True):
        shares = 100 * np.array([row[chosen] for row in panel.values()])
        image = axes.imshow(shares, norm=PowerNorm(0.5), aspect="auto", cmap="magma_r")
        axes.set_yticks(range(len(panel)), list(panel), fontsize=7)
        axes.set_xticks([])
        figure.colorbar(image, ax=axes, label="% of G-grams")
    grid[-1].set_xticks(range(len(chosen)), [names[i] for i in chosen], rotation=90, fontsize=6)
    figure.savefig(path, dpi=120)
