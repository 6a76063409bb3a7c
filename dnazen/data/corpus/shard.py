"""The files of a corpus: shards of three memory-mapped arrays each, written a few sequences at a time.

A shard of two sequences, of the tokens 7 8 9 and 5 6, that lie one behind the other in record 0:

    train-00000.tokens.npy   uint16 [5]        7 8 9 5 6
    train-00000.offsets.npy  int64 [3]         0 3 5: sequence i has the tokens [offsets[i], offsets[i + 1])
    train-00000.pieces.npy   PIECE_DTYPE [2]   (0, 0, 14, 0) (0, 14, 9, 0): record, start, length, reverse
"""

import io
import os
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from dnazen.files import InputError, sha256_file

# bases [start, start + length) of the record; their reverse complement if `reverse`
PIECE_DTYPE = np.dtype([("record", "<i4"), ("start", "<i8"), ("length", "<i4"), ("reverse", "i1")])
DTYPES = {"tokens": np.dtype("<u2"), "offsets": np.dtype("<i8"), "pieces": PIECE_DTYPE}


class ShardCounts(TypedDict):
    """How many there are in a shard so far, and the shard's number in its split."""

    number: int
    sequences: int
    tokens: int
    bases: int


class SplitWriter:
    """Writes the sequences of a split into one shard after the other.

    With the counts of a shard that a killed run left, it goes on there, and what that run wrote behind them is cut off.
    A shard has at most `shard_tokens` tokens, but for a sequence that has more: that is alone in one.
    """

    def __init__(self, directory: Path, split: str, shard_tokens: int, counts: ShardCounts):
        self._directory, self._split, self._shard_tokens = directory, split, shard_tokens
        self._shard = _Shard(directory, split, counts)

    @property
    def counts(self) -> ShardCounts:
        """Those of the shard that is being written."""
        return self._shard.counts

    def append(self, tokens: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> list[dict[str, Any]]:
        """Write some sequences: their tokens, and of each its length and its row of `PIECE_DTYPE`.

        Returns what the manifest says of the shards that became full.
        """
        full = []
        ends = np.cumsum(lengths)
        done = first = 0
        while first < len(rows):
            counts = self._shard.counts
            room = self._shard_tokens - counts["tokens"]
            end = int(np.searchsorted(ends, done + room, side="right"))
            if end <= first and not counts["sequences"]:
                end = first + 1
            if end > first:
                self._shard.append(tokens[done : ends[end - 1]], lengths[first:end], rows[first:end])
                first, done = end, int(ends[end - 1])
            if first < len(rows):
                full.append(self._shard.finish())
                self._shard = _Shard(self._directory, self._split, new_shard(counts["number"] + 1))
        return full

    def sync(self) -> None:
        """Wait until all is on disk."""
        self._shard.sync()

    def finish(self) -> dict[str, Any]:
        """End the last shard; return what the manifest says of it."""
        return self._shard.finish()

    def close(self) -> None:
        """Close the files, whatever is in them."""
        self._shard.close()


def new_shard(number: int) -> ShardCounts:
    """The counts of a shard with nothing in it."""
    return {"number": number, "sequences": 0, "tokens": 0, "bases": 0}


class _Shard:
    """The three files of a shard as they are written; their headers have the final sizes once it is finished."""

    def __init__(self, directory: Path, split: str, counts: ShardCounts):
        self.counts: ShardCounts = {**counts}
        self._split = split
        self._name = f"{split}-{counts['number']:05d}"
        self._paths = {part: directory / f"{self._name}.{part}.npy" for part in DTYPES}
        self._files = {}
        for part, items in _count_items(counts).items():
            header, size = npy_header(DTYPES[part], (items,)), items * DTYPES[part].itemsize
            if counts["sequences"]:
                self._files[part] = open_at(self._paths[part], len(header) + size)
            else:
                self._files[part] = open_at(self._paths[part], 0)
                write_all(self._files[part], header + bytes(size))

    def append(self, tokens: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> None:
        offsets = self.counts["tokens"] + np.cumsum(lengths)
        for part, values in (("tokens", tokens), ("offsets", offsets), ("pieces", rows)):
            write_all(self._files[part], values.astype(DTYPES[part], copy=False).tobytes())
        self.counts["sequences"] += len(rows)
        self.counts["tokens"] += len(tokens)
        self.counts["bases"] += int(rows["length"].sum())

    def sync(self) -> None:
        for file in self._files.values():
            os.fsync(file.fileno())

    def finish(self) -> dict[str, Any]:
        for part, items in _count_items(self.counts).items():
            self._files[part].seek(0)
            write_all(self._files[part], npy_header(DTYPES[part], (items,)))
        self.sync()
        self.close()
        files = {path.name: sha256_file(path) for path in self._paths.values()}
        counts = {name: value for name, value in self.counts.items() if name != "number"}
        return {"split": self._split, "name": self._name, **counts, "files": files}

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def open_shard(directory: Path, shard: dict[str, Any], verify: bool) -> dict[str, np.ndarray]:
    """Memory-map the arrays `tokens`, `offsets` and `pieces` of a shard that the manifest describes.

    Raises:
        InputError: a file is missing or cut short, has another type or shape, or, with `verify`, another SHA-256.
    """
    arrays = {}
    for part, items in _count_items(shard).items():
        file = directory / f"{shard['name']}.{part}.npy"
        try:
            arrays[part] = array = np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{file}: this file of the corpus is missing, cut short or altered: {error}") from error
        expected, found = f"{DTYPES[part]} [{items}]", f"{array.dtype} {list(array.shape)}"
        if found != expected:
            raise InputError(f"{file}: altered; expected {expected}, found {found}")
        if verify and sha256_file(file) != shard["files"][file.name]:
            raise InputError(f"{file}: altered; its checksum is not the one in the corpus's manifest")
    return arrays


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The head of a .npy file; numpy pads it to one length, whatever the size of the first axis."""
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def open_at(path: Path, size: int) -> io.FileIO:
    """Open a file for writing behind its first `size` bytes; what lies there is cut off.

    Unbuffered, so that a full disk is an error where something is written, and nowhere else.
    """
    path.touch()
    file = path.open("r+b", buffering=0)
    file.truncate(size)
    file.seek(size)
    return file


def write_all(file: io.FileIO, data: bytes) -> None:
    """Write all of it; a write to an unbuffered file may take a part."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _count_items(counts: Any) -> dict[str, int]:
    """Items of each array of a shard, from its counts or from what the manifest says of it."""
    return {"tokens": counts["tokens"], "offsets": counts["sequences"] + 1, "pieces": counts["sequences"]}
