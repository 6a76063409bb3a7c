"""`dnazen explain`: which G-grams a model finds in sequences, and the attention each gets (paper section 4.5)."""

import csv
import re
from collections.abc import Iterator
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dnazen.batches.streaming import run_batches
from dnazen.data.sequences import read_blocks
from dnazen.defaults import MAX_BATCH_TOKENS, PRECISION, STRIDE_BASES, WINDOW_BASES
from dnazen.dna import IUPAC_BASES
from dnazen.files import InputError, atomic_directory
from dnazen.inference.loading import load_for_inference
from dnazen.inference.windows import Window, check_window, cut_windows
from dnazen.models import DNAZenModel

TABLE_FILE, PICTURE_FILE = "ngrams.tsv", "attention.png"
_PANELS, _COLUMNS = 3, 24


class FoundNgram(NamedTuple):
    """A G-gram of a window."""

    tokens: str  # joined by spaces
    spans: list[tuple[int, int]]  # where it occurs in the window's sequence, `[start, end)`
    attention: np.ndarray  # [layers]: its share; sums to 1 over the window's G-grams
    has_motif: bool  # the whole motif lies in one of its spans


class Summary(NamedTuple):
    """What was found."""

    counts: dict[str, int]  # records, windows, other_letters, ngrams, occurrences, dropped_ngrams
    motif_windows: dict[str, int]  # present: windows that have the motif; covered: in which a G-gram covers it
    attention: np.ndarray | None  # [layers, 2]: mean of G-grams with and without the motif; 1 is an even share


def explain(
    model: str,
    input: str | PathLike,
    output_dir: str | PathLike,
    motif: str | None = None,
    window: int = WINDOW_BASES,
    stride: int = STRIDE_BASES,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    precision: str = PRECISION,
) -> Summary:
    """Write the G-grams of all records of a FASTA or CSV file, and their attention, into a folder.

    Records are read in windows (`cut_windows`). The attention that a G-gram gets in a layer is the mean of its weights
    over heads and over the G-grams that attend to it: with 4 G-grams in a window, 0.25 is an even share. Written are:

    - `ngrams.tsv`: a line for each occurrence, from the window in whose core it begins.
    - `layer_1.bedgraph`, ..., `mean.bedgraph`: for each base the sum over the G-grams that cover it.
    - `attention.png`: the three windows with most G-grams; with a motif, of those in which a G-gram covers it.

    Args:
        model: a folder or a name on the Hugging Face hub; it must have G-grams.
        input: FASTA, or CSV with a column `sequence` (`read_blocks`).
        output_dir: must not exist yet.
        motif: IUPAC codes, looked for on the strand that is given.
        window, stride: as in `embed`, in bases.
        max_batch_tokens: changes the weights by rounding alone.
        precision: of the model's weights and states; attention is eager, which alone returns its weights.

    Raises:
        InputError: an argument is out of its range; the model has no G-grams; see `load_for_inference`, `read_blocks`.
    """
    check_window(window, stride)
    pattern = None if motif is None else _compile_motif(motif)
    counts = dict.fromkeys(("records", "windows", "other_letters", "ngrams", "occurrences", "dropped_ngrams"), 0)
    motif_windows = {"present": 0, "covered": 0}
    shown: list[tuple[Window, list[FoundNgram]]] = []
    shares: list[np.ndarray] = []  # [G-grams with and without the motif, layers] of windows where one covers it
    with ExitStack() as stack:
        directory = stack.enter_context(atomic_directory(output_dir))
        loaded = load_for_inference(model, DNAZenModel, precision, "eager")
        num_layers = loaded.model.config.num_hidden_ngram_layers
        if not loaded.vocabulary.ngrams:
            raise InputError(f"{model}: expected a model with G-grams, found none (no ngram.json)")
        spelled = dict(zip(loaded.vocabulary.ids, loaded.vocabulary.ngrams))
        progress = stack.enter_context(tqdm(desc="explaining", unit=" bases", unit_scale=True, disable=None))
        table = csv.writer(
            stack.enter_context(open(directory / TABLE_FILE, "w", newline="")), delimiter="\t", lineterminator="\n"
        )
        columns = [f"layer_{layer}" for layer in range(1, num_layers + 1)]
        table.writerow(["record", "start", "end", "ngram", "ngrams_in_window", *["motif"] * bool(pattern), *columns])
        tracks = [
            _Track(stack.enter_context(open(directory / f"{name}.bedgraph", "w")), name) for name in (*columns, "mean")
        ]

        def attention(batch: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
            """Ids and attention `[layers, n]` of each sequence's G-grams."""
            counts["dropped_ngrams"] += loaded.collator.num_dropped
            layers = loaded.model(**batch, output_attentions=True).ngram_attentions
            starts, ids = batch["ngram_cu_seqlens"].tolist(), batch["ngram_input_ids"].cpu().numpy()
            found = []
            for sequence, (start, end) in enumerate(zip(starts, starts[1:])):
                weights = [layer[sequence, :, : end - start, : end - start].double().mean((0, 1)) for layer in layers]
                found.append((ids[start:end], np.array([layer.cpu().numpy() for layer in weights])))
            return found

        def groups() -> Iterator[tuple[tuple[Window, list[int]], list[list[int]]]]:
            for part in cut_windows(read_blocks(input), window, stride):
                tokens = [] if part.is_end else loaded.tokenize([part.sequence])
                yield (part, tokens[0] if tokens else []), tokens

        results = run_batches(groups(), loaded.collator, attention, loaded.model.device, max_batch_tokens)
        bases = 0
        for (part, tokens), result in results:
            if part.is_end:
                counts["records"] += 1
                counts["other_letters"] += part.start - bases
                bases = 0
                for track in tracks:
                    track.flush(part.record, None)
                continue
            found = _locate(part.sequence, tokens, *result[0], spelled, loaded.id_to_token, pattern)
            counts["windows"] += 1
            counts["ngrams"] += len(found)
            bases += part.core_end - part.core_start
            progress.update(part.core_end - part.core_start)
            for track in tracks:
                track.flush(part.record, part.core_start)
            for ngram in found:
                for start, end in ngram.spans:
                    if part.core_start <= part.start + start < part.core_end:
                        counts["occurrences"] += 1
                        span = part.start + start, part.start + end
                        extra = [int(ngram.has_motif)] if pattern else []
                        weights = [f"{weight:.6g}" for weight in ngram.attention]
                        table.writerow([part.record, *span, ngram.tokens, len(found), *extra, *weights])
                        for track, weight in zip(tracks, (*ngram.attention, ngram.attention.mean())):
                            track.add(*span, weight)
            is_covered = any(ngram.has_motif for ngram in found)
            motif_windows["present"] += bool(pattern and pattern.search(part.sequence))
            motif_windows["covered"] += is_covered
            if is_covered and len(found) > 1 and not all(ngram.has_motif for ngram in found):
                kinds = [[ngram.attention for ngram in found if ngram.has_motif is kind] for kind in (True, False)]
                shares.append(len(found) * np.array([np.mean(kind, axis=0) for kind in kinds]))
            if is_covered if pattern else len(found) > 1:
                shown = sorted([*shown, (part, found)], key=lambda panel: -len(panel[1]))[:_PANELS]
        _plot(directory / PICTURE_FILE, shown, num_layers, motif)
    return Summary(counts, motif_windows, np.mean(shares, axis=0).T if shares else None)


def _compile_motif(motif: str) -> re.Pattern:
    letters = motif.upper()
    if not letters or set(letters) - IUPAC_BASES.keys():
        raise InputError(f"motif: expected IUPAC codes ({''.join(IUPAC_BASES)}), found {motif!r}")
    # looking ahead, so that overlapping occurrences are found
    return re.compile("(?=({}))".format("".join(f"[{IUPAC_BASES[letter]}]" for letter in letters)))


def _locate(
    sequence: str, tokens: list[int], ids: np.ndarray, attention: np.ndarray, spelled: dict[int, tuple[int, ...]],
    id_to_token: list[str], pattern: re.Pattern | None,
) -> list[FoundNgram]:  # fmt: skip
    """Where in a window's bases each of its G-grams occurs."""
    bounds = np.cumsum([0, *(len(id_to_token[token]) for token in tokens)]).tolist()
    motifs = [match.span(1) for match in pattern.finditer(sequence)] if pattern else []
    found = []
    for number, ngram_id in enumerate(ids.tolist()):
        ngram = spelled[ngram_id]
        places = [at for at in range(len(tokens) - len(ngram) + 1) if tuple(tokens[at : at + len(ngram)]) == ngram]
        spans = [(bounds[at], bounds[at + len(ngram)]) for at in places]
        has_motif = any(start <= first and last <= end for start, end in spans for first, last in motifs)
        text = " ".join(id_to_token[token] for token in ngram)
        found.append(FoundNgram(text, spans, attention[:, number], has_motif))
    return found


class _Track:
    """A bedGraph file: sums over a record's bases, written as soon as nothing more can be added to them."""

    def __init__(self, file: Any, name: str):
        self._file = file
        self._start, self._values = 0, np.zeros(0)
        file.write(f'track type=bedGraph name="{name}" description="attention of the G-grams that cover a base"\n')

    def add(self, start: int, end: int, value: float) -> None:
        if end - self._start > len(self._values):
            self._values = np.pad(self._values, (0, end - self._start - len(self._values)))
        self._values[start - self._start : end - self._start] += value

    def flush(self, record: str, end: int | None) -> None:
        """Write the bases before `end`, and hold those from there on; None for all, and on to the next record."""
        values = self._values if end is None else self._values[: end - self._start]
        edges = np.flatnonzero(np.diff(values)) + 1
        for first, last in zip([0, *edges], [*edges, len(values)]):
            if last > first and values[first]:
                self._file.write(f"{record}\t{self._start + first}\t{self._start + last}\t{values[first]:.6g}\n")
        if end is None:
            self._start, self._values = 0, np.zeros(0)
        else:
            self._start, self._values = end, self._values[max(end - self._start, 0) :]


def _plot(path: Path, shown: list[tuple[Window, list[FoundNgram]]], num_layers: int, motif: str | None) -> None:
    """The paper's Figure 3: a row for each layer, a column for each G-gram, darker where it gets more."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(9, 0.5 + max(1, len(shown)) * (1.5 + 0.2 * num_layers)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for panel, (window, found) in enumerate(shown):
        axes = figure.add_subplot(len(shown), 1, panel + 1)
        columns = found[:_COLUMNS]
        weights = np.stack([ngram.attention for ngram in columns], axis=1)
        # an even share is in the middle of the scale
        image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=max(2 / len(found), weights.max()), aspect="auto")
        for (layer, column), weight in np.ndenumerate(weights):
            color = "white" if weight > 0.6 * image.norm.vmax else "black"
            axes.text(column, layer, f"{weight:.3f}", ha="center", va="center", fontsize=6, color=color)
        cut = f"; the first {_COLUMNS} of {len(found)} G-grams" if len(found) > _COLUMNS else ""
        axes.set_title(f"record {window.record}, base {window.start + 1:,} on{cut}", fontsize=9)
        axes.set_yticks(range(num_layers), range(1, num_layers + 1), fontsize=8)
        axes.set_ylabel("layer", fontsize=8)
        labels = [ngram.tokens for ngram in columns]
        axes.set_xticks(range(len(columns)), labels, rotation=25, ha="right", fontsize=7, family="monospace")
        for label, ngram in zip(axes.get_xticklabels(), columns):
            if ngram.has_motif:
                label.set(color="firebrick", fontweight="bold")
    title = "no window with two G-grams" if motif is None else f"no window in which a G-gram covers {motif}"
    if shown:
        title = "attention that each G-gram gets" + (f"; red: covers {motif}" if motif else "")
    figure.suptitle(title, fontsize=10)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    # fewer colours make a smaller file; this choice of them keeps the rare ones
    picture.quantize(224, Image.Quantize.MAXCOVERAGE).save(path, format="png", optimize=True)


def format_summary(summary: Summary) -> str:
    """What was found, in some lines."""
    counts, covered = summary.counts, summary.motif_windows
    lines = [
        f"records     {counts['records']:,} in {counts['windows']:,} windows",
        f"left out    {counts['other_letters']:,} other letters",
        f"G-grams     {counts['ngrams']:,} that occur {counts['occurrences']:,} times",
        f"cut         {counts['dropped_ngrams']:,} G-grams over the model's limit",
    ]
    if covered["present"]:
        lines.append(
            f"motif       in {covered['present']:,} windows; in {covered['covered']:,} a G-gram covers it whole"
        )
    if summary.attention is not None:
        lines.append("attention   layer  with the motif  without  (1.00 is an even share)")
        for layer, (inside, outside) in enumerate(summary.attention, 1):
            lines.append(f"            {layer:5}  {inside:14.2f}  {outside:7.2f}")
    return "\n".join(lines)
