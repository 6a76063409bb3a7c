"""`dnazen embed`: vectors of sequences, of their tokens or of their bases, written as they are computed."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dnazen.batches.streaming import run_batches
from dnazen.data.sequences import read_blocks
from dnazen.defaults import MAX_BATCH_TOKENS, POOLING, PRECISION, STRIDE_BASES, WINDOW_BASES
from dnazen.dna import reverse_complement
from dnazen.files import InputError, atomic_file
from dnazen.inference.loading import InferenceModel, load_for_inference
from dnazen.inference.vector_files import FORMATS, Rows, join_rows
from dnazen.inference.windows import Window, check_window, cut_windows
from dnazen.models import DNAZenModel

logger = logging.getLogger(__name__)

POOLINGS = ("mean", "max", "cls", "token", "base")


def embed(
    model: str,
    input: str | PathLike,
    output: str | PathLike,
    pooling: str = POOLING,
    layer: int | None = None,
    both_strands: bool = False,
    window: int = WINDOW_BASES,
    stride: int = STRIDE_BASES,
    precision: str = PRECISION,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    attn_implementation: str | None = None,
) -> dict[str, int]:
    """Write the vectors of all records of a FASTA or CSV file; at most some batches of them are in memory.

    Vectors do not depend on the other sequences in the batch, but for rounding. Long records are read in windows that
    overlap (`cut_windows`), each tokenized by itself. Each token, and each base, comes from the window in whose core it
    begins: there it is farthest from an edge. What has a vector goes by `pooling`:

    - mean, max: a record; over all its tokens, without the special ones.
    - cls: a record; the mean of the [CLS] of its windows.
    - token: each token.
    - base: each A, C, G and T; the vector is that of the token that covers it.

    Args:
        model: a folder or a name on the Hugging Face hub; its encoders are used.
        input: FASTA, or CSV with a column `sequence` (`read_blocks`).
        output: .npy (a table of what each row stands for is written beside it, in .tsv), .parquet or .h5.
        pooling: one of `POOLINGS`, as above.
        layer: the token encoder's states after so many layers, 0 for the embeddings; None for the last.
        both_strands: average the vectors of what is read and of its reverse complement. A record and its reverse
            complement then have the same vectors, but for rounding, as the windows of one mirror those of the other.
        window, stride: in bases; windows begin at most `stride` after the last.
        precision: of weights and states; the vectors are fp32 all the same.
        max_batch_tokens: changes the vectors by rounding alone.
        attn_implementation: as in `load_for_inference`; changes the vectors by rounding alone.

    Returns:
        Counts: records, rows, dimensions, windows, bases, other_letters, empty_records (which have no base of A, C, G,
        T: a row of NaN, or with `token` and `base` none).

    Raises:
        InputError: an argument is out of its range; `output` exists; see `load_for_inference` and `read_blocks`.
    """
    is_unpooled = pooling in ("token", "base")
    check_window(window, stride)
    if both_strands and pooling == "token":
        raise InputError("pooling: expected mean, max, cls or base with both strands, found token: each has its own")
    if max_batch_tokens < 3:
        raise InputError(f"max_batch_tokens: expected at least 3, found {max_batch_tokens}")
    if Path(output).suffix not in FORMATS:
        raise InputError(f"{output}: expected a name that ends in {', '.join(FORMATS)}")
    with ExitStack() as stack:
        # first of all, for an output that exists is known at once
        target = stack.enter_context(atomic_file(output))
        loaded = load_for_inference(model, DNAZenModel, precision, attn_implementation)
        config = loaded.model.config
        if layer is not None and not 0 <= layer <= config.num_hidden_layers:
            raise InputError(f"layer: expected 0 (the embeddings) to {config.num_hidden_layers}, found {layer}")
        attributes = {
            "model": model, "pooling": pooling, "layer": config.num_hidden_layers if layer is None else layer,
            "both_strands": both_strands, "window": window, "stride": stride, "precision": precision,
        }  # fmt: skip
        write = stack.enter_context(FORMATS[Path(output).suffix](target, Path(output), config.hidden_size, attributes))
        counts = dict.fromkeys(("records", "rows", "windows", "bases", "other_letters", "empty_records"), 0)
        counts["dimensions"] = config.hidden_size
        empty: list[str] = []
        progress = stack.enter_context(tqdm(desc="embedding", unit=" bases", unit_scale=True, disable=None))

        def states(batch: dict[str, Any]) -> list[np.ndarray]:
            """[CLS] and the tokens of each sequence, `[1 + n, H]`."""
            if layer is None:
                found = loaded.model(**batch).last_hidden_state
            else:
                found = loaded.model(**batch, output_hidden_states=True).hidden_states[layer]
            sizes = batch["cu_seqlens"].diff().tolist()
            return [sequence[:-1].numpy() for sequence in found.float().cpu().split(sizes)]

        groups = _tokenize(cut_windows(read_blocks(input), window, stride), loaded, both_strands)
        results = run_batches(groups, loaded.collator, states, loaded.model.device, max_batch_tokens)
        select = _unpooled if is_unpooled else _pooled
        for rows in join_rows(select(_counted(results, counts, empty, progress), pooling, config.hidden_size)):
            counts["rows"] += len(rows.records)
            write(rows)
    if counts["empty_records"]:
        outcome = "no row" if is_unpooled else "a row of NaN"
        names = ", ".join(empty) + ", ..." * (counts["empty_records"] > len(empty))
        logger.warning("%s: records without A, C, G, T have %s: %s", input, outcome, names)
    return counts


class _Strand(NamedTuple):
    """Where the tokens of one strand of a window lie in the record.

    Tokens ACG and TT of a window at base 10 have the spans (10, 13) and (13, 15); on the other strand the tokens are AA
    and CGT, say, with (13, 15) and (10, 13).
    """

    spans: np.ndarray  # int64 [n, 2]: [start, end) on the forward strand, in the order of the tokens
    is_reverse: bool


def _tokenize(
    windows: Iterable[Window], loaded: InferenceModel, both_strands: bool
) -> Iterator[tuple[tuple[Window, list[_Strand]], list[list[int]]]]:
    """Each window with its strands and the token ids of each; no strands where `is_end`."""
    lengths = np.array([len(token) for token in loaded.id_to_token])
    for window in windows:
        sequences = [] if window.is_end else [window.sequence]
        if both_strands:
            sequences += map(reverse_complement, sequences[:])
        ids = loaded.tokenize(sequences)
        strands = []
        for number, tokens in enumerate(ids):
            ends = lengths[tokens].cumsum()
            spans = np.stack([ends - lengths[tokens], ends], axis=1)
            if number:
                spans = len(window.sequence) - spans[:, ::-1]
            strands.append(_Strand(window.start + spans, bool(number)))
        yield (window, strands), ids


def _counted(
    results: Iterable, counts: dict[str, int], empty: list[str], progress: tqdm
) -> Iterator[tuple[Window, list[_Strand], list[np.ndarray]]]:
    """Pass on windows, strands and states; add what goes by to `counts`, and the first records without a base to
    `empty`."""
    bases = 0
    for (window, strands), states in results:
        if window.is_end:
            counts["records"] += 1
            counts["other_letters"] += window.start - bases
            counts["empty_records"] += not bases
            if not bases and len(empty) < 5:
                empty.append(window.record)
            bases = 0
        else:
            counts["windows"] += 1
            counts["bases"] += window.core_end - window.core_start
            bases += window.core_end - window.core_start
            progress.update(window.core_end - window.core_start)
        yield window, strands, states


def _in_core(window: Window, strand: _Strand) -> np.ndarray:
    """Which tokens begin, on their strand, in the window's core, `[n]` bool."""
    begins = strand.spans[:, 1] - 1 if strand.is_reverse else strand.spans[:, 0]
    return (begins >= window.core_start) & (begins < window.core_end)


def _pooled(
    results: Iterable[tuple[Window, list[_Strand], list[np.ndarray]]], pooling: str, hidden_size: int
) -> Iterator[Rows]:
    """A row for each record."""
    total = count = None  # of each strand: sum or maximum [strands, H], and of how many [strands, 1]
    for window, strands, states in results:
        if window.is_end:
            mean = np.full(hidden_size, np.nan) if total is None else (total / count).mean(0)
            yield Rows([window.record], np.array([[0, window.start]]), mean[None].astype(np.float32))
            total = None
            continue
        if pooling == "cls":
            parts = [of_strand[:1] for of_strand in states]
        else:
            parts = [of_strand[1:][_in_core(window, strand)] for strand, of_strand in zip(strands, states)]
        if pooling == "max":
            reduced = np.stack([part.max(0, initial=-np.inf) for part in parts])
            total, count = (reduced if total is None else np.maximum(total, reduced)), 1
        else:
            reduced = np.stack([part.sum(0, dtype=np.float64) for part in parts])
            number = np.array([[len(part)] for part in parts])
            total, count = (reduced, number) if total is None else (total + reduced, count + number)


def _unpooled(
    results: Iterable[tuple[Window, list[_Strand], list[np.ndarray]]], pooling: str, hidden_size: int
) -> Iterator[Rows]:
    """A row for each token, or for each base."""
    for window, strands, states in results:
        if window.is_end:
            continue
        if pooling == "token":
            inside = _in_core(window, strands[0])
            spans, vectors = strands[0].spans[inside], states[0][1:][inside]
        else:
            starts = np.arange(window.core_start, window.core_end)
            spans = np.stack([starts, starts + 1], axis=1)
            of_strands = []
            for strand, of_strand in zip(strands, states):
                step = -1 if strand.is_reverse else 1
                covering = np.repeat(np.arange(len(strand.spans)), np.diff(strand.spans)[:, 0])[::step]
                of_strands.append(of_strand[1:][covering[starts - window.start]])
            vectors = np.mean(of_strands, axis=0, dtype=np.float64).astype(np.float32)
        yield Rows([window.record] * len(spans), spans, vectors)
