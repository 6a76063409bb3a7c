"""Reading a corpus: its manifest, its tokenizer and, memory-mapped, the sequences of its splits."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from dnazen.data.corpus.shard import open_shard
from dnazen.data.tokenizer import load_tokenizer, tokenizer_checksum
from dnazen.files import InputError, read_json, sha256_file

FORMAT = "dnazen-corpus"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")


class TokenSplit:
    """The sequences of one split, memory-mapped: `split[i]` is a read-only uint16 view of sequence i's tokens.

    `lengths` is int64 `[n]`, in tokens; `shards` lists (tokens, offsets), and `pieces` the provenance, of each shard.
    """

    def __init__(self, shards: Sequence[dict[str, np.ndarray]]):
        self.shards = [(shard["tokens"], shard["offsets"]) for shard in shards]
        self.pieces = [shard["pieces"] for shard in shards]
        self.lengths = np.concatenate([np.diff(offsets) for _, offsets in self.shards])
        self.num_tokens = int(self.lengths.sum())
        self._first = np.cumsum([0] + [len(pieces) for pieces in self.pieces])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of a split of {len(self)}")
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        tokens, offsets = self.shards[shard]
        row = index - self._first[shard]
        return np.asarray(tokens[offsets[row] : offsets[row + 1]])


class Corpus:
    """A corpus folder opened for reading; `checksum` is the SHA-256 of its manifest."""

    def __init__(self, path: Path, manifest: dict[str, Any], verify: bool):
        self.path = path
        self.manifest = manifest
        self.checksum = sha256_file(path / "manifest.json")
        self.tokenizer = load_tokenizer(path / "tokenizer")
        if tokenizer_checksum(self.tokenizer) != manifest["tokenizer"]["checksum"]:
            raise InputError(f"{path / 'tokenizer'}: altered; it is not the tokenizer that the corpus was made with")
        opened: dict[str, list[dict[str, np.ndarray]]] = {split: [] for split in SPLITS}
        for shard in manifest["shards"]:
            opened[shard["split"]].append(open_shard(path, shard, verify))
        if not all(opened.values()):
            raise InputError(f"{path / 'manifest.json'}: altered; expected shards of {' and '.join(SPLITS)}")
        self.train, self.validation = (TokenSplit(opened[split]) for split in SPLITS)

    def everything(self) -> TokenSplit:
        """Both splits as one, the training split first."""
        parts = [
            {"tokens": tokens, "offsets": offsets, "pieces": pieces}
            for split in (self.train, self.validation)
            for (tokens, offsets), pieces in zip(split.shards, split.pieces)
        ]
        return TokenSplit(parts)

    @classmethod
    def open(cls, path: str | PathLike, verify: bool = True) -> "Corpus":
        """Memory-map a corpus, checking every file's type and shape and, with `verify`, its SHA-256.

        Raises:
            InputError: the folder is no corpus, is of another format version, or a file of it is missing, cut short
                or altered.
        """
        path = Path(path)
        manifest = read_json(path / "manifest.json", "the manifest of a corpus (made by `dnazen corpus`)")
        found = (manifest.get("format"), manifest.get("format_version"))
        if found != (FORMAT, FORMAT_VERSION):
            expected = f"a corpus made by `dnazen corpus` ({FORMAT} of version {FORMAT_VERSION})"
            raise InputError(f"{path}: expected {expected}, found {found[0]} of version {found[1]}; build it anew")
        try:
            return cls(path, manifest, verify)
        except (KeyError, TypeError) as error:
            raise InputError(f"{path / 'manifest.json'}: altered; {error!r}") from error
