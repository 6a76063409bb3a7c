"""The bases of a reference genome by place."""

import mmap
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

from dnazen.data.fasta import FastaReader


class Reference:
    """A FASTA file's bases by place, in a plain copy on disk that has no name, so that nothing is left of it.

    The copy of `>x ACGT >y GG` is `ACGTGG`, and `contigs` says {"x": (0, 4), "y": (4, 2)}.

    Args:
        path: FASTA, plain or compressed.
        folder: where the copy lies.

    Raises:
        InputError: see `FastaReader`.
    """

    def __init__(self, path: str | PathLike, folder: Path):
        self.path = Path(path)
        self.contigs: dict[str, tuple[int, int]] = {}  # where its bases begin in the copy, how many they are
        self._copy = tempfile.TemporaryFile(dir=folder)
        for block in FastaReader(path):
            start, length = self.contigs.get(block.name, (self._copy.tell(), 0))
            self.contigs[block.name] = start, length + len(block.sequence)
            self._copy.write(block.sequence)
        self._copy.flush()
        self._bases = mmap.mmap(self._copy.fileno(), 0, access=mmap.ACCESS_READ)

    def __enter__(self) -> "Reference":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bases.close()
        self._copy.close()

    def fetch(self, contig: str, start: int, end: int) -> str:
        """Upper-case bases `[start, end)` of a contig, from 0; those that there are."""
        offset, length = self.contigs[contig]
        return self._bases[offset + max(start, 0) : offset + min(end, length)].decode()
