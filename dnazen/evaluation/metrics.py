"""What a training result is judged by: hidden tokens, bits per base, intervals, and words that claim no more."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dnazen.evaluation.targets import Scores, Targets

_RESAMPLES = 2_000
FEWEST_SEQUENCES = 10  # for which an interval means something
_WITHOUT_NGRAMS = "its G-grams hidden"


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ({self.low:.4f} to {self.high:.4f})"


class Score(NamedTuple):
    """Of one model on the hidden tokens: bits per base, share of right first guesses, and loss in nats per token."""

    bits_per_base: Estimate
    accuracy: Estimate
    loss: float


class Comparison(NamedTuple):
    """A trained model beside what counting says, on the same hidden tokens.

    Attributes:
        scores: the model's first, then those of the baselines.
        advantage: bits per base that the model is better than the best baseline.
        ngram_advantage: bits per base that it would be worse without its G-grams; None if it was trained without any.
    """

    scores: dict[str, Score]
    best_baseline: str
    advantage: Estimate
    ngram_advantage: Estimate | None
    num_targets: int
    num_sequences: int

    def to_json(self) -> dict[str, Any]:
        """The same in dictionaries."""

        def plain(value: Any) -> Any:
            if hasattr(value, "_asdict"):
                return {name: plain(field) for name, field in value._asdict().items()}
            return {name: plain(field) for name, field in value.items()} if isinstance(value, dict) else value

        return plain(self)

    def verdict(self) -> str:
        """What the figures show, in a sentence or two."""
        name = next(iter(self.scores))
        gain = self.advantage
        if self.num_sequences < FEWEST_SEQUENCES:
            text = f"{self.num_sequences} sequences are too few to tell {name} from counting."
        elif gain.low > 0:
            text = f"{name} predicts hidden tokens better than counting: {gain.mean:.4f} bits per base"
            text += f" ({gain.low:.4f} to {gain.high:.4f}) below the best baseline, {self.best_baseline}."
        elif gain.high < 0:
            text = f"{name} does not predict hidden tokens as well as counting: {-gain.mean:.4f} bits per base"
            text += f" ({-gain.high:.4f} to {-gain.low:.4f}) above the best baseline, {self.best_baseline}."
            if self._has_learnt_no_order():
                text += " It is no better than the frequencies of tokens: of their order it has learnt nothing yet."
        else:
            text = f"{name} and the best baseline, {self.best_baseline}, cannot be told apart on so few hidden tokens:"
            text += f" a difference of {gain.mean:.4f} bits per base ({gain.low:.4f} to {gain.high:.4f})."
        if self.ngram_advantage is not None and self.num_sequences >= FEWEST_SEQUENCES:
            hidden = self.ngram_advantage
            effect = "worse" if hidden.low > 0 else "better" if hidden.high < 0 else "no difference that could be told"
            text += f"\nWith its G-grams hidden: {effect}, {hidden.mean:+.5f} bits per base"
            text += f" ({hidden.low:+.5f} to {hidden.high:+.5f})."
        return text

    def _has_learnt_no_order(self) -> bool:
        model, unigram = next(iter(self.scores.values())), self.scores["unigram"]
        return model.bits_per_base.mean >= unigram.bits_per_base.mean - 1e-3

    def table(self) -> str:
        """The scores, a line each."""
        width = max(map(len, self.scores))
        lines = [f"  {'':{width}}  bits per base                accuracy  loss (nats)"]
        for name, (bits, accuracy, loss) in self.scores.items():
            lines.append(f"  {name:{width}}  {bits!s:27} {100 * accuracy.mean:6.2f} %  {loss:11.3f}")
        return "\n".join(lines)


def compare(
    name: str, model: Scores, baselines: dict[str, Scores], targets: Targets, without_ngrams: Scores | None = None
) -> Comparison:
    """Hold a model against counting.

    Intervals are 95 % percentile bootstrap intervals over `targets.sequence`, for the tokens of one sequence are not
    independent; the same resamples for all, so that differences are paired.

    Args:
        name: of the model.
        model, baselines, without_ngrams: scores of the same targets; the last with the model's G-grams hidden.
    """
    bases = targets.length.astype(np.float64)
    rows = {name: model}
    if without_ngrams is not None:
        rows[f"{name}, {_WITHOUT_NGRAMS}"] = without_ngrams
    rows |= baselines
    _, sequence = np.unique(targets.sequence, return_inverse=True)
    num_sequences = int(sequence.max(initial=-1)) + 1

    def by_sequence(values: np.ndarray) -> np.ndarray:
        return np.bincount(sequence, weights=values, minlength=num_sequences)

    generator = np.random.default_rng(0)
    draws = generator.multinomial(num_sequences, np.full(num_sequences, 1 / num_sequences), _RESAMPLES)
    drawn_bases, drawn_count = draws @ by_sequence(bases), draws @ by_sequence(np.ones(len(bases)))

    def estimate(values: np.ndarray, total: float, drawn_total: np.ndarray) -> Estimate:
        low, high = np.percentile(draws @ by_sequence(values) / drawn_total, [2.5, 97.5])
        return Estimate(float(values.sum() / total), float(low), float(high))

    def bits(losses: np.ndarray) -> Estimate:
        return estimate(losses / np.log(2), bases.sum(), drawn_bases)

    scores = {
        row: Score(
            bits(scored.loss),
            estimate(scored.correct.astype(np.float64), len(bases), drawn_count),
            float(scored.loss.mean()),
        )
        for row, scored in rows.items()
    }
    best = min(baselines, key=lambda row: baselines[row].loss.sum())
    return Comparison(
        scores,
        best,
        bits(baselines[best].loss - model.loss),
        None if without_ngrams is None else bits(without_ngrams.loss - model.loss),
        len(bases),
        num_sequences,
    )


def plot_loss_curve(path: Path, log_history: list[dict[str, Any]], comparison: Comparison) -> None:
    """Write a PNG: loss on hidden tokens over steps, in training and held out, with the baselines as lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    name = next(iter(comparison.scores))
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("hidden_loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    baselines = {row: score for row, score in comparison.scores.items() if not row.startswith(name)}
    for (row, score), style in zip(baselines.items(), ("--", ":", "-.", (0, (1, 4))), strict=True):
        axes.axhline(score.loss, color="grey", linestyle=style, label=row)
    losses = [score.loss for score in baselines.values()]
    evaluated = [entry["eval_loss"] for entry in log_history if "eval_loss" in entry]
    span = max(losses) - min([*losses, *evaluated])
    axes.set_ylim(min([*losses, *evaluated]) - 0.1 * span, max(losses) + 0.25 * span)
    axes.set(xlabel="step", ylabel="loss on hidden tokens (nats)", title=name)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, format="png")
