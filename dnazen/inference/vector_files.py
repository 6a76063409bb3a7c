"""Files of vectors: .npy, .parquet and .h5, written row by row."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dnazen.data.corpus import npy_header
from dnazen.files import atomic_file

_WRITE_BYTES = 1 << 22


class Rows(NamedTuple):
    """Vectors, and the bases `[start, end)` of a record that each stands for."""

    records: list[str]
    spans: np.ndarray  # int64 [n, 2]
    vectors: np.ndarray  # fp32 [n, H]


Write = Callable[[Rows], None]


def join_rows(rows: Iterable[Rows]) -> Iterator[Rows]:
    """The same rows, some MB at a time: few and large writes."""
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


# by ending: opens `target`, which will be called `output`, for vectors of so many numbers; the last: what was asked for
FORMATS: dict[str, Callable[[Path, Path, int, dict[str, Any]], AbstractContextManager[Write]]] = {
    ".npy": _open_npy, ".parquet": _open_parquet, ".h5": _open_h5,
}  # fmt: skip
