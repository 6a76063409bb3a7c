"""G-grams beside known motifs, as tables and logos; the paper's open question 3 and section 4.5.

What a match is, and what the p-values mean, is in `dnazen.analysis.motif_scores`.
"""

import csv
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dnazen import __version__
from dnazen.analysis.motif_files import Motif, load_motifs
from dnazen.analysis.motif_scores import MATCH_TAIL, MIN_INFORMATION, Matches, column_information, score_motifs
from dnazen.data.tokenizer import tokenizer_checksum
from dnazen.defaults import SHUFFLES
from dnazen.dna import is_clean, reverse_complement
from dnazen.files import InputError, atomic_directory, sha256_file, write_json
from dnazen.ngram.vocab import MANIFEST_FILE, open_ngrams

_LISTED_MATCHES = 20  # of a motif
_LOGOS = 6
_MATCH_COLUMNS = ("motif", "name", "id", "tokens", "strand", "offset", "core_token", "score", "p_value")


class _Ngram(NamedTuple):
    ngram_id: int
    tokens: list[str]


@dataclass
class MotifReport:
    """What `build_motifs` found, motifs in falling order of enrichment."""

    rows: list[dict[str, Any]]  # of motifs.tsv
    num_spellings: int
    num_ngrams: int
    num_tokens: int  # different ones
    num_fixed_tokens: int  # of these, of one base, once or repeated: shuffles do not change them
    num_unmatchable: int
    num_shuffles: int


def build_motifs(
    ngrams: str | PathLike,
    motifs: str | PathLike,
    output_dir: str | PathLike,
    tokenizer: str | None = None,
    shuffles: int = SHUFFLES,
    seed: int = 0,
) -> MotifReport:
    """Compare G-grams with the motifs of a file (see `load_motifs`); write tables and logos into a folder.

    `motifs.tsv` has a row for each motif, `matches.tsv` the best 20 matches of each, `logos.png` the most enriched
    ones, `manifest.json` what was read and drawn.

    Raises:
        InputError: see `open_ngrams`, `load_motifs` and `score_motifs`.
    """
    vocabulary, loaded_tokenizer = open_ngrams(ngrams, tokenizer)
    known = load_motifs(motifs)
    all_ngrams: list[list[str]] = []
    by_spelling: dict[str, list[_Ngram]] = {}
    for ngram_id, ngram in sorted(zip(vocabulary.ids, vocabulary.ngrams, strict=True)):
        tokens = loaded_tokenizer.convert_ids_to_tokens(ngram)
        bases = "".join(tokens)
        if not is_clean(bases):
            raise InputError(f"{ngrams}: G-gram {' '.join(tokens)!r}: expected bases A, C, G, T to compare with motifs")
        all_ngrams.append(tokens)
        by_spelling.setdefault(_either_strand(tokens), []).append(_Ngram(ngram_id, tokens))
    result = score_motifs(all_ngrams, known, shuffles, seed)
    tokens = {token for ngram in all_ngrams for token in ngram}
    matches, order = result.matches, np.lexsort((-result.hits, -result.enrichments))
    by_motif = np.split(np.lexsort((-matches.margins, matches.motifs)), np.cumsum(result.hits)[:-1])
    rows, listed = [], []
    for number in order:
        found, motif = by_motif[number], known[number]
        spelt = [by_spelling[_either_strand(all_ngrams[matches.ngrams[i]])] for i in found]
        described = [_describe(matches, i, same, motif) for i, same in zip(found, spelt, strict=True)]
        best = described[:_LISTED_MATCHES]
        (core, core_hits), *_ = Counter(match["core_token"] for match in described).most_common(1) or [("", 0)]
        rows.append(
            {
                "motif": motif.motif_id,
                "name": motif.name,
                "width": len(motif.counts),
                "consensus": "".join("ACGT"[i] for i in motif.counts.argmax(1)),
                "can_match": "yes" if result.can_match[number] else "no",
                "matches": int(result.hits[number]),
                "expected": f"{result.expected[number]:.3f}",
                "enrichment": f"{result.enrichments[number]:.3f}",
                "p_value": f"{result.p_values[number]:.6g}",
                "adjusted_p_value": f"{result.adjusted_p_values[number]:.6g}",
                "best_ngram": best[0]["tokens"] if best else "",
                "core_token": core,
                "core_token_matches": core_hits,
            }
        )
        for match in best:
            p_value = (match.pop("as_good") + 1) / (shuffles + 1)
            listed.append({"motif": motif.motif_id, "name": motif.name, **match, "p_value": f"{p_value:.6g}"})
    with atomic_directory(output_dir) as directory:
        _write_tsv(directory / "motifs.tsv", list(rows[0]), rows)
        _write_tsv(directory / "matches.tsv", _MATCH_COLUMNS, listed)
        _plot_logos(directory / "logos.png", [known[i] for i in order[:_LOGOS]], rows, listed)
        report = MotifReport(
            rows,
            num_spellings=len(by_spelling),
            num_ngrams=len(all_ngrams),
            num_tokens=len(tokens),
            num_fixed_tokens=sum(len(set(token)) == 1 for token in tokens),
            num_unmatchable=int((~result.can_match).sum()),
            num_shuffles=shuffles,
        )
        manifest = {
            "dnazen_version": __version__,
            "ngrams": {"path": str(ngrams), "checksum": vocabulary.checksum, "num_ngrams": report.num_ngrams},
            "tokenizer_checksum": tokenizer_checksum(loaded_tokenizer),
            "motifs": {"path": str(motifs), "sha256": sha256_file(motifs), "num_motifs": len(known)},
            "parameters": {"shuffles": shuffles, "seed": seed},
            "thresholds": {"match_tail": MATCH_TAIL, "min_information": MIN_INFORMATION},
            "statistics": {
                "num_spellings": report.num_spellings,
                "num_tokens": report.num_tokens,
                "num_fixed_tokens": report.num_fixed_tokens,
                "num_unmatchable": report.num_unmatchable,
            },
        }
        write_json(directory / MANIFEST_FILE, manifest)
    return report


def summarize(report: MotifReport) -> str:
    """What a person wants to know of a comparison, in lines of text."""
    significant = sum(float(row["adjusted_p_value"]) <= 0.05 for row in report.rows)
    lines = [
        f"G-grams     {report.num_ngrams:,}, of {report.num_spellings:,} different spellings on either strand",
        f"shuffled    {report.num_tokens:,} tokens; "
        f"{report.num_fixed_tokens:,} of one base, once or repeated, cannot change",
        f"motifs      {len(report.rows):,}; {report.num_unmatchable:,} too short or vague to match anything",
        f"enriched    {significant:,} motifs, at a family-wise p-value of 0.05 at most (smallest possible: "
        f"{1 / (report.num_shuffles + 1):.3g}, with {report.num_shuffles:,} shuffles)",
        "most enriched: matches, expected, family-wise p-value, motif, best G-gram, matches on one token",
    ]
    for row in itertools.islice(filter(lambda row: row["matches"], report.rows), 10):
        lines.append(
            f"{row['matches']:>8,} {float(row['expected']):9.1f} {float(row['adjusted_p_value']):7.3f}  "
            f"{row['motif']} {row['name']}: {row['best_ngram']}, {row['core_token_matches']:,} on {row['core_token']}"
        )
    return "\n".join(lines)


def _either_strand(tokens: Sequence[str]) -> str:
    """The same text for all G-grams that spell the same bases on either strand."""
    bases = "".join(tokens)
    return min(bases, reverse_complement(bases))


def _describe(matches: Matches, index: int, same: Sequence[_Ngram], motif: Motif) -> dict[str, Any]:
    """A row of matches.tsv for G-grams of one spelling; `core_token` is the token that most of the motif lies on."""
    ngram = same[0]
    first, reverse = int(matches.offsets[index]), bool(matches.reverse[index])
    starts = np.cumsum([0, *map(len, ngram.tokens)])
    ends = np.minimum(starts[1:], first + len(motif.counts))
    core = int((ends - np.maximum(starts[:-1], first)).argmax())
    return {
        "id": ",".join(str(other.ngram_id) for other in same),
        "tokens": " ".join(ngram.tokens),
        "strand": "-" if reverse else "+",
        "offset": first,
        "core_token": ngram.tokens[core],
        "score": f"{matches.scores[index]:.2f}",
        "as_good": int(matches.as_good[index]),
    }


def _write_tsv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _iterate_letters(motif: Motif) -> Iterator[tuple[int, str, float, float]]:
    """Position, letter, bottom and height in bits of each letter of a logo, the smallest at the bottom."""
    shares = motif.counts / motif.counts.sum(1, keepdims=True)
    for position, (column, bits) in enumerate(zip(shares, column_information(motif), strict=True)):
        bottom = 0.0
        for base in np.argsort(column, kind="stable"):
            yield position, "ACGT"[base], bottom, column[base] * bits
            bottom += column[base] * bits


def _plot_logos(
    path: Path, motifs: Sequence[Motif], rows: Sequence[dict[str, Any]], listed: Sequence[dict[str, Any]]
) -> None:
    """Logos of the most enriched motifs; below each, the tokens of its best G-grams, aligned."""
    from matplotlib.figure import Figure
    from matplotlib.patches import PathPatch
    from matplotlib.text import TextPath
    from matplotlib.transforms import Affine2D

    colors = {"A": "#109648", "C": "#255c99", "G": "#f7b32b", "T": "#d62839"}
    figure = Figure(figsize=(9, 2.6 * len(motifs)), layout="constrained")
    for axes, motif, row in zip(figure.subplots(len(motifs), squeeze=False)[:, 0], motifs, rows, strict=False):
        for position, letter, bottom, height in _iterate_letters(motif):
            shape = TextPath((0, 0), letter, size=1)
            box = shape.get_extents()
            fit = Affine2D().translate(-box.x0, -box.y0).scale(0.95 / box.width, height / box.height)
            axes.add_patch(PathPatch(fit.translate(position, bottom).transform_path(shape), color=colors[letter], lw=0))
        best = [match for match in listed if match["motif"] == motif.motif_id][:4]
        left, right = 0, len(motif.counts)
        for line, match in enumerate(best):
            tokens, start = match["tokens"].split(), match["offset"]
            if match["strand"] == "-":
                tokens = [reverse_complement(token) for token in reversed(tokens)]
                start = sum(map(len, tokens)) - start - len(motif.counts)
            place = -start
            left = min(left, place)
            for number, token in enumerate(tokens):
                for base in token:
                    axes.text(place + 0.5, -0.3 - 0.45 * line, base, ha="center", va="top", family="monospace",
                              fontsize=9, color=colors[base], weight="bold" if number % 2 else "normal")  # fmt: skip
                    place += 1
            right = max(right, place)
        axes.set(xlim=(left - 0.5, right + 0.5), ylim=(-0.4 - 0.45 * len(best), 2), yticks=(0, 1, 2), xticks=())
        axes.set_ylabel("bits", fontsize=8)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        title = f"{motif.motif_id} {motif.name}: {row['matches']} matches, {float(row['expected']):.1f} expected, "
        axes.set_title(f"{title}family-wise p = {float(row['adjusted_p_value']):.3g}", fontsize=9, loc="left")
    figure.savefig(path, dpi=110)
