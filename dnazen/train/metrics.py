"""What a training result is judged by: baselines on the same masked tokens, a loss curve, a readable report."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dnazen.data.shards import TokenSplit


class Score(NamedTuple):
    """Mean loss in nats and share of right first guesses over masked tokens."""

    loss: float
    accuracy: float


def count_tokens(
    split: TokenSplit, vocab_size: int, max_tokens: int = 20_000_000
) -> tuple[np.ndarray, np.ndarray]:
    """Counts of tokens `[V]` and of adjacent pairs `[V, V]` in the first `max_tokens` tokens of a split."""
    tokens_seen = 0
    unigrams = np.zeros(vocab_size, dtype=np.int64)
    pairs = np.zeros(vocab_size * vocab_size, dtype=np.int32)
    for tokens, offsets in split.shards:
        stop = int(np.searchsorted(offsets, max_tokens - tokens_seen, side="right")) - 1
        block = np.asarray(tokens[: offsets[stop]], dtype=np.int64)
        unigrams += np.bincount(block, minlength=vocab_size)
        inside = np.ones(max(len(block) - 1, 0), dtype=bool)
        inside[offsets[1:stop] - 1] = False
        codes, counts = np.unique(block[:-1][inside] * vocab_size + block[1:][inside], return_counts=True)
        pairs[codes] += counts.astype(np.int32)
        tokens_seen += len(block)
    return unigrams, pairs.reshape(vocab_size, vocab_size)


def baseline_scores(
    unigrams: np.ndarray, pairs: np.ndarray, batches: Iterable[dict[str, Any]], special_ids: list[int]
) -> dict[str, Score]:
    """What counting alone would score on the masked tokens of `batches`.

    `unigram` guesses by the frequency of tokens in the training split (one added to each count). `previous token` guesses by
    the frequency of what follows the token to the left, drawn towards the unigram; where that token is masked too,
    or special, it is the unigram. How strongly it is drawn is chosen on the same held-out tokens, which flatters it.

    Args:
        unigrams: token counts of the training split, `[V]`.
        pairs: counts of adjacent pairs, `[V, V]`, left token first.
        batches: packed batches with `input_ids` and `labels`.
        special_ids: ids that are never guessed.
    """
    weights = unigrams + 1.0
    weights[special_ids] = 0.0
    unigram = weights / weights.sum()
    left, truth = [], []
    for batch in batches:
        input_ids, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
        positions = np.flatnonzero(labels != -100)
        # the token to the left of a masked one is at least [CLS]; -1 where it tells nothing
        before = input_ids[positions - 1]
        left.append(np.where((labels[positions - 1] != -100) | np.isin(before, special_ids), -1, before))
        truth.append(labels[positions])
    left, truth = np.concatenate(left), np.concatenate(truth)
    if not len(truth):
        return {"unigram": Score(0.0, 0.0), "previous token": Score(0.0, 0.0)}
    base = Score(float(-np.log(unigram[truth]).mean()), float((truth == unigram.argmax()).mean()))

    known = left >= 0
    rows = pairs.sum(1, dtype=np.int64)
    best = base
    for strength in (10.0, 100.0, 1000.0, 10000.0):
        probability = unigram[truth].copy()
        counted = pairs[left[known], truth[known]] + strength * unigram[truth[known]]
        probability[known] = counted / (rows[left[known]] + strength)
        guess = np.full(len(truth), unigram.argmax())
        for token in np.unique(left[known]):
            guess[left == token] = (pairs[token] + strength * unigram).argmax()
        score = Score(float(-np.log(probability).mean()), float((guess == truth).mean()))
        best = min(best, score)
    return {"unigram": base, "previous token": best}


def plot_loss_curve(path: Path, log_history: list[dict[str, Any]], baselines: dict[str, Score], title: str) -> None:
    """Write a PNG: training and held-out loss over steps, with the baselines as lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    for (name, score), style in zip(baselines.items(), ("--", ":"), strict=True):
        axes.axhline(score.loss, color="grey", linestyle=style, label=f"baseline: {name}")
    axes.set(xlabel="step", ylabel="masked-token loss (nats)", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, format="png")


def format_scores(scores: dict[str, Score], held_out: str) -> str:
    """A table of losses and accuracies; the first row is the model, the others are baselines."""
    width = max(len(name) for name in scores)
    lines = [f"Masked tokens of {held_out}:", f"  {'':{width}}    loss  perplexity  accuracy"]
    for name, score in scores.items():
        lines.append(f"  {name:{width}}  {score.loss:6.3f}  {np.exp(score.loss):10.1f}  {100 * score.accuracy:6.2f} %")
    return "\n".join(lines)
