"""Draw the picture of G-grams: a real stretch of *E. coli* 536, its tokens, and every G-gram found in them.

    python docs/pictures/draw_ngrams.py --corpus my/corpus --ngrams my/ngrams

writes `ngrams-light.svg` and `ngrams-dark.svg` beside this file. The corpus and its G-grams are those of the README's
"Your own genome", made from the packaged genome.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from dnazen.data.corpus import Corpus

# a REP element, which E. coli has in hundreds of places between its genes
STRETCH = "TGCCGGATGCGGCGTGAACGCCTTATCCGGCC"
SCHEMES = {
    "light": {
        "ink": "#1f2328",
        "faint": "#59636e",
        "token": ("#c3d9ee", "#e3edf7"),
        "ngram": "#f2b880",
        "on": "#3b2200",
    },
    "dark": {
        "ink": "#f0f3f6",
        "faint": "#9aa4af",
        "token": ("#274160", "#1b2d43"),
        "ngram": "#d08a45",
        "on": "#1d1000",
    },
}
LABELS = 9.2  # bases that the words on the left take up


def read_stretch(corpus: Corpus) -> list[str]:
    """The tokens that spell the stretch, from the first place of the corpus that is cut at both its ends."""
    names = {index: token for token, index in corpus.tokenizer.get_vocab().items()}
    for index in range(len(corpus.train)):
        tokens = [names[int(token)] for token in corpus.train[index]]
        for first in range(len(tokens)):
            last, spelled = first, ""
            while len(spelled) < len(STRETCH) and last < len(tokens):
                spelled += tokens[last]
                last += 1
            if spelled == STRETCH:
                return tokens[first:last]
    raise SystemExit(f"{corpus.path}: expected {STRETCH} in its training text, found none")


def find_ngrams(tokens: list[str], table: Path) -> list[tuple[int, int, int]]:
    """(first token, tokens, occurrences in the genome) of every G-gram in the tokens, the longest first."""
    with open(table) as file:
        counts = {tuple(row["tokens"].split()): int(row["count"]) for row in csv.DictReader(file, delimiter="\t")}
    found = [
        (first, length, counts[tuple(tokens[first : first + length])])
        for first in range(len(tokens))
        for length in range(2, 6)
        if first + length <= len(tokens) and tuple(tokens[first : first + length]) in counts
    ]
    return sorted(found, key=lambda ngram: (-ngram[1], ngram[0]))


def stack(ngrams: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Lanes in which no two G-grams overlap, each G-gram in the lowest that has room."""
    lanes: list[list[tuple[int, int, int]]] = []
    for first, length, count in ngrams:
        for lane in lanes:
            if all(first >= other + size or first + length <= other for other, size, _ in lane):
                break
        else:
            lanes.append(lane := [])
        lane.append((first, length, count))
    return lanes


def draw(tokens: list[str], ngrams: list[tuple[int, int, int]], scheme: dict, path: Path) -> None:
    """Bases below, tokens above them, G-grams on top; one unit of x is one base."""
    starts = [sum(map(len, tokens[:index])) for index in range(len(tokens) + 1)]
    lanes = stack(ngrams)
    lowest, step = 4.2, 1.2  # of the G-grams' lanes
    height = lowest + step * len(lanes)
    figure, axes = plt.subplots(figsize=(9, 9 * (height + 0.2) / (starts[-1] + LABELS + 0.6)))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(-LABELS, starts[-1] + 0.6), ylim=(-0.1, height + 0.1), aspect="equal")
    axes.axis("off")

    def box(x: float, y: float, width: float, color: str, text: str, ink: str, size: float) -> None:
        style = "round,pad=0,rounding_size=0.25"
        axes.add_patch(FancyBboxPatch((x + 0.06, y), width - 0.12, 1.0, style, facecolor=color, edgecolor="none"))
        axes.text(x + width / 2, y + 0.46, text, color=ink, size=size, ha="center", va="center", family="monospace")

    def label(y: float, title: str, *words: str) -> None:
        axes.text(-LABELS + 0.1, y, title, color=scheme["ink"], size=11, weight="bold", va="center")
        for line, text in enumerate(words, 1):
            axes.text(-LABELS + 0.1, y - 0.1 - 0.75 * line, text, color=scheme["faint"], size=9, va="center")

    for position, base in enumerate("".join(tokens)):
        axes.text(position + 0.5, 0.6, base, color=scheme["ink"], size=11, ha="center", va="center", family="monospace")
    label(0.6, "DNA")
    for index, token in enumerate(tokens):
        box(starts[index], 1.7, len(token), scheme["token"][index % 2], token, scheme["ink"], 10)
    label(2.5, "tokens", "words learnt from the genome")
    for lane, members in enumerate(lanes):
        for first, length, count in members:
            width = starts[first + length] - starts[first]
            box(starts[first], lowest + step * lane, width, scheme["ngram"], f"{count} times", scheme["on"], 9)
    label(
        lowest + step * (len(lanes) - 1) + 0.5,
        "G-grams",
        "runs of 2 to 5 tokens that",
        "stand together more often",
        "than chance would have it;",
        "they may overlap",
    )
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a stretch of DNA with its tokens and G-grams.")
    parser.add_argument("--corpus", required=True, help="folder written by `dnazen corpus`")
    parser.add_argument("--ngrams", required=True, help="folder written by `dnazen ngrams`")
    args = parser.parse_args()
    plt.rcParams["svg.hashsalt"] = "ngrams"
    tokens = read_stretch(Corpus.open(args.corpus))
    ngrams = find_ngrams(tokens, Path(args.ngrams) / "ngrams.tsv")
    for name, scheme in SCHEMES.items():
        draw(tokens, ngrams, scheme, Path(__file__).with_name(f"ngrams-{name}.svg"))
    print(f"{len(tokens)} tokens, {len(ngrams)} G-grams")


if __name__ == "__main__":
    main()
