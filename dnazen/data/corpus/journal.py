"""What a build that was stopped leaves to the next one, in the folder `.state` of its temporary folder.

`task` says what is built; `journal` has a line for each finished FASTA file, written once all that it speaks of is on
disk; `digests` has those of all pieces.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dnazen.data.corpus.pieces import DIGEST_DTYPE
from dnazen.data.corpus.shard import ShardCounts, open_at, write_all

_STATE = ".state"


@dataclass
class FinishedFile:
    """A line of the journal."""

    source: dict[str, Any]  # the file's name, SHA-256 and size, and what became of its records, as in the manifest
    totals: dict[str, int]  # of all files so far, as in the manifest
    validation: list[list[int]]  # the file's held-out pieces: record, start and end
    shards: list[dict[str, Any]]  # those that became full in this file, as in the manifest
    unfinished: dict[str, ShardCounts]  # the shard of each split that was being written
    digests: int  # how many


class Journal:
    """The finished files, read at first and then written; `files` has all of them."""

    def __init__(self, directory: Path, task: str):
        self._state = directory / _STATE
        self._state.mkdir(exist_ok=True)
        (self._state / "task").write_text(task)
        lines = list(_read_lines(self._state))
        self.files = [FinishedFile(**json.loads(line)) for line in lines]
        self._file = open_at(self._state / "journal", sum(map(len, lines)))
        self.seen = SeenPieces(self._state / "digests", self.files[-1].digests if self.files else 0)

    def append(self, file: FinishedFile) -> None:
        """Add a file, of which all but the digests is on disk."""
        self.seen.sync()
        write_all(self._file, json.dumps(vars(file)).encode() + b"\n")
        os.fsync(self._file.fileno())
        self.files.append(file)

    def close(self) -> None:
        """Close the files, whatever is in them."""
        self._file.close()
        self.seen.close()

    def remove(self) -> None:
        """Leave nothing but the corpus."""
        shutil.rmtree(self._state)


def is_of(leftover: Path, task: str, sources: list[dict[str, Any]]) -> bool:
    """Whether what a stopped run left is the same corpus as far as it goes, with at least one file done."""
    file = leftover / _STATE / "task"
    if not file.is_file() or file.read_text() != task or any(source["bytes"] is None for source in sources):
        return False  # standard input cannot be read again
    done = [json.loads(line)["source"] | {"records": None} for line in _read_lines(leftover / _STATE)]
    return done != [] and done == [source | {"records": None} for source in sources[: len(done)]]


def _read_lines(state: Path) -> Iterator[bytes]:
    """Yield the lines of a journal, of which the last may have been cut short: then all others."""
    with contextlib.suppress(FileNotFoundError), (state / "journal").open("rb") as file:
        yield from itertools.takewhile(lambda line: line.endswith(b"\n"), file)


class SeenPieces:
    """The digests of all pieces so far, 16 bytes each, in a file and in memory.

    In memory they are in sorted arrays, each at least twice as long as the next, so that few are searched and what is
    added is seldom merged with much.
    """

    def __init__(self, path: Path, number: int):
        self._file = open_at(path, number * DIGEST_DTYPE.itemsize)
        digests = np.fromfile(path, DIGEST_DTYPE)
        self._runs = [np.sort(digests)] if number else []

    def __len__(self) -> int:
        return self._file.tell() // DIGEST_DTYPE.itemsize

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add digests `[n]`; return which of them were there before, or come earlier among them, bool `[n]`."""
        write_all(self._file, digests.tobytes())
        seen = np.ones(len(digests), bool)
        seen[np.unique(digests, return_index=True)[1]] = False
        for run in self._runs:
            seen |= run[np.minimum(np.searchsorted(run, digests), len(run) - 1)] == digests
        new = np.sort(digests[~seen])
        while self._runs and len(self._runs[-1]) < 2 * len(new):
            new = np.sort(np.concatenate((self._runs.pop(), new)), kind="stable")  # merges in linear time
        if len(new):
            self._runs.append(new)
        return seen

    def sync(self) -> None:
        """Wait until all are on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
