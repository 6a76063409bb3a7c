"""Pictures of the G-grams in data sets, among them the paper's Figure 2."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dnazen.analysis.stats_counts import NgramStatistics
from dnazen.ngram.vocab import NgramVocabulary

_HEATMAP_NGRAMS = 60


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
