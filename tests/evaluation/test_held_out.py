"""What two comparisons have in common is scored once, and each is what it would be by itself."""

import numpy as np
import pytest
import torch

from dnazen.batches.collator import PackedCollator, PackedDataset
from dnazen.data.corpus import Corpus
from dnazen.evaluation import held_out
from dnazen.evaluation.held_out import (
    HELD_OUT_MASKING,
    choose_sequences,
    evaluate_split,
    evaluation_batches,
    score_model,
)
from dnazen.evaluation.targets import Spelling, collect_targets
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM
from dnazen.ngram.vocab import load_ngrams


@pytest.mark.parametrize("wanted", [150, 300, 700])
def test_each_comparison_is_that_of_its_sequences_alone(prepared, monkeypatch, wanted):
    """Of few, or of several maskings, whatever the other takes."""
    monkeypatch.setattr(held_out, "WANTED_TARGETS", wanted)
    corpus = Corpus.open(prepared.corpus)
    split, tokenizer, vocabulary = corpus.validation, corpus.tokenizer, load_ngrams(prepared.ngrams, corpus)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    torch.manual_seed(0)
    config = DNAZenConfig(vocab_size=256, ngram_vocab_size=vocabulary.vocab_size, num_hidden_ngram_layers=1, **size)
    model = DNAZenForMaskedLM(config).eval()
    # a third of the sequences share something with the training text
    numbers, shares = np.arange(len(split)), np.arange(len(split)) % 3 == 0
    monkeypatch.setattr(held_out, "_count_shared", lambda *_: (numbers, shares.astype(int), np.ones(len(split), int)))
    evaluation = evaluate_split("a model", model, tokenizer, vocabulary, corpus.train, split)
    assert evaluation.overlap == shares.mean()
    dataset = PackedDataset(split, PackedCollator(tokenizer, vocabulary, HELD_OUT_MASKING))
    for found, candidates in ((evaluation.comparison, numbers), (evaluation.apart, numbers[~shares])):
        sample = choose_sequences(split, candidates)
        micro_batches = evaluation_batches(split, [sample], 8192)
        batches = [dataset[micro_batch][0] for micro_batch in micro_batches]
        pairs = zip(batches, (micro_batch.sequences for micro_batch in micro_batches))
        targets = collect_targets(pairs, Spelling(tokenizer), tokenizer.all_special_ids)
        assert set(targets.sequence) <= set(candidates) and found.num_targets == len(targets.truth) > 100
        # the mean of some hundred fp32 losses, of batches packed otherwise
        assert found.scores["a model"].loss == pytest.approx(score_model(model, batches).loss.mean(), rel=1e-6)
