"""`dnazen embed`: vectors of sequences, of their tokens or of their bases, written as they are computed."""

import csv
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from dnazen.batches.streaming import MAX_BATCH_TOKENS, run_batches
from dnazen.data.corpus import npy_header
from dnazen.data.fasta import reverse_complement
from dnazen.data.sequences import read_blocks
from dnazen.files import InputError, atomic_file
from dnazen.inference.loading import InferenceModel, load_for_inference
from dnazen.inference.windows import WINDOW_BASES, Window, check_window, cut_windows
from dnazen.models import DNAZenModel

logger = logging.getLogger(__name__)

POOLINGS = ("mean", "max", "cls", "token", "base")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WRITE_BYTES = 1 << 22


class Rows(NamedTuple):
    """Vectors, and the stretch `[start, end)` of a record that each stands for."""

    records: list[str]
    spans: np.ndarray  # int64 [n, 2]
    vectors: np.ndarray  # fp32 [n, H]


Write = Callable[[Rows], None]


def embed(
    model: str,
    input: str | PathLike,
    output: str | PathLike,
    pooling: str = "mean",
    layer: int | None = None,
    both_strands: bool = False,
    window: int = WINDOW_BASES,
    stride: int = WINDOW_BASES // 2,
    precision: str = "fp32",
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> dict[str, int]:
    """Write the vectors of all records of a FASTA or CSV file; at most some batches of them are in memory.

    Records are cut into windows (`cut_windows`), each tokenized by itself. A token counts, and a base has its vector
    from, the window in which it lies farthest from the ends. `mean` and `max` are over a record's tokens, without the
    special ones, `cls` the mean of [CLS] over its windows; `token` and `base` have a row for each token, or base of A,
    C, G and T. The last is the vector of the token that covers the base.

    Args:
        model: a folder or a name on the Hugging Face hub; its encoders are used.
        input: FASTA, or CSV with a column `sequence` (`read_blocks`).
        output: .npy (a table of what each row stands for is written beside it, in .tsv), .parquet or .h5.
        pooling: one of `POOLINGS`.
        layer: the token encoder's states after so many layers, 0 for the embeddings; None for the last.
        both_strands: average the vectors of each stretch and of its reverse complement; those of a record and of its
            reverse complement are then the same, but for rounding, as the windows are symmetric.
        window, stride: in bases; windows begin at most `stride` after the last.
        precision: of weights and states; the vectors are fp32 all the same.
        max_batch_tokens: changes the vectors by rounding alone.

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
    if Path(output).suffix not in _FORMATS:
        raise InputError(f"{output}: expected a name that ends in {', '.join(_FORMATS)}")
    with ExitStack() as stack:
        # first of all, for an output that exists is known at once
        target = stack.enter_context(atomic_file(output))
        loaded = load_for_inference(model, DNAZenModel, PRECISIONS[precision])
        config = loaded.model.config
        if layer is not None and not 0 <= layer <= config.num_hidden_layers:
            raise InputError(f"layer: expected 0 (the embeddings) to {config.num_hidden_layers}, found {layer}")
        attributes = {
            "model": model, "pooling": pooling, "layer": config.num_hidden_layers if layer is None else layer,
            "both_strands": both_strands, "window": window, "stride": stride, "precision": precision,
        }  # fmt: skip
        write = stack.enter_context(_FORMATS[Path(output).suffix](target, Path(output), config.hidden_size, attributes))
        counts = dict.fromkeys(("records", "rows", "windows", "bases", "other_letters", "empty_records"), 0)
        counts["dimensions"] = config.hidden_size
        empty: list[str] = []
        progress = stack.enter_context(tqdm(desc="embedding", unit=" bases", unit_scale=True))

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
        for rows in _in_chunks(select(_counted(results, counts, empty, progress), pooling, config.hidden_size)):
            counts["rows"] += len(rows.records)
            write(rows)
    if counts["empty_records"]:
        outcome = "no row" if is_unpooled else "a row of NaN"
        names = ", ".join(empty) + ", ..." * (counts["empty_records"] > len(empty))
        logger.warning("%s: records without A, C, G, T have %s: %s", input, outcome, names)
    return counts


class _Strand(NamedTuple):
    """One strand of a window: where each of its tokens lies in the record, `[start, end)`, and whether reversed."""

    spans: np.ndarray  # int64 [n, 2]
    is_reverse: bool


def _tokenize(
    windows: Iterable[Window], loaded: InferenceModel, both_strands: bool
) -> Iterator[tuple[tuple[Window, list[_Strand]], list[list[int]]]]:
    """Each window with the token ids of its strands: none at the end of a record."""
    lengths = np.array([len(token) for token in loaded.spelling])
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
    """Pass on windows, strands and states; count what goes by, and keep the names of some records without a base."""
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


def _own(window: Window, strand: _Strand) -> np.ndarray:
    """Which tokens begin, on their strand, among the window's own bases, `[n]` bool."""
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
            parts = [of_strand[1:][_own(window, strand)] for strand, of_strand in zip(strands, states)]
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
            own = _own(window, strands[0])
            spans, vectors = strands[0].spans[own], states[0][1:][own]
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


def _in_chunks(rows: Iterable[Rows]) -> Iterator[Rows]:
    """The same rows, some MB at a time."""
    held: list[Rows] = []

    def joined() -> Rows:
        records = [record for part in held for record in part.records]
        return Rows(records, *(np.concatenate(column) for column in list(zip(*held))[1:]))

    size = 0
    for part in rows:
        held.append(part)
        size += part.vectors.nbytes
        if size >= _WRITE_BYTES:
            yield joined()
            held, size = [], 0
    if held:
        yield joined()


@contextmanager
def _open_npy(target: Path, output: Path, hidden_size: int, attributes: dict[str, Any]) -> Iterator[Write]:
    """The vectors `[n, H]`; beside them, in .tsv, record, start and end of each row."""
    num_rows = 0
    with atomic_file(output.with_suffix(".tsv")) as table_path, open(table_path, "w", newline="") as table:
        table_writer = csv.writer(table, delimiter="\t", lineterminator="\n")
        table_writer.writerow(["record", "start", "end"])
        with open(target, "wb") as file:
            file.write(npy_header(np.dtype(np.float32), (0, hidden_size)))

            def write(rows: Rows) -> None:
                nonlocal num_rows
                num_rows += len(rows.records)
                file.write(np.ascontiguousarray(rows.vectors).data)
                table_writer.writerows(zip(rows.records, *rows.spans.T.tolist()))

            yield write
            file.seek(0)
            file.write(npy_header(np.dtype(np.float32), (num_rows, hidden_size)))


@contextmanager
def _open_parquet(target: Path, output: Path, hidden_size: int, attributes: dict[str, Any]) -> Iterator[Write]:
    """Columns record, start, end, vector; what was asked for is in the file's metadata."""
    vector = pa.list_(pa.float32(), hidden_size)
    columns = {"record": pa.string(), "start": pa.int64(), "end": pa.int64(), "vector": vector}
    schema = pa.schema(columns, metadata={name: str(value) for name, value in attributes.items()})
    with pq.ParquetWriter(target, schema) as writer:

        def write(rows: Rows) -> None:
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.vectors.ravel()), type=vector)
            writer.write_table(pa.table([rows.records, *rows.spans.T, vectors], schema=schema))

        yield write


@contextmanager
def _open_h5(target: Path, output: Path, hidden_size: int, attributes: dict[str, Any]) -> Iterator[Write]:
    """Data sets record, start, end `[n]` and vector `[n, H]`; what was asked for is in the file's attributes."""
    with _UnfailingFile(target, "w+") as stored, h5py.File(stored, "w") as file:
        file.attrs.update(attributes)
        kinds = {"record": h5py.string_dtype(), "start": np.int64, "end": np.int64}
        sets = [file.create_dataset(name, (0,), kind, maxshape=(None,), chunks=(4096,)) for name, kind in kinds.items()]
        shape, chunks = (0, hidden_size), (max(1, (1 << 20) // (4 * hidden_size)), hidden_size)
        sets.append(file.create_dataset("vector", shape, np.float32, maxshape=(None, hidden_size), chunks=chunks))

        def write(rows: Rows) -> None:
            for data_set, column in zip(sets, (rows.records, *rows.spans.T, rows.vectors)):
                size = len(data_set)
                data_set.resize(size + len(column), axis=0)
                data_set[size:] = column
            if stored.error:
                raise stored.error

        yield write


class _UnfailingFile(io.FileIO):
    """A file whose writes never fail: HDF5 ends the process when one does. The first error is raised on the way out."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while len(rest) and self.error is None:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return self.tell() if size is None else size

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if self.error:
            raise self.error


_FORMATS: dict[str, Callable[[Path, Path, int, dict[str, Any]], AbstractContextManager[Write]]] = {
    ".npy": _open_npy, ".parquet": _open_parquet, ".h5": _open_h5,
}  # fmt: skip
