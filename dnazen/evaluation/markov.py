"""A Markov model of bases, interpolated over its orders, that guesses the token between two stretches of bases."""

import math

import numpy as np

from dnazen.evaluation.targets import CONTEXT_BASES, UNKNOWN, Spelling, Targets

MAX_ORDER = CONTEXT_BASES  # 4^11 counts
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)  # to choose from; see `markov_probabilities`


def longest_kmer(num_bases: int) -> int:
    """The longest k-mers worth counting in so many bases: one base longer than those the text could hold once each."""
    return min(MAX_ORDER, int(math.log(max(num_bases, 4), 4))) + 1


def count_kmers(bases: np.ndarray, longest: int) -> list[np.ndarray]:
    """Counts `[4^k]` of the k-mers of a text and of its reverse complement, for k = 1 to `longest`.

    Args:
        bases: codes 0 to 3, and 4 where the text is interrupted.
    """
    reverse = np.where(bases == UNKNOWN, UNKNOWN, 3 - bases)[::-1]
    text = np.concatenate([bases, [UNKNOWN], reverse]).astype(np.int64)
    code, whole = np.zeros(len(text), dtype=np.int64), np.ones(len(text), dtype=bool)
    counts = []
    for k in range(1, longest + 1):  # k-mers that end at each base
        code = (code if k == 1 else code[:-1] * 4) + (text[k - 1 :] & 3)
        whole = (whole if k == 1 else whole[:-1]) & (text[k - 1 :] != UNKNOWN)
        counts.append(np.bincount(code[whole], minlength=4**k).astype(np.int32))
    return counts


def markov_probabilities(kmers: list[np.ndarray], strengths: list[float]) -> list[np.ndarray]:
    """p(base | the k bases before it) for k = 0 to `len(strengths)`, `[4^k, 4]` each.

    Each order is drawn towards the one below, as if that had been seen `strengths[k - 1]` times in each context.
    """
    tables = [((kmers[0] + 1.0) / (kmers[0].sum() + 4.0)).reshape(1, 4)]
    for counts, strength in zip(kmers[1:], strengths):
        counts = counts.reshape(-1, 4)
        lower = np.tile(tables[-1], (4, 1))  # without its first, farthest base
        tables.append((counts + strength * lower) / (counts.sum(1, keepdims=True) + strength))
    return tables


def choose_strengths(fit: list[np.ndarray], tune: list[np.ndarray]) -> list[float]:
    """For each order, while it helps, the strength with which `fit` predicts `tune` best."""
    strengths: list[float] = []
    lowest = math.inf
    for k in range(1, len(fit)):
        seen = tune[k].reshape(-1, 4)
        losses = {}
        for strength in STRENGTHS:
            probabilities = markov_probabilities(fit[: k + 1], [*strengths, strength])[-1]
            losses[strength] = -(seen * np.log(probabilities)).sum() / max(seen.sum(), 1)
        best = min(losses, key=losses.__getitem__)
        if losses[best] >= lowest:
            break
        lowest = losses[best]
        strengths.append(best)
    return strengths


class MarkovModel:
    """A Markov model of bases that guesses tokens between two stretches of bases.

    Args:
        probabilities: see `markov_probabilities`.
        spelling: of the tokens.
    """

    def __init__(self, probabilities: list[np.ndarray], spelling: Spelling):
        self.order = len(probabilities) - 1
        self.spelling = spelling
        # all orders behind one another: that of order k starts at (4^(k + 1) - 4) / 3
        self._logs = np.log(np.concatenate([table.ravel() for table in probabilities])).astype(np.float32)
        self._starts = np.array([(4 ** (k + 1) - 4) // 3 for k in range(self.order + 1)])
        nothing = np.full((1, MAX_ORDER), UNKNOWN, dtype=np.uint8)
        self._alone = self._chain(nothing, nothing)

    def gain(self, targets: Targets) -> np.ndarray:
        """log p(left, token, right) / p(left) p(token) for each target and token, but for a constant, `[n, V]`."""
        maskable = self.spelling.maskable
        chain = self._chain(targets.left_bases, targets.right_bases) - self._alone
        # what has no bases fits nowhere better than the worst of what has
        gain = np.repeat(chain.min(1, keepdims=True), len(self.spelling.lengths), axis=1)
        gain[:, maskable] = chain
        return gain

    def _chain(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """log p(token's bases, then `right` | `left`) for each maskable token, `[n, maskable]`."""
        maskable = self.spelling.maskable
        lengths, bases = self.spelling.lengths[maskable], self.spelling.bases[maskable].astype(np.int64)
        known = (left != UNKNOWN).sum(1)
        powers = 4 ** np.arange(left.shape[1])[::-1]
        context = (np.where(left == UNKNOWN, 0, left) * powers).sum(1) % 4**self.order
        shape = len(left), len(maskable)
        codes = np.broadcast_to(context[:, None], shape).copy()
        orders = np.broadcast_to(np.minimum(known, self.order)[:, None], shape).copy()
        total = np.zeros(shape, dtype=np.float32)

        def read(columns: slice, base: np.ndarray, rows: np.ndarray | slice = slice(None)) -> None:
            order, code = orders[rows, columns], codes[rows, columns]
            # the code holds no more bases than the order has, for unknown ones are 0
            following = code * 4 + base
            total[rows, columns] += self._logs[self._starts[order] + following]
            codes[rows, columns] = following % 4**self.order
            orders[rows, columns] = np.minimum(order + 1, self.order)

        for step in range(int(lengths.max())):
            first = int(np.searchsorted(lengths, step + 1))
            read(slice(first, None), bases[first:, step])
        for step in range(min(right.shape[1], self.order)):
            rows = np.flatnonzero(right[:, step] != UNKNOWN)
            if len(rows):
                read(slice(None), right[rows, step, None].astype(np.int64), rows)
        return total
