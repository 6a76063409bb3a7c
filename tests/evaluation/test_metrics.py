"""Tables, intervals and words of a comparison with counting."""

import json
import math

import numpy as np
import pytest

from dnazen.evaluation.metrics import compare
from dnazen.evaluation.targets import Scores, Targets


def make_targets(sequences: int = 60, each: int = 20) -> Targets:
    n = sequences * each
    nothing = np.full(n, -1)
    return Targets(
        np.zeros(n, dtype=int), np.repeat(np.arange(sequences), each) * 7, np.tile([2, 6], n // 2), nothing, nothing,
        np.full((n, 10), 4), np.full((n, 10), 4),
    )  # fmt: skip


def scores(mean: float, seed: int, targets: Targets) -> Scores:
    generator = np.random.default_rng(seed)
    loss = mean + generator.normal(0, 0.5, len(targets.truth))
    return Scores(loss, generator.random(len(loss)) < 0.2)


def test_bits_per_base_divide_all_bits_by_all_bases():
    """A uniform guess among 4^4 = 256 tokens of 2 or 6 bases: 8 bits a token, 4 bases a token, 2 bits a base."""
    targets = make_targets()
    uniform = Scores(np.full(len(targets.truth), math.log(256)), np.zeros(len(targets.truth), dtype=bool))
    comparison = compare("model", uniform, {"unigram": uniform}, targets)
    assert comparison.scores["model"].bits_per_base.mean == pytest.approx(2.0)
    assert comparison.scores["model"].loss == pytest.approx(math.log(256))
    assert comparison.advantage.mean == comparison.advantage.low == comparison.advantage.high == 0


@pytest.mark.slow
def test_intervals_hold_the_mean_of_the_population_as_often_as_they_say():
    """Sequences that differ: 95 % of the intervals of 200 experiments hold the truth, within five sigma."""
    hits, targets = 0, make_targets(sequences=40, each=4)
    for seed in range(200):
        generator = np.random.default_rng(seed)
        loss = 3 + np.repeat(generator.normal(0, 0.4, 40), 4) + generator.normal(0, 0.2, 160)
        row = Scores(loss, np.zeros(160, dtype=bool))
        estimate = compare("model", row, {"unigram": row}, targets).scores["model"].bits_per_base
        hits += estimate.low <= 3 / math.log(2) / 4 <= estimate.high
    # a percentile interval of 40 sequences is a little short, some 94 %
    assert abs(hits - 0.94 * 200) < 5 * math.sqrt(200 * 0.94 * 0.06)


def test_differences_are_paired():
    """A model that is a little better on every token is told apart however much the tokens differ."""
    targets = make_targets()
    baseline = scores(4.0, 0, targets)
    model = Scores(baseline.loss - 0.01, baseline.correct)
    comparison = compare("model", model, {"unigram": scores(5.0, 1, targets), "both neighbors": baseline}, targets)
    assert comparison.best_baseline == "both neighbors"
    own = comparison.scores["model"].bits_per_base
    assert own.high - own.low > 10 * (comparison.advantage.high - comparison.advantage.low)
    assert comparison.advantage.mean == pytest.approx(0.01 / math.log(2) / 4)
    assert comparison.verdict().startswith("model predicts hidden tokens better than counting: ")


@pytest.mark.parametrize(
    ("model", "unigram", "best", "words"),
    [
        (5.0, 5.0, 4.0, ("does not predict", "of their order it has learnt nothing yet")),
        (4.5, 5.0, 4.0, ("does not predict",)),
        (4.0, 5.0, 4.0, ("cannot be told apart",)),
        (3.5, 5.0, 4.0, ("better than counting",)),
    ],
)
def test_the_verdict_says_what_the_intervals_show(model, unigram, best, words):
    targets = make_targets()
    base = scores(unigram, 1, targets)
    both = scores(best, 3, targets)
    # equal to one of them on the whole, but not on each sequence
    apart = np.where(targets.sequence % 2, 0.3, -0.3)
    row = base if model == unigram else both if model == best else scores(model, 2, targets)
    row = Scores(row.loss + apart * (model in (unigram, best)), row.correct)
    comparison = compare("model", row, {"unigram": base, "both neighbors": both}, targets)
    assert all(word in comparison.verdict() for word in words)
    assert ("learnt nothing" in comparison.verdict()) == ("of their order it has learnt nothing yet" in words)


def test_what_ngrams_are_worth_is_said_beside():
    targets = make_targets()
    model = scores(4.0, 0, targets)
    worse = Scores(model.loss + 0.1, model.correct)
    comparison = compare("model", model, {"unigram": scores(5.0, 1, targets)}, targets, without_ngrams=worse)
    assert comparison.ngram_advantage.low > 0 and "With its G-grams hidden: worse" in comparison.verdict()
    assert "model, its G-grams hidden" in comparison.table()
    plain = json.loads(json.dumps(comparison.to_json()))
    assert plain["scores"]["unigram"]["bits_per_base"]["mean"] == comparison.scores["unigram"].bits_per_base.mean


def test_few_sequences_are_not_judged():
    targets = make_targets(sequences=3)
    baseline = scores(4.0, 0, targets)
    comparison = compare("model", Scores(baseline.loss - 1, baseline.correct), {"unigram": baseline}, targets)
    assert comparison.verdict() == "3 sequences are too few to tell model from counting."
