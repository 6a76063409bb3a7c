"""PMI extraction against counting by hand, the paper's example, and planted motifs."""

import collections
import math
import os
import signal
import time
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dnazen.data.corpus import Corpus, build_corpus
from dnazen.data.tokenizer import load_tokenizer
from dnazen.files import InputError
from dnazen.ngram import count
from dnazen.ngram.count import find_pieces
from dnazen.ngram.extract import extract_ngrams


def extract_slowly(sequences, min_pmi, min_count, min_pair_count, min_len, max_len, long_pieces):
    """[(ngram, count, smallest pmi)] in the order of ids, pieces by length, and number of candidates."""
    tokens = collections.Counter(token for sequence in sequences for token in sequence)
    pairs = collections.Counter(pair for sequence in sequences for pair in zip(sequence, sequence[1:], strict=False))

    def pmi(a, b):
        p_pair = pairs[a, b] / sum(pairs.values())
        p_a, p_b = tokens[a] / sum(tokens.values()), tokens[b] / sum(tokens.values())
        return math.log2(p_pair) - math.log2(p_a) - math.log2(p_b)

    pieces = []
    for sequence in sequences:
        piece = []
        for i, token in enumerate(sequence):
            if i > 0:
                pair = (sequence[i - 1], token)
                if pmi(*pair) < min_pmi or pairs[pair] < min_pair_count:
                    pieces.append(tuple(piece))
                    piece = []
            piece.append(token)
        pieces.append(tuple(piece))
    candidates = set()
    for piece in pieces:
        if len(piece) > max_len and long_pieces == "split":
            candidates.update(piece[i : i + max_len] for i in range(0, len(piece), max_len))
        else:
            candidates.add(piece)
    candidates = {ngram for ngram in candidates if min_len <= len(ngram) <= max_len}
    counts = {
        ngram: sum(tuple(sequence[i : i + len(ngram)]) == ngram for sequence in sequences for i in range(len(sequence)))
        for ngram in candidates
    }
    kept = [ngram for ngram in candidates if counts[ngram] >= min_count]
    kept.sort(key=lambda ngram: (-counts[ngram], ngram))
    weakest = [min(pmi(a, b) for a, b in zip(ngram, ngram[1:], strict=False)) for ngram in kept]
    lengths = collections.Counter(map(len, pieces))
    return kept, [counts[ngram] for ngram in kept], weakest, lengths, len(candidates)


def make_shard(sequences):
    offsets = np.cumsum([0] + [len(sequence) for sequence in sequences])
    return np.array([token for sequence in sequences for token in sequence], np.uint16), offsets


@st.composite
def corpora(draw):
    """Sequences made of words over few tokens, so that some pairs are tied and pieces of every length come up."""
    vocab_size = draw(st.sampled_from([6, 16, 100]))
    token = st.integers(0, vocab_size - 1)
    words = draw(st.lists(st.lists(token, min_size=1, max_size=8), min_size=1, max_size=6))
    sequence = st.lists(st.sampled_from(words) | st.lists(token, max_size=2), max_size=8).map(lambda ws: sum(ws, []))
    return vocab_size, draw(st.lists(st.lists(sequence, max_size=12), min_size=1, max_size=3))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    corpora(),
    # No whole number: there a PMI can equal the threshold, and rounding would decide.
    st.sampled_from([-3.3, 0.37, 1.2347, 2.718]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([(2, 5), (2, 3), (3, 4), (2, 2)]),
    st.sampled_from(["drop", "split"]),
)
def test_extraction_equals_slow_extraction(corpus, min_pmi, min_count, min_pair_count, bounds, long_pieces):
    vocab_size, shards = corpus
    sequences = [sequence for shard in shards for sequence in shard]
    options = dict(min_pmi=min_pmi, min_count=min_count, min_pair_count=min_pair_count, long_pieces=long_pieces)
    options |= dict(min_len=bounds[0], max_len=bounds[1])
    if not sequences:
        with pytest.raises(InputError, match="number of sequences: expected at least 1, found 0"):
            extract_ngrams([make_shard(shard) for shard in shards], vocab_size=vocab_size, **options)
        return
    found = extract_ngrams([make_shard(shard) for shard in shards], vocab_size=vocab_size, **options)
    ngrams, counts, pmis, pieces, num_candidates = extract_slowly(sequences, **options)
    assert found.ngrams == ngrams
    assert found.counts == counts
    # Three logarithms below 20 in size, each to a few units of 2^-53 of its size.
    assert found.pmis == pytest.approx(pmis, abs=1e-12)
    assert found.num_candidates == num_candidates
    assert found.num_pieces == {n: pieces[n] for n in range(2, bounds[1] + 1)}
    assert found.num_long_pieces == sum(number for n, number in pieces.items() if n > bounds[1])
    assert found.num_tokens == sum(map(len, sequences))
    assert found.num_pairs == sum(max(0, len(sequence) - 1) for sequence in sequences)


def make_sequences():
    """300 sequences made of 40 words of 2 to 8 tokens."""
    rng = np.random.default_rng(0)
    words = [rng.integers(5, 60, rng.integers(2, 9)).tolist() for _ in range(40)]
    return [sum((words[i] for i in rng.integers(0, 40, 20)), []) for _ in range(300)]


@pytest.mark.slow
@pytest.mark.parametrize("long_pieces", ["drop", "split"])
def test_extraction_same_for_any_blocks_and_workers(monkeypatch, long_pieces):
    sequences = make_sequences()
    options = dict(vocab_size=64, min_pmi=1.5, long_pieces=long_pieces)
    whole = extract_ngrams([make_shard(sequences)], **options)
    assert len(whole.ngrams) > 20
    monkeypatch.setattr(count, "BLOCK_TOKENS", 1000)
    shards = [make_shard(sequences[:7]), make_shard(sequences[7:200]), make_shard(sequences[200:])]
    assert extract_ngrams(shards, **options) == whole
    for num_workers in (2, 3):
        assert extract_ngrams(shards, **options, num_workers=num_workers) == whole


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"long_pieces": "split", "min_len": 3}, {"max_len": 2}, {"min_pmi": -9.0}])
def test_extraction_same_on_a_gpu(monkeypatch, options):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(count, "BLOCK_TOKENS", 1000)
    shards = [make_shard(make_sequences()), make_shard([[], [5]])]
    options = dict(vocab_size=64, min_pmi=1.5) | options
    expected = extract_ngrams(shards, **options)
    assert len(expected.ngrams) > 5
    assert extract_ngrams(shards, **options, device="cuda") == expected


def test_device_that_cannot_be_used_is_refused(monkeypatch):
    shards = [make_shard([[5, 6, 7]])]
    with pytest.raises(InputError, match="device: expected cpu or cuda, found mps"):
        extract_ngrams(shards, vocab_size=16, device="mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device: expected a CUDA device for cuda, found none"):
        extract_ngrams(shards, vocab_size=16, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="num_workers: expected 1 with device cuda .* found 2"):
        extract_ngrams(shards, vocab_size=16, device="cuda", num_workers=2)


def test_tokens_in_a_file_or_in_a_part_of_one(tmp_path):
    rng = np.random.default_rng(1)
    tokens, offsets = make_shard([rng.integers(5, 12, 50).tolist() for _ in range(40)])
    np.save(tmp_path / "whole.npy", tokens)
    np.save(tmp_path / "longer.npy", np.concatenate((tokens[::-1], tokens)))
    options = dict(vocab_size=16, min_pmi=0.1, min_count=1, min_pair_count=1)
    expected = extract_ngrams([(tokens, offsets)], **options)
    assert len(expected.ngrams) > 20
    whole = np.load(tmp_path / "whole.npy", mmap_mode="r")
    part = np.load(tmp_path / "longer.npy", mmap_mode="r")[len(tokens) :]
    assert extract_ngrams([(whole, offsets)], **options) == expected
    assert extract_ngrams([(part, offsets)], **options) == expected


def test_paper_example():
    """Section 2.1: ATA / CGGT / TGTA / GGTT / AGGA under a threshold of 1."""
    tokens = ["ATA", "CGGT", "TGTA", "GGTT", "AGGA"]
    starts, sizes = find_pieces(torch.tensor([0.7, 1.3, 1.1, 0.1]) >= 1)
    pieces = [tokens[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    assert pieces == [["CGGT", "TGTA", "GGTT"]]


def test_threshold_itself_links():
    """`pmi < threshold` cuts: 4 tokens of one pair each give pmi exactly log2(1/2) - 2 log2(1/4) = 3."""
    shard = make_shard([[5, 6], [7, 8]])
    options = dict(vocab_size=16, min_count=1, min_pair_count=1)
    assert extract_ngrams([shard], min_pmi=3.0, **options).ngrams == [(5, 6), (7, 8)]
    assert extract_ngrams([shard], min_pmi=3.0 + 1e-9, **options).ngrams == []


def test_ties_go_by_token_ids_prefix_first():
    shard = make_shard([[9, 5], [5, 9], [5, 9, 0]] + [[11 + i] for i in range(99)])
    found = extract_ngrams([shard], vocab_size=128, min_count=1, min_pair_count=1)
    assert dict(zip(found.ngrams, found.counts, strict=True)) == {(5, 9): 2, (5, 9, 0): 1, (9, 5): 1}
    assert found.ngrams == [(5, 9), (5, 9, 0), (9, 5)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_len": 1}, "min_len and max_len: expected 2 <= min_len <= max_len <= 5, found 1 and 5"),
        ({"min_len": 4, "max_len": 3}, "found 4 and 3"),
        ({"max_len": 6}, "found 2 and 6"),
        ({"min_pmi": math.nan}, "min_pmi: expected a number of bits, found nan"),
        ({"long_pieces": "keep"}, "long_pieces: expected 'drop' or 'split', found 'keep'"),
        ({"min_count": 0}, "min_count: expected at least 1, found 0"),
        ({"min_pair_count": 0}, "min_pair_count: expected at least 1, found 0"),
        ({"num_workers": 0}, "num_workers: expected at least 1, found 0"),
        ({"vocab_size": 5000}, "need 68 bits, but a key has 63"),
        ({"vocab_size": 7}, "shard 0, tokens 0 to 2: expected token ids below 7, found 7"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_extraction_refuses(options, message):
    with pytest.raises(InputError, match=message):
        extract_ngrams([make_shard([[5, 6, 7]])], **{"vocab_size": 16, **options})


@pytest.mark.parametrize("num_workers", [1, 2])
def test_extraction_error_in_a_worker_reaches_the_user(num_workers):
    shards = [make_shard([[5, 6]]), make_shard([[5, 99]])]
    with pytest.raises(InputError, match="shard 1, tokens 0 to 1: expected token ids below 16, found 99"):
        extract_ngrams(shards, vocab_size=16, num_workers=num_workers)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("stage", ["_count_pairs", "_count_runs"])
def test_killed_worker_is_an_error(monkeypatch, stage):
    """Also where a connection takes its time to close: two threads that close one would be in each other's way."""
    close = Connection._close
    monkeypatch.setattr(Connection, "_close", lambda self: (time.sleep(0.05), close(self)))
    monkeypatch.setattr(count, stage, lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match="a worker was killed, perhaps for want of memory: use a lower --num-workers"):
        extract_ngrams([make_shard([[5, 6]]), make_shard([[5, 6]])], vocab_size=16, num_workers=2)


def test_planted_motifs_come_back(tmp_path, shared_data):
    """Motifs planted in random bases, and cut by the tokenizer as it likes, are found as G-grams."""
    rng = np.random.default_rng(0)
    motifs = ["".join(rng.choice(list("ACGT"), 24)) for _ in range(6)]
    parts = []
    for i in range(1200):
        parts += ["".join(rng.choice(list("ACGT"), int(rng.integers(60, 100)))), motifs[i % 6]]
    (tmp_path / "genome.fa").write_text(">planted\n" + "".join(parts) + "\n")
    tokenizer = load_tokenizer(shared_data / "tokenizer")
    build_corpus([tmp_path / "genome.fa"], tokenizer, tmp_path / "corpus", num_workers=1)
    corpus = Corpus.open(tmp_path / "corpus")
    found = extract_ngrams(corpus.train.shards, vocab_size=len(tokenizer), min_count=20)
    spelled = ["".join(tokenizer.convert_ids_to_tokens(ngram)) for ngram in found.ngrams]
    inside = [bases for bases in spelled if any(bases in motif for motif in motifs)]
    for motif in motifs:
        starts = [(motif.find(bases), len(bases)) for bases in inside if bases in motif]
        covered = {i for start, size in starts for i in range(start, start + size)}
        # BPE merges a motif's ends with the random bases beside it in many ways; its core is cut one way only.
        assert len(covered) >= 10, f"{motif}: {covered}"
    in_or_across = [b for b in spelled if any(b in motif or _overlap(b, motif) >= 8 for motif in motifs)]
    assert len(in_or_across) >= 0.9 * len(spelled)


def _overlap(bases: str, motif: str) -> int:
    """Bases of the longest run that both have."""
    runs = (motif[i:j] for i in range(len(motif)) for j in range(i + 1, len(motif) + 1))
    return max((len(run) for run in runs if run in bases), default=0)
