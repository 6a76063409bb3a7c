"""Do G-grams hold known motifs more often than their shuffles do? How that is measured.

*Score.* A motif is laid on the bases of a G-gram at every offset, on both strands, and scored by its log-odds: bits,
over the G-grams' own base composition, the same for both strands. G-grams have some ten bases, motifs up to thirty, so
a motif may stand out at either end, as long as half of its information lies on the G-gram. The columns that stand out
score nothing. A G-gram *matches* where the columns on it score as high as one place in a thousand of random sequence
would. Motifs that are too short or vague for that match nothing, and are counted.

*Null.* What if the bases of a token came in no particular order? In each of R shuffled sets every token's bases are put
in random order once, and all G-grams are spelled anew with these tokens. With the tokens TATA and CG:

    real          TATA CG       TATA TATA     CG TATA
    one shuffle   ATTA GC       ATTA ATTA     GC ATTA

If the order meant nothing, the real set would be one like the others, so the p-values are right, whatever the G-grams
are. Why not shuffle each G-gram by itself? Then one token that happens to spell a motif would count as evidence from
every G-gram with it. With R sets no p-value is below 1 / (R + 1).

*Unit.* G-grams that spell the same bases, on either strand, count once: TATA CG, TAT ACG and, on the other strand, CG
TATA are one. In each shuffled set this is decided anew, where they may spell different bases, and others the same. So
two tokenisations of one spelling are no second match, but they may be two in a shuffled set: many of them make the test
conservative.

*Correction.* For hundreds of motifs Bonferroni or Benjamini-Hochberg would need R in the tens of thousands. The
family-wise p-value of Westfall and Young (1993, single-step maxT) does not: it is the share of sets, the real one among
them, whose most enriched motif is at least as enriched as this one. Enrichment is `2 (sqrt(matches + 3/8) -
sqrt(expected + 3/8))`, with `expected` the mean over all sets. Its spread is about 1 if matches come one by one. Where
the spread over all sets is larger, because matches hang on few common tokens and come in bursts, it is divided by that.
Similar motifs need no care: they share the shuffles.

*What it does not say.* Pairs of neighbouring bases are not kept: what makes CG rare and AA common within all tokens may
also make a motif rare or common. Tokens are shuffled apart although a tokenizer may have merged several from one
shorter token: what these share is still counted as evidence of its own. Short tokens have few orders, and those of one
base, once or repeated, a single one: what lies on them is the same in each set and cannot be found. The table names the
token that most matches lie on, and how many. The p-value of a single match is not corrected for anything.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dnazen.analysis.motif_files import Motif
from dnazen.defaults import SHUFFLES
from dnazen.files import InputError

MATCH_TAIL = 1e-3  # chance of a place in random sequence to score as high as a match
MIN_INFORMATION = 0.5  # share of a motif's information that must lie on the G-gram
BITS = 0.05  # scores are whole numbers of it, which float32 adds exactly
_CHUNK_SPELLINGS = 2048


class Matches(NamedTuple):
    """Pairs of motif and spelling that match, the best place of each.

    TATA on the G-gram GG TAT ACC has offset 2; a motif of 8 columns whose last 5 lie on its first 5 bases has -3.
    """

    motifs: np.ndarray  # int32
    ngrams: np.ndarray  # int32: the first G-gram that spells it
    scores: np.ndarray  # float32, bits
    margins: np.ndarray  # float32, in units of `BITS`: by how much the score is above what a match there needs
    offsets: np.ndarray  # int32: base of the G-gram on which the motif's leftmost column lies; below 0: before it
    reverse: np.ndarray  # bool: the motif lies on the other strand
    as_good: np.ndarray  # int32: in how many shuffled sets this G-gram matches the motif as well or better


@dataclass
class MotifEnrichment:
    """The result of `score_motifs` for M motifs."""

    hits: np.ndarray  # int64 [M]: different spellings that match
    expected: np.ndarray  # float64 [M]: mean over the real and the shuffled sets
    p_values: np.ndarray  # float64 [M]
    adjusted_p_values: np.ndarray  # float64 [M], family-wise
    enrichments: np.ndarray  # float64 [M]
    can_match: np.ndarray  # bool [M]
    matches: Matches


def score_motifs(
    ngrams: Sequence[Sequence[str]], motifs: Sequence[Motif], num_shuffles: int = SHUFFLES, seed: int = 0
) -> MotifEnrichment:
    """Match different G-grams, given as tokens of A, C, G, T, against motifs, and their shuffles too; see the module.

    Memory: a byte for each base of each different token in each set, the tables of one length of spelling, a chunk of
    2,048 spellings against them (some 100 MB for a thousand motifs), and some 30 bytes for each match. The result
    depends on `seed` and on the order in which the tokens first come.

    Raises:
        InputError: no G-gram or motif; fewer than 1 shuffle.
    """
    for name, value in (("ngrams", len(ngrams)), ("motifs", len(motifs)), ("num_shuffles", num_shuffles)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, found {value}")
    background = base_composition(ngrams)
    tables = [log_odds(motif, background) for motif in motifs]
    needed = [match_thresholds(motif, table, background) for motif, table in zip(motifs, tables, strict=True)]
    tokens = list(dict.fromkeys(token for ngram in ngrams for token in ngram))
    sets = shuffle_tokens(tokens, num_shuffles, np.random.default_rng(seed))
    ends = np.cumsum([len(token) for token in tokens])
    columns = {token: range(end - len(token), end) for token, end in zip(tokens, ends.tolist(), strict=True)}
    places = [[column for token in ngram for column in columns[token]] for ngram in ngrams]  # in `sets`
    hits = np.zeros((num_shuffles + 1, len(motifs)), np.int64)  # row 0: the real ones
    found: list[Matches] = []
    lengths = np.array([len(own) for own in places])
    options = dict(unit=" G-grams", unit_scale=True, total=len(ngrams), disable=None)
    with tqdm(desc="matching and shuffling", **options) as progress:
        for length in np.unique(lengths):
            scorer = _Scorer(tables, needed, int(length))
            numbers = np.flatnonzero(lengths == length)
            own_places = np.array([places[i] for i in numbers])
            codes = sets[0][own_places]
            different = np.sort(_unique_spellings(codes)[0])
            chunks = [different[i : i + _CHUNK_SPELLINGS] for i in range(0, len(different), _CHUNK_SPELLINGS)]
            parts = [(chunk, scorer.find(codes[chunk])) for chunk in chunks]
            parts = [part._replace(ngrams=chunk[part.ngrams].astype(np.int32)) for chunk, part in parts]
            matches = Matches(*map(np.concatenate, zip(*parts, strict=True)))
            np.add.at(hits[0], matches.motifs, 1)
            rows = np.searchsorted(scorer.motifs, matches.motifs)
            for number in range(1, num_shuffles + 1 if scorer.can_match else 1):
                codes = sets[number][own_places]
                different, spellings = _unique_spellings(codes)
                own = spellings[matches.ngrams]
                for first in range(0, len(different), _CHUNK_SPELLINGS):
                    margins = scorer.margins(codes[different[first : first + _CHUNK_SPELLINGS]])
                    hits[number, scorer.motifs] += (margins >= 0).sum(1)
                    here = np.flatnonzero((first <= own) & (own < first + _CHUNK_SPELLINGS))
                    matches.as_good[here] += margins[rows[here], own[here] - first] >= matches.margins[here]
            found.append(matches._replace(ngrams=numbers[matches.ngrams].astype(np.int32)))
            progress.update(len(numbers))
    expected = hits.mean(0)
    roots = 2 * np.sqrt(hits + 3 / 8)
    enrichments = (roots - 2 * np.sqrt(expected + 3 / 8)) / np.maximum(roots.std(0), 1)
    best = enrichments.max(1)
    return MotifEnrichment(
        hits=hits[0],
        expected=expected,
        p_values=(hits >= hits[0]).mean(0),
        adjusted_p_values=(best[:, None] >= enrichments[0]).mean(0),
        enrichments=enrichments[0],
        can_match=np.array([np.isfinite(thresholds).any() for thresholds in needed]),
        matches=Matches(*map(np.concatenate, zip(*found, strict=True))),
    )


def shuffle_tokens(tokens: Sequence[str], num_shuffles: int, rng: np.random.Generator) -> np.ndarray:
    """The bases of different tokens one after the other, uint8 `[num_shuffles + 1, bases]`, 0 to 3 for A, C, G, T.

    Row 0 is as given; in each other one the bases of each token are in random order.
    """
    letters = np.frombuffer("".join(tokens).encode(), np.uint8)
    sets = np.tile(np.searchsorted(np.frombuffer(b"ACGT", np.uint8), letters).astype(np.uint8), (num_shuffles + 1, 1))
    owners = np.repeat(np.arange(len(tokens)), [len(token) for token in tokens])
    for row in sets[1:]:
        row[:] = row[np.lexsort((rng.random(len(row)), owners))]
    return sets


def base_composition(ngrams: Sequence[Sequence[str]]) -> np.ndarray:
    """Shares of A, C, G, T in all G-grams, over both strands, `[4]`, each at least 1 %; shuffles do not change them."""
    counts = Counter("".join(token for ngram in ngrams for token in ngram))
    at, cg = counts["A"] + counts["T"], counts["C"] + counts["G"]
    at = np.clip(at / (at + cg), 0.02, 0.98) / 2
    return np.array([at, 0.5 - at, 0.5 - at, at])


def log_odds(motif: Motif, background: np.ndarray) -> np.ndarray:
    """Biopython's log-odds with its pseudocounts of sqrt(sites), in whole numbers of `BITS`, int64 `[width, 4]`."""
    from Bio import motifs
    from Bio.motifs import jaspar

    matrix = motifs.Motif(alphabet="ACGT", counts={base: motif.counts[:, i].tolist() for i, base in enumerate("ACGT")})
    matrix.background = dict(zip("ACGT", background.tolist(), strict=True))
    matrix.pseudocounts = jaspar.calculate_pseudocounts(matrix)
    return np.round(np.array([matrix.pssm[base] for base in "ACGT"]).T / BITS).astype(np.int64)


def match_thresholds(motif: Motif, table: np.ndarray, background: np.ndarray) -> np.ndarray:
    """What columns [first, end) of a motif must score for a match, in `BITS`; float64 `[width, width + 1]`.

    It is the lowest score that random sequence reaches with a chance of at most `MATCH_TAIL`; infinite where there
    is none, or where the columns hold too little of the motif's information.
    """
    information = column_information(motif)
    thresholds = np.full((len(table), len(table) + 1), np.inf)
    for first in range(len(table)):
        chances = np.ones(1)  # of the scores from the lowest possible one up
        for end in range(first + 1, len(table) + 1):
            rises = table[end - 1] - table[end - 1].min()
            more = np.zeros(len(chances) + rises.max())
            for rise, share in zip(rises, background, strict=True):
                more[rise : rise + len(chances)] += share * chances
            chances = more
            if information[first:end].sum() < MIN_INFORMATION * information.sum():
                continue
            # a chance that equals the limit but for rounding is within it
            reached = np.cumsum(chances[::-1])[::-1] <= MATCH_TAIL * (1 + 1e-9)
            scores = np.flatnonzero(reached & (chances > 0))
            if len(scores):
                thresholds[first, end] = scores[0] + table[first:end].min(1).sum()
    return thresholds


def column_information(motif: Motif) -> np.ndarray:
    """Bits that each position of a motif holds, `[width]`: 0 to 2."""
    shares = motif.counts / motif.counts.sum(1, keepdims=True)
    return 2 + (shares * np.log2(np.where(shares > 0, shares, 1))).sum(1)


class _Scorer:
    """Matches all spellings of one length against all motifs: one product of matrices.

    A column of the matrix is a motif's strand at an offset, where a match is possible at all.
    """

    def __init__(self, tables: Sequence[np.ndarray], needed: Sequence[np.ndarray], length: int):
        columns, places, scores = [], [], []
        for number, (table, thresholds) in enumerate(zip(tables, needed, strict=True)):
            width = len(table)
            for first, end in zip(*np.nonzero(np.isfinite(thresholds)), strict=True):
                # columns [first, end) lie on the spelling: inside it, or at the end where the motif stands out
                starts = range(length - (end - first) + 1)
                if end < width:
                    starts = starts[-1:] if first == 0 else starts[: len(starts) == 1]
                elif first > 0:
                    starts = starts[:1]
                for start in starts:
                    column = np.zeros((length, 4), np.float32)
                    column[start : start + end - first] = table[first:end]
                    for reverse in (False, True):
                        strand = column[::-1, ::-1] if reverse else column
                        offset = length - (start - first) - width if reverse else start - first
                        columns.append(np.append(strand, -thresholds[first, end]).astype(np.float32))
                        places.append((number, offset, reverse))
                        scores.append(thresholds[first, end])
        self.can_match = bool(columns)
        self._matrix = np.array(columns, np.float32).reshape(len(columns), 4 * length + 1)
        self._places = np.array(places, np.int32).reshape(-1, 3)
        self._needed = np.array(scores, np.float32)
        self.motifs, self._firsts = np.unique(self._places[:, 0], return_index=True)  # that can match; int32 [m]

    def margins(self, codes: np.ndarray) -> np.ndarray:
        """By how much the best place is above what it needs, in `BITS`, float32 `[m, n]`; a match is 0 or more."""
        return np.maximum.reduceat(self._scores(codes), self._firsts, axis=0)

    def find(self, codes: np.ndarray) -> Matches:
        """The matches in `codes [n, L]`; its rows for G-grams."""
        if not self.can_match:
            empty = np.zeros(0, np.int32)
            real = empty.astype(np.float32)
            return Matches(empty, empty, real, real, empty, empty.astype(bool), empty.copy())
        scores = self._scores(codes)
        margins = np.maximum.reduceat(scores, self._firsts, axis=0)
        groups, rows = np.nonzero(margins >= 0)
        ends = np.append(self._firsts[1:], len(scores))
        best = [
            first + int(scores[first:end, row].argmax())
            for first, end, row in zip(self._firsts[groups], ends[groups], rows, strict=True)
        ]
        motifs, offsets, reverse = self._places[best].reshape(-1, 3).T
        above = margins[groups, rows]
        bits = (above + self._needed[best]) * np.float32(BITS)
        rows, none = rows.astype(np.int32), np.zeros(len(motifs), np.int32)
        return Matches(motifs, rows, bits, above, offsets, reverse.astype(bool), none)

    def _scores(self, codes: np.ndarray) -> np.ndarray:
        one_hot = (codes[:, :, None] == np.arange(4)).reshape(len(codes), -1)
        return self._matrix @ np.pad(one_hot, ((0, 0), (0, 1)), constant_values=True).astype(np.float32).T


def _unique_spellings(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each spelling on either strand in `codes [n, L]` (uint8), `[k]`; each row's spelling, `[n]`."""
    strands = (codes, 3 - codes[:, ::-1])
    # as texts, which end with their first byte of 0
    given, other = (np.ascontiguousarray(strand + 1).view(f"S{codes.shape[1]}")[:, 0] for strand in strands)
    _, firsts, spellings = np.unique(np.where(given < other, given, other), return_index=True, return_inverse=True)
    return firsts, spellings
