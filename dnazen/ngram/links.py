"""Which pairs of neighbouring tokens belong together, by their pointwise mutual information; paper section 2.1."""

from typing import NamedTuple

import numpy as np

from dnazen.ngram.count import PairCounts, token_size


class Links(NamedTuple):
    """The linked pairs, and what their PMI is computed from."""

    token_counts: np.ndarray  # int64 [2 ** bits], of all tokens
    num_pairs: int  # of neighbours, in all
    pairs: np.ndarray  # int64, codes as in `PairCounts`, rising
    pair_counts: np.ndarray  # int64, of `pairs`


def link_pairs(table: PairCounts, min_pmi: float, min_pair_count: int) -> Links:
    """Link the pairs that are seen at least `min_pair_count` times and have a PMI of at least `min_pmi` bits."""
    pairs = np.flatnonzero(table.pairs >= min_pair_count)
    links = Links(table.tokens, int(table.pairs.sum()), pairs, table.pairs[pairs])
    linked = measure_pmis(*links) >= min_pmi
    return links._replace(pairs=pairs[linked], pair_counts=links.pair_counts[linked])


def measure_pmis(token_counts: np.ndarray, num_pairs: int, pairs: np.ndarray, pair_counts: np.ndarray) -> np.ndarray:
    """PMI of each pair in `pairs`, fp64, in bits; the arguments are as in `Links`.

    `pmi(a, b) = log2 p(ab) - log2 p(a) - log2 p(b)`, with p(ab) the pair's share of all pairs of neighbours and p(a)
    the token's share of all tokens. In the two sequences ab and cd each pair has p = 1/2 and each token p = 1/4, so
    each PMI is -1 + 2 + 2 = 3 bits.
    """
    bits, num_tokens = token_size(token_counts), token_counts.sum()
    firsts, seconds = pairs >> bits, pairs & ((1 << bits) - 1)
    log_p = [np.log2(token_counts[tokens] / num_tokens) for tokens in (firsts, seconds)]
    return np.log2(pair_counts / num_pairs) - log_p[0] - log_p[1]
