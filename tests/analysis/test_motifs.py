"""`dnazen ngrams motifs`: files of motifs, shuffled tokens, matches and p-values against plain Python, TATA boxes."""

import collections
import csv
import gzip
import itertools
import json
import math
import random
import re

import numpy as np
import pytest
from Bio import motifs as biopython
from hypothesis import given, settings
from hypothesis import strategies as st

from dnazen.analysis import motif_scores
from dnazen.analysis.motif_files import Motif, load_motifs
from dnazen.analysis.motif_scores import (
    BITS,
    base_composition,
    log_odds,
    match_thresholds,
    score_motifs,
    shuffle_tokens,
)
from dnazen.analysis.motifs import build_motifs, summarize
from dnazen.cli.main import main
from dnazen.data.corpus import build_corpus
from dnazen.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from dnazen.dna import reverse_complement
from dnazen.files import InputError
from dnazen.ngram.vocab import NgramVocabulary

BACKGROUND = np.array([0.3, 0.2, 0.2, 0.3])
TATA = [[16, 46, 18, 309], [352, 0, 2, 35], [3, 10, 2, 374], [354, 0, 5, 30], [268, 0, 0, 121], [360, 3, 20, 6]]


def jaspar(motif_id: str, name: str, rows: list[list[float]]) -> str:
    lines = (f"{base}  [ {' '.join(map(str, row))} ]" for base, row in zip("ACGT", zip(*rows), strict=True))
    return "\n".join((f">{motif_id}\t{name}", *lines, ""))


def transfac(motif_id: str, name: str, rows: list[list[float]]) -> str:
    lines = ("\t".join((f"{i:02}", *map(str, row))) for i, row in enumerate(rows, 1))
    return "\n".join((f"AC {motif_id}\nXX\nID {name}\nXX\nPO\tA\tC\tG\tT", *lines, "XX\nCC tax_group:any\nXX\n//\n"))


def meme(motif_id: str, name: str, rows: list[list[float]], sites: int = 400) -> str:
    lines = ("  " + "\t".join(f"{value / sum(row):.6f}" for value in row) for row in rows)
    head = f"MOTIF {motif_id} {name}\n\nletter-probability matrix: alength= 4 w= {len(rows)} nsites= {sites} E= 0"
    return "\n".join((head, *lines, "\nURL http://example.org\n\n"))


MEME_HEAD = "MEME version 4\n\nALPHABET= ACGT\n\nstrands: + -\n\n"
FORMATS = {"jaspar": ("", jaspar), "transfac": ("", transfac), "meme": (MEME_HEAD, meme)}


def random_motif(rng: np.random.Generator, width: int) -> Motif:
    counts = np.round(400 * rng.dirichlet([0.2] * 4, width)) + rng.integers(0, 2, (width, 4))
    return Motif(f"M{width}", "random", counts)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("form", list(FORMATS))
def test_every_format_gives_the_same_motifs(tmp_path, form, suffix):
    rows = [[40, 0, 0, 360], [400, 0, 0, 0], [100, 100, 100, 100]]
    head, write = FORMATS[form]
    text = head + write("MA1.1", "one", rows) + write("MA2.1", "two", rows[::-1])
    path = tmp_path / f"motifs.txt{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix else text.replace("\n", "\r\n").encode())
    first, second = load_motifs(path)
    assert [(motif.motif_id, motif.name) for motif in (first, second)] == [("MA1.1", "one"), ("MA2.1", "two")]
    assert first.counts.tolist() == rows and second.counts.tolist() == rows[::-1]


def test_real_files_are_read_whole(shared_data):
    folder = shared_data / "motifs"
    sizes = {}
    for path in sorted(folder.iterdir()):
        text = gzip.open(path, "rt").read() if path.suffix == ".gz" else path.read_text()
        found = load_motifs(path)
        lines = [line for line in text.splitlines() if line.startswith(("AC ", "MOTIF "))]
        assert [motif.motif_id for motif in found] == [line.split()[1] for line in lines]
        matrices = [line for line in text.splitlines() if line[:1].isdigit() or line[:3] == "  0" or line[:3] == "  1"]
        assert sum(len(motif.counts) for motif in found) == len(matrices)
        sizes[path.name.split(".")[0]] = len(found)
    assert sorted(sizes.values()) == [178, 518, 879]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected motifs in MEME .* found ''"),
        ("ACGT\n", "expected motifs in MEME .* found 'ACGT'"),
        (MEME_HEAD, "expected motifs, found none"),
        (MEME_HEAD.replace("ACGT", "ACDEFGHIKLMNPQRSTVWY"), "line 3: expected motifs of DNA"),
        (MEME_HEAD + meme("a", "b", TATA).replace("w= 6", "w= 7"), r"line 7: motif a: .*of 7 rows \(w=7\), found 6"),
        (MEME_HEAD + "MOTIF a b\n\n", "line 7: "),
        (MEME_HEAD + meme("a", "b", TATA).replace("0.041131", "0.941131"), "line 7: motif a: .* add up to 1, found"),
        (MEME_HEAD + meme("a", "b", TATA).replace("0.041131", "x"), "line 7: not a motif in minimal format"),
        (MEME_HEAD + meme("a", "b", TATA) + meme("a", "b", TATA), "line 19: expected a motif of another name, found a"),
        (jaspar("a", "b", TATA).replace("360", ""), "line 1: not a motif in jaspar format: .*inconsistent lengths"),
        (jaspar("z", "z", TATA) + jaspar("a", "b", TATA).rsplit("\n", 2)[0], "line 6: motif a: expected a matrix"),
        (jaspar("a", "b", TATA) + "T  [ 1 2 3 ]\n", "line 1: motif a: expected a matrix of 4 rows, found 5"),
        (jaspar("a", "b", TATA).replace("360", "-360"), "line 1: motif a: expected counts of 0 or more"),
        (jaspar("a", "b", TATA).replace("360", "nan"), "line 1: motif a: expected counts of 0 or more"),
        (jaspar("a", "b", [*TATA, [0, 0, 0, 0]]), "line 1: motif a: .* some in each position"),
        (transfac("a", "b", TATA).replace("//\n", ""), "line 1: expected a record that ends with '//'"),
        (transfac("z", "z", TATA) + "AC a\nXX\n//\n", "line 16: motif a: expected a matrix, found none"),
        (transfac("a", "b", TATA).replace("03\t", "04\t"), "line 1: not a motif in transfac format"),
        (transfac("a", "b", TATA).replace("\t374", ""), "line 1: not a motif in transfac format"),
        (transfac("a", "b", TATA).replace("PO\tA\tC", "PO\tC\tA"), "line 1: not a motif in transfac format"),
    ],
)
def test_malformed_files_are_refused_by_line_and_motif(tmp_path, text, message):
    (tmp_path / "motifs.txt").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_motifs(tmp_path / "motifs.txt")
    assert str(error.value).startswith(str(tmp_path / "motifs.txt"))


def test_files_cut_short(tmp_path):
    """Wherever a file ends, it is refused, or the motifs that it still holds are whole."""
    for form, (head, write) in FORMATS.items():
        text = head + write("a", "one", TATA) + write("b", "two", TATA)
        (tmp_path / "whole").write_text(text)
        whole, num_read = load_motifs(tmp_path / "whole"), 0
        for size in range(len(text)):
            (tmp_path / "cut").write_text(text[:size])
            try:
                found = load_motifs(tmp_path / "cut")
            except InputError:
                continue
            num_read += 1
            for motif, expected in zip(found, whole, strict=False):
                # a probability cut behind its first digits passes for a rounded one: two percent of 400 sites
                assert np.abs(motif.counts - expected.counts).max() <= (8 if form == "meme" else 0)
        assert 0 < num_read < 100
    truncated = gzip.compress((jaspar("a", "b", TATA) * 20).encode())[:-20]
    (tmp_path / "cut.gz").write_bytes(truncated)
    with pytest.raises(InputError, match="cut.gz: cannot be read as text"):
        load_motifs(tmp_path / "cut.gz")


# --- shuffles --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ACGT", min_size=1, max_size=12), min_size=1, unique=True), st.integers(0, 2**32))
def test_shuffled_tokens_keep_their_bases(tokens, seed):
    sets = shuffle_tokens(tokens, 20, np.random.default_rng(seed))
    texts = ["".join("ACGT"[code] for code in row) for row in sets]
    assert len(texts) == 21 and texts[0] == "".join(tokens)
    starts = list(itertools.accumulate(map(len, tokens), initial=0))
    for text in texts:
        for token, (first, end) in zip(tokens, itertools.pairwise(starts), strict=True):
            assert sorted(text[first:end]) == sorted(token)
    if any(len(set(token)) > 2 for token in tokens):
        assert len(set(texts)) > 1


def test_shuffles_are_uniform_and_each_token_has_its_own():
    draws = 20_000
    sets = shuffle_tokens(["GGG", "ACCA", "TC", "A"], draws, np.random.default_rng(0))[1:]
    found = collections.Counter("".join("ACGT"[code] for code in row) for row in sets)
    arrangements = {"".join(order) for order in itertools.permutations("ACCA")}
    assert set(found) == {f"GGG{one}{other}A" for one in arrangements for other in ("TC", "CT")}
    share = 1 / len(found)
    spread = math.sqrt(draws * share * (1 - share))
    assert all(abs(number - draws * share) <= 5 * spread for number in found.values())


# --- matches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 4, 6, 7])
def test_thresholds_against_all_sequences(width):
    rng = np.random.default_rng(width)
    motif = random_motif(rng, width)
    table = log_odds(motif, BACKGROUND)
    thresholds = match_thresholds(motif, table, BACKGROUND)
    shares = motif.counts / motif.counts.sum(1, keepdims=True)
    information = [2 + sum(p * math.log2(p) for p in row if p > 0) for row in shares.tolist()]
    for first, end in itertools.product(range(width), range(width + 1)):
        enough = first < end and sum(information[first:end]) >= 0.5 * sum(information)
        chances = collections.Counter()
        for bases in itertools.product(range(4), repeat=max(end - first, 0) if enough else 0):
            score = sum(int(table[first + i, base]) for i, base in enumerate(bases))
            chances[score] += math.prod(BACKGROUND[base] for base in bases)
        allowed = [score for score in chances if sum(p for s, p in chances.items() if s >= score) <= 1e-3 * (1 + 1e-9)]
        assert thresholds[first, end] == (min(allowed) if enough and allowed else math.inf)


def test_log_odds_are_those_of_biopython():
    motif = Motif("MA0108.3", "TBP", np.array(TATA, float))
    table = log_odds(motif, BACKGROUND)
    matrix = biopython.Motif(alphabet="ACGT", counts=dict(zip("ACGT", motif.counts.T.tolist(), strict=True)))
    matrix.background = dict(zip("ACGT", BACKGROUND, strict=True))
    # the square root of the 389 sites, shared out like the background
    matrix.pseudocounts = {base: math.sqrt(389) * share for base, share in matrix.background.items()}
    for text in ("TATAAA", "GGGCGG", "TTTATA"):
        score = sum(table[i, "ACGT".index(base)] for i, base in enumerate(text)) * BITS
        assert score == pytest.approx(matrix.pssm.calculate(text), abs=6 * BITS / 2 + 1e-4)


def match_slowly(spelling: str, table: np.ndarray, thresholds: np.ndarray):
    """The largest margin, and every (score, offset, strand) that reaches it."""
    places = {}
    for reverse, strand in ((False, table), (True, table[::-1, ::-1])):
        width = len(strand)
        for offset in range(1 - width, len(spelling)):
            first, end = max(0, -offset), min(width, len(spelling) - offset)
            score = sum(strand[i, "ACGT".index(spelling[offset + i])] for i in range(first, end))
            needed = thresholds[width - end, width - first] if reverse else thresholds[first, end]
            if np.isfinite(needed):
                places.setdefault(score - needed, []).append((score, offset, reverse))
    best = max(places, default=-math.inf)
    return best, places.get(best, [])


def test_matches_equal_slow_matches():
    rng, letters = np.random.default_rng(3), random.Random(3)
    known = [random_motif(rng, width)._replace(motif_id=str(i)) for i, width in enumerate([3, 5, 6, 7, 8, 11, 18])]
    known[4].counts[:] = 100.0  # says nothing
    consensus = ["".join("ACGT"[i] for i in motif.counts.argmax(1)) for motif in known]
    spellings = ["A", "CG", *consensus, *(reverse_complement(text)[2:] for text in consensus[3:])]
    spellings += ["".join(letters.choices("ACGT", k=letters.randint(3, 20))) for _ in range(300)]
    spellings = list(dict.fromkeys(spellings))
    result = score_motifs([(spelling,) for spelling in spellings], known, num_shuffles=2)
    background = base_composition([(spelling,) for spelling in spellings])
    joined = "".join(spellings)
    at = (joined.count("A") + joined.count("T")) / len(joined) / 2
    assert background.tolist() == pytest.approx([at, 0.5 - at, 0.5 - at, at], abs=1e-12)
    found = {(m, s): i for i, (m, s) in enumerate(zip(result.matches.motifs, result.matches.ngrams, strict=True))}
    assert len(found) == len(result.matches.motifs) == result.hits.sum() > 40
    num_partial = 0
    for number, motif in enumerate(known):
        table = log_odds(motif, background)
        thresholds = match_thresholds(motif, table, background)
        assert result.can_match[number] == np.isfinite(thresholds).any()
        for place, spelling in enumerate(spellings):
            margin, places = match_slowly(spelling, table, thresholds)
            assert (margin >= 0) == ((number, place) in found)
            if margin >= 0:
                i = found[number, place]
                match = [getattr(result.matches, name)[i] for name in ("scores", "offsets", "reverse")]
                score = round(float(match[0]) / BITS)
                assert result.matches.margins[i] == margin and (score, *match[1:]) in places
                num_partial += match[1] < 0 or match[1] + len(table) > len(spelling)
    assert not result.can_match[4] and num_partial > 10


def spell(ngram, spelt: dict[str, str]) -> str:
    bases = "".join(spelt[token] for token in ngram)
    return min(bases, reverse_complement(bases))


def random_ngrams(
    letters: random.Random, num_tokens: int, num_ngrams: int, lengths: tuple[int, ...] = (3, 4, 5, 6)
) -> list[tuple[str, ...]]:
    """Different G-grams of 2 or 3 tokens of random bases, a few tokens much more often than others."""
    tokens = ["".join(letters.choices("ACGT", k=letters.choice(lengths))) for _ in range(num_tokens)]
    tokens = list(dict.fromkeys(tokens))
    weights = [1 / rank for rank in range(1, len(tokens) + 1)]
    ngrams = {}
    while len(ngrams) < num_ngrams:
        ngrams[tuple(letters.choices(tokens, weights, k=letters.randint(2, 3)))] = None
    return list(ngrams)


@pytest.mark.slow
def test_p_values_equal_slow_ones(monkeypatch):
    """Each set spelled and counted one G-gram at a time, some of the same spelling, and in chunks of three."""
    monkeypatch.setattr(motif_scores, "_CHUNK_SPELLINGS", 3)
    ngrams = random_ngrams(random.Random(1), 12, 60)
    texts = ["".join(ngram)[first : first + 6] for ngram in ngrams[::10] for first in (0, 2)]
    known = [Motif(text, text, np.where(np.array(list(text))[:, None] == list("ACGT"), 97.0, 1.0)) for text in texts]
    first, second, third = next(ngram for ngram in ngrams if len(ngram) == 3)
    again = [(first + second, third), (reverse_complement(third), reverse_complement(first + second)), ("A", "AA")]
    ngrams += [ngram for ngram in again if ngram not in ngrams]
    num_shuffles = 9
    result = score_motifs(ngrams, known, num_shuffles, seed=4)
    tokens = list(dict.fromkeys(token for ngram in ngrams for token in ngram))
    sets = []
    for row in shuffle_tokens(tokens, num_shuffles, np.random.default_rng(4)):
        bases = iter(row.tolist())
        sets.append({token: "".join("ACGT"[next(bases)] for _ in token) for token in tokens})
    background = base_composition(ngrams)
    hits, margins = np.zeros((num_shuffles + 1, len(known))), {}
    for number, motif in enumerate(known):
        table = log_odds(motif, background)
        thresholds = match_thresholds(motif, table, background)
        for place, spelt in enumerate(sets):
            own = {text: match_slowly(text, table, thresholds)[0] for text in {spell(ngram, spelt) for ngram in ngrams}}
            hits[place, number] = sum(margin >= 0 for margin in own.values())
            margins[number, place] = [own[spell(ngram, spelt)] for ngram in ngrams]
    assert len({spell(ngram, sets[0]) for ngram in ngrams}) < len(ngrams)
    assert result.hits.tolist() == hits[0].tolist() and result.expected.tolist() == hits.mean(0).tolist()
    assert result.p_values.tolist() == (hits >= hits[0]).mean(0).tolist() and hits[0].sum() > 40
    roots = 2 * np.sqrt(hits + 3 / 8)
    enrichments = (roots - 2 * np.sqrt(hits.mean(0) + 3 / 8)) / np.maximum(roots.std(0), 1)
    assert result.enrichments == pytest.approx(enrichments[0], abs=1e-12) and (roots.std(0) > 1).any()
    # a set as enriched as the real one but for rounding counts as such
    largest = enrichments.max(1)[:, None] + 1e-12
    assert result.adjusted_p_values.tolist() == (largest >= enrichments[0]).mean(0).tolist()
    found = result.matches
    for number, ngram, as_good in zip(found.motifs, found.ngrams, found.as_good, strict=True):
        assert spell(ngrams[ngram], sets[0]) not in {spell(other, sets[0]) for other in ngrams[:ngram]}
        others = [margins[number, place][ngram] for place in range(1, num_shuffles + 1)]
        assert as_good == sum(margin >= margins[number, 0][ngram] for margin in others)


def test_planted_motif_is_found():
    """TATAAA cut anywhere, in many tokens; not so where one common token brings all the matches."""
    letters = random.Random(0)
    gc_box = np.array([[1, 97, 1, 1]] * 3 + [[1, 1, 97, 1]] * 4, float)
    known = [Motif("TBP", "TBP", np.array(TATA, float)), Motif("GC", "GC", gc_box)]
    noise = random_ngrams(letters, 100, 150)
    planted = []
    for _ in range(40):
        text = "".join(letters.choices("CG", k=3)) + "TATAAA" + "".join(letters.choices("CG", k=3))
        cut = letters.randint(4, 8)
        planted.append((text[:cut], text[cut:]))
    result = score_motifs(noise + planted, known, num_shuffles=99)
    assert result.hits[0] >= 25 and result.adjusted_p_values[0] == result.p_values[0] == 0.01
    assert result.adjusted_p_values[1] > 0.05
    assert (result.adjusted_p_values >= result.p_values).all()
    again = score_motifs(noise + planted, known, num_shuffles=99)
    assert again.expected.tolist() == result.expected.tolist()
    other = score_motifs(noise + planted, known, num_shuffles=99, seed=1)
    assert other.hits.tolist() == result.hits.tolist() and other.expected.tolist() != result.expected.tolist()
    one_token = [("TATAAA", token) for token in dict.fromkeys(token for ngram in noise for token in ngram)][:40]
    shared = score_motifs(noise + one_token, known, num_shuffles=99)
    assert shared.hits[0] >= 40 and shared.p_values[0] > 0.01


def test_what_cannot_change_is_never_found():
    motif = Motif("TBP", "TBP", np.array(TATA, float))
    ngrams = [("T", "A", "T", "A", "AA"), ("T", "A", "T", "A", "AAA"), ("GG", "C", "GGG", "C", "G", "CC")]
    result = score_motifs(ngrams, [motif], num_shuffles=9)
    assert result.hits.tolist() == result.expected.tolist() == [2] and result.adjusted_p_values.tolist() == [1]


@pytest.mark.slow
def test_family_wise_p_values_hold_where_there_is_nothing_to_find():
    """Tokens of random bases, in many G-grams each: the smallest p-value is at most 1 / 10 in a tenth of the cases."""
    rng, letters = np.random.default_rng(0), random.Random(0)
    known = [random_motif(rng, width) for width in (5, 6, 7, 8, 9, 10) * 6]
    cases, smallest = 100, []
    for case in range(cases):
        ngrams = random_ngrams(letters, 100, 100, lengths=(5,))
        smallest.append(score_motifs(ngrams, known, num_shuffles=9, seed=case).adjusted_p_values.min())
    # ties make it less often; 3 standard deviations of a binomial
    share = sum(p <= 0.1 for p in smallest) / cases
    assert 0 < share <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / cases)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ngrams_dir(tmp_path):
    """A vocabulary with two G-grams of the same bases, and one that spells them on the other strand."""
    tokenizer = train_tokenizer(["".join(random.Random(0).choices("ACGT", k=5000)), "TATAAA" * 200], vocab_size=60)
    save_tokenizer(tokenizer, tmp_path / "ngrams")
    letters = {token: i for token, i in tokenizer.get_vocab().items() if set(token) <= set("ACGT") and len(token) > 1}
    texts = [["TA", "TATAAA"], *itertools.islice(itertools.permutations(sorted(letters), 2), 300)]
    ngrams = {tuple(letters[token] for token in text) for text in texts if all(token in letters for token in text)}
    ngrams = sorted(ngrams)
    NgramVocabulary(ngrams, list(range(1, len(ngrams) + 1))).save_pretrained(tmp_path / "ngrams", tokenizer)
    return tmp_path / "ngrams"


@pytest.mark.slow
def test_command_writes_tables_and_logos(ngrams_dir, tmp_path, capsys):
    text = jaspar("MA0108.3", "TBP", [*TATA, [222, 2, 44, 121]]) + jaspar("vague", "vague", [[1, 1, 1, 1]])
    text += jaspar("GC", "GC", [[0, 9, 0, 0]] * 6)
    (tmp_path / "motifs.jaspar").write_text(text)
    arguments = ["--ngrams", str(ngrams_dir), "--motifs", str(tmp_path / "motifs.jaspar"), "--shuffles", "19"]
    for folder in ("a", "b"):
        assert main(["ngrams", "motifs", *arguments, "--seed", "5", "--output-dir", str(tmp_path / folder)]) == 0
    for name in ("motifs.tsv", "matches.tsv", "logos.png", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    printed = capsys.readouterr().out
    assert "3; 1 too short or vague to match anything" in printed and "smallest possible: 0.05" in printed
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert (manifest["parameters"]["seed"], manifest["parameters"]["shuffles"]) == (5, 19)
    vocabulary = json.loads((ngrams_dir / "ngram.json").read_text())["vocab"]
    tokens = {token for entry in vocabulary for token in entry.split()}
    num_fixed = sum(len(set(token)) == 1 for token in tokens)
    assert f"{len(tokens)} tokens; {num_fixed} of one base" in printed and 0 < num_fixed < len(tokens)
    statistics = manifest["statistics"]
    assert (statistics["num_tokens"], statistics["num_fixed_tokens"]) == (len(tokens), num_fixed)
    spelt = [entry.replace(" ", "") for entry in vocabulary]
    different = {min(text, reverse_complement(text)) for text in spelt}
    assert manifest["ngrams"]["num_ngrams"] == len(spelt) > len(different) == manifest["statistics"]["num_spellings"]
    rows = {row["motif"]: row for row in csv.DictReader(open(tmp_path / "a" / "motifs.tsv"), delimiter="\t")}
    assert set(rows) == {"MA0108.3", "vague", "GC"}
    assert rows["vague"]["can_match"] == "no" and rows["vague"]["matches"] == "0"
    matches = list(csv.DictReader(open(tmp_path / "a" / "matches.tsv"), delimiter="\t"))
    same = collections.defaultdict(list)
    for text, ngram_id in sorted(zip(spelt, vocabulary.values(), strict=True), key=lambda pair: pair[1]):
        same[min(text, reverse_complement(text))].append(str(ngram_id))
    for match in matches:
        text = match["tokens"].replace(" ", "")
        assert match["id"].split(",") == same[min(text, reverse_complement(text))]
        assert match["core_token"] in match["tokens"].split()
        assert 0.05 <= float(match["p_value"]) <= 1
    tbp = [match for match in matches if match["motif"] == "MA0108.3"]
    assert len(tbp) == min(20, int(rows["MA0108.3"]["matches"])) > 0
    text = tbp[0]["tokens"].replace(" ", "")
    assert "TATA" in (text if tbp[0]["strand"] == "+" else reverse_complement(text))
    assert (tmp_path / "a" / "logos.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_motifs_that_nothing_can_match(ngrams_dir, tmp_path):
    (tmp_path / "motifs.txt").write_text(jaspar("vague", "vague", [[1, 1, 1, 1]] * 4))
    report = build_motifs(ngrams_dir, tmp_path / "motifs.txt", tmp_path / "out", shuffles=3)
    assert [(row["matches"], float(row["adjusted_p_value"])) for row in report.rows] == [(0, 1.0)]
    assert (tmp_path / "out" / "matches.tsv").read_text().startswith("motif\tname\tid\t")
    assert "1; 1 too short or vague" in summarize(report)


def test_refusals_leave_nothing_behind(ngrams_dir, tmp_path, capsys):
    (tmp_path / "motifs.txt").write_text(jaspar("a", "b", TATA))
    for options, message in (
        (["--shuffles", "0"], "num_shuffles: expected at least 1, found 0"),
        (["--motifs", str(tmp_path / "absent")], f"{tmp_path / 'absent'}: no such file or folder, given as --motifs"),
        (["--motifs", str(ngrams_dir / "ngram.json")], "ngram.json: expected motifs in MEME"),
        (["--ngrams", str(tmp_path)], "expected G-grams (a folder made by `dnazen ngrams`"),
    ):
        arguments = ["--ngrams", str(ngrams_dir), "--motifs", str(tmp_path / "motifs.txt"), *options]
        assert main(["ngrams", "motifs", *arguments, "--output-dir", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_tata_boxes_in_human_core_promoters(shared_data, tmp_path):
    """Paper, section 4.5: G-grams of TATA promoters match TBP more than shuffles do; other promoters' do not.

    One motif, named beforehand, needs no correction; the best of 879 by chance is as enriched now and then. What is
    said of one does not depend on the others, so the whole file is read once.
    """
    gue, tokenizer = shared_data / "gue" / "prom", load_tokenizer(shared_data / "tokenizer")

    def read(name: str) -> list[str]:
        with gzip.open(gue / name / "train.csv.gz", "rt") as file:
            return [row["sequence"] for row in csv.DictReader(file) if row["label"] == "1"]

    tata = read("prom_core_tata")
    others = [sequence for sequence in read("prom_core_all") if sequence not in set(tata)][: len(tata)]
    motif_file = shared_data / "motifs" / "JASPAR2024_CORE_vertebrates_non-redundant_pfms_transfac.txt.gz"
    records = re.split(r"(?<=^//\n)", gzip.open(motif_file, "rt").read(), flags=re.MULTILINE)
    (record,) = [record for record in records if "AC MA0108.3\n" in record]
    (tmp_path / "one.txt").write_text(record)
    found = {}
    for name, sequences, motifs, number in (
        ("tata", tata, motif_file, 879),
        ("others", others, tmp_path / "one.txt", 1),
    ):
        folder = tmp_path / name
        (tmp_path / f"{name}.fa").write_text("".join(f">{i}\n{text}\n" for i, text in enumerate(sequences)))
        build_corpus([tmp_path / f"{name}.fa"], tokenizer, folder / "corpus", min_length=40, num_workers=1)
        arguments = ["--corpus", str(folder / "corpus"), "--output-dir", str(folder / "ngrams")]
        assert main(["ngrams", *arguments]) == 0
        report = build_motifs(folder / "ngrams", motifs, folder / "motifs", shuffles=99)
        assert len(report.rows) == number and report.num_ngrams > 100
        (found[name],) = [row for row in report.rows if row["motif"] == "MA0108.3"]
        found[name]["share"] = found[name]["matches"] / report.num_spellings
    assert float(found["tata"]["p_value"]) <= 0.02 < 0.2 < float(found["others"]["p_value"])
    assert found["tata"]["matches"] > 2 * float(found["tata"]["expected"])
    assert found["tata"]["share"] > 0.15 > 0.05 > found["others"]["share"]
