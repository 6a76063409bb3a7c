"""The corpus on disk: FASTA files cut into clean pieces and tokenized, as memory-mapped shards with a manifest.

A corpus is a folder with `manifest.json`, a copy of its tokenizer in `tokenizer/`, and shards `train-00000`, ...,
`validation-00000`, ... of three .npy files each: `.tokens` (uint16, no special tokens), `.offsets` (int64, one more
than sequences) and `.pieces` (`PIECE_DTYPE`: where each sequence comes from). Records are numbered over all files.
"""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dnazen import __version__
from dnazen.data.fasta import FastaRecord, describe_sources, find_clean_runs, read_fasta
from dnazen.data.fasta import reverse_complement as to_reverse_complement
from dnazen.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_checksum
from dnazen.files import InputError, atomic_directory, read_json, sha256_file, write_json

FORMAT = "dnazen-corpus"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")
# Bases [start, start + length) of the record; their reverse complement if `reverse`.
PIECE_DTYPE = np.dtype([("record", "<i4"), ("start", "<i8"), ("length", "<i4"), ("reverse", "i1")])
_DTYPES = {"tokens": np.dtype("<u2"), "offsets": np.dtype("<i8"), "pieces": PIECE_DTYPE}
# DNABERT-2's protocol counts on n / 4 tokens in a sequence of n bases.
_BASES_PER_TOKEN = 4
_CHUNK_PIECES = 1024
_COUNTS = ("length", "pieces", "bases", "dropped_short", "dropped_bases", "cut_runs", "cut_bases")


class _Piece(NamedTuple):
    record: int
    start: int
    bases: str
    reverse: bool
    split: str

    def halve(self) -> tuple["_Piece", "_Piece"]:
        """Cut in the middle; on the reverse strand the first half lies further along the record."""
        first, second = self.bases[: len(self.bases) // 2], self.bases[len(self.bases) // 2 :]
        starts = (self.start + len(second), self.start) if self.reverse else (self.start, self.start + len(first))
        return self._replace(start=starts[0], bases=first), self._replace(start=starts[1], bases=second)


def build_corpus(
    fasta_paths: Sequence[str | PathLike],
    tokenizer: PreTrainedTokenizerFast,
    output_dir: str | PathLike,
    *,
    max_tokens: int = 510,
    min_length: int = 64,
    reverse_complement: bool = False,
    validation_fraction: float = 0.01,
    num_workers: int | None = None,
    shard_tokens: int = 2**27,
) -> dict[str, Any]:
    """Clean and tokenize FASTA files into a corpus folder; return its manifest.

    Runs of A, C, G, T are cut into pieces of `4 * max_tokens` bases; those under `min_length` bases are dropped. A
    piece of more than `max_tokens` tokens is halved until none is, each half tokenized by itself. Pieces are numbered
    over all files, and number i is held out for validation iff `floor((i + 1) f + 0.5) > floor(i f + 0.5)`, its
    halves and reverse complement with it. The bytes written do not depend on `num_workers` (threads; default: every
    core), nor the memory used on the corpus, only on its longest record and one shard (2 bytes a token) per split.

    Raises:
        InputError: a parameter is out of range, `output_dir` has something in it, a file is given twice or is not
            FASTA, the tokenizer does not spell a piece, or a split would be empty. Nothing is left behind.
    """
    size = _BASES_PER_TOKEN * max_tokens
    for name, value, is_valid, expected in (
        ("max_tokens", max_tokens, max_tokens >= 1, "1 or more"),
        ("min_length", min_length, 1 <= min_length <= size, f"1 to {size} bases ({_BASES_PER_TOKEN} * max_tokens)"),
        ("validation_fraction", validation_fraction, 0 < validation_fraction < 1, "more than 0 and less than 1"),
        ("num_workers", num_workers, num_workers is None or num_workers >= 1, "1 or more"),
        ("tokenizer", len(tokenizer), len(tokenizer) <= 2**16, f"at most {2**16} tokens, to fit uint16"),
    ):
        if not is_valid:
            raise InputError(f"{name}: expected {expected}, found {value}")
    if num_workers is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_workers > 1 else "false"
        os.environ["RAYON_NUM_THREADS"] = str(num_workers)
    with atomic_directory(output_dir) as directory:
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dnazen_version": __version__,
            "tokenizer": {"checksum": tokenizer_checksum(tokenizer), "vocab_size": len(tokenizer)},
            "parameters": {
                "max_tokens": max_tokens,
                "min_length": min_length,
                "piece_length": size,
                "reverse_complement": reverse_complement,
                "validation_fraction": validation_fraction,
            },
            "totals": {"records": 0, **dict.fromkeys(_COUNTS, 0), "pieces_split": 0},
            "sources": [{**source, "records": []} for source in describe_sources(fasta_paths)],
            "shards": [],
            "validation": [],
        }
        _write_shards(directory, manifest, fasta_paths, tokenizer, shard_tokens)
        save_tokenizer(tokenizer, directory / "tokenizer")
        write_json(directory / "manifest.json", manifest)
    return manifest


def summarize(manifest: dict[str, Any]) -> str:
    """What a person wants to know of a corpus, in lines of text."""
    totals, parameters = manifest["totals"], manifest["parameters"]
    train, validation = totals["train"], totals["validation"]
    tokens, bases = train["tokens"] + validation["tokens"], train["bases"] + validation["bases"]
    strands = "both strands" if parameters["reverse_complement"] else "one strand"
    return f"""\
files       {len(manifest["sources"])}, with {totals["records"]:,} records, {totals["length"]:,} bases
cut out     {totals["cut_bases"]:,} bases other than A, C, G, T, in {totals["cut_runs"]:,} runs
dropped     {totals["dropped_bases"]:,} bases, in {totals["dropped_short"]:,} pieces under {parameters["min_length"]}
kept        {totals["bases"]:,} bases, in {totals["pieces"]:,} pieces of at most {parameters["piece_length"]}; {strands}
halved      {totals["pieces_split"]:,} times, a piece of more than {parameters["max_tokens"]} tokens
tokens      {tokens:,}, {bases / tokens:.2f} bases a token
train       {train["sequences"]:,} sequences, {train["tokens"]:,} tokens
validation  {validation["sequences"]:,} sequences, {validation["tokens"]:,} tokens"""


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
            opened[shard["split"]].append(_open_shard(path, shard, verify))
        if not all(opened.values()):
            raise InputError(f"{path / 'manifest.json'}: altered; expected shards of {' and '.join(SPLITS)}")
        self.train, self.validation = (TokenSplit(opened[split]) for split in SPLITS)

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


def _write_shards(
    directory: Path,
    manifest: dict[str, Any],
    fasta_paths: Sequence[str | PathLike],
    tokenizer: PreTrainedTokenizerFast,
    shard_tokens: int,
) -> None:
    """Write all sequences, and fill in what the manifest says of them."""
    totals, max_tokens = manifest["totals"], manifest["parameters"]["max_tokens"]
    spelling = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    shards = {split: _Shard(split, 0) for split in SPLITS}
    pieces = _cut_files(fasta_paths, manifest)
    with tqdm(desc="tokenizing", unit=" bases", unit_scale=True) as progress:
        while chunk := list(itertools.islice(pieces, _CHUNK_PIECES)):
            totals["pieces_split"] -= len(chunk)
            for piece, ids in _tokenize(chunk, tokenizer, spelling, max_tokens):
                totals["pieces_split"] += 1
                shard = shards[piece.split]
                if shard.pieces and shard.offsets[-1] + len(ids) > shard_tokens:
                    manifest["shards"].append(shard.write(directory))
                    shard = shards[piece.split] = _Shard(piece.split, shard.number + 1)
                shard.append(piece, ids)
            progress.update(sum(len(piece.bases) for piece in chunk))
    held_out = len(manifest["validation"])
    training = totals["pieces"] - held_out
    if not held_out or not training:
        raise InputError(
            "validation_fraction {validation_fraction} and min_length {min_length}".format(**manifest["parameters"])
            + f" left {training} pieces to train on and {held_out} to validate on; expected 1 or more of each: change "
            "--validation-fraction or --min-length of `dnazen corpus`, or add sequence"
        )
    manifest["shards"] += [shard.write(directory) for shard in shards.values()]
    manifest["shards"].sort(key=lambda shard: shard["name"])
    for split in SPLITS:
        described = [shard for shard in manifest["shards"] if shard["split"] == split]
        totals[split] = {key: sum(shard[key] for shard in described) for key in ("sequences", "tokens", "bases")}


def _cut_files(fasta_paths: Sequence[str | PathLike], manifest: dict[str, Any]) -> Iterator[_Piece]:
    """Yield every kept piece, and fill in what the manifest says of records, totals and held-out pieces."""
    totals, parameters = manifest["totals"], manifest["parameters"]
    fraction = parameters["validation_fraction"]
    for path, source in zip(fasta_paths, manifest["sources"]):
        for record in read_fasta(path):
            ordinal, number = totals["pieces"], totals["records"]
            spans, entry = _cut_record(record, parameters["piece_length"], parameters["min_length"])
            source["records"].append(entry)
            totals["records"] += 1
            for count in _COUNTS:
                totals[count] += entry[count]
            for i, (start, end) in enumerate(spans, ordinal):
                is_held_out = math.floor((i + 1) * fraction + 0.5) > math.floor(i * fraction + 0.5)
                if is_held_out:
                    manifest["validation"].append([number, start, end])
                bases = record.sequence[start:end]
                yield _Piece(number, start, bases, False, SPLITS[is_held_out])
                if parameters["reverse_complement"]:
                    yield _Piece(number, start, to_reverse_complement(bases), True, SPLITS[is_held_out])


def _cut_record(record: FastaRecord, size: int, min_length: int) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """Cut a record into pieces `[start, end)` of `size` bases; count what was kept, dropped and cut out."""
    runs = find_clean_runs(record.sequence)
    spans = [(start, min(start + size, end)) for first, end in runs for start in range(first, end, size)]
    kept = [(start, end) for start, end in spans if end - start >= min_length]
    length = len(record.sequence)
    clean_bases = sum(end - start for start, end in runs)
    kept_bases = sum(end - start for start, end in kept)
    # What is not clean lies between clean runs, and may lie before the first and behind the last.
    cut_runs = len(runs) - 1 + (runs[0][0] > 0) + (runs[-1][1] < length) if runs else 1
    kept_counts = (len(kept), kept_bases, len(spans) - len(kept), clean_bases - kept_bases)
    return kept, {"name": record.name, **dict(zip(_COUNTS, (length, *kept_counts, cut_runs, length - clean_bases)))}


def _tokenize(
    pieces: Sequence[_Piece], tokenizer: PreTrainedTokenizerFast, spelling: dict[int, str], max_tokens: int
) -> Iterator[tuple[_Piece, list[int]]]:
    """Yield each piece, or the halves of one that is too long, with its token ids."""
    texts = [piece.bases for piece in pieces]
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for piece, encoding in zip(pieces, encodings):
        ids = encoding.ids
        tokens = list(map(spelling.get, ids))
        if "".join(tokens) != piece.bases:
            raise InputError(
                f"the tokenizer does not spell every run of A, C, G, T: {piece.bases[:20]}... (record {piece.record}, "
                f"base {piece.start}) became {' '.join(tokens[:5]) or 'nothing'}..."
            )
        if len(ids) <= max_tokens:
            yield piece, ids
        else:
            yield from _tokenize(piece.halve(), tokenizer, spelling, max_tokens)


class _Shard:
    """Sequences of one split, gathered until there are enough for a shard."""

    def __init__(self, split: str, number: int):
        self.split = split
        self.number = number
        self.tokens = bytearray()
        self.offsets = [0]
        self.pieces: list[tuple[int, int, int, bool]] = []

    def append(self, piece: _Piece, ids: list[int]) -> None:
        self.tokens += np.array(ids, dtype=_DTYPES["tokens"]).tobytes()
        self.offsets.append(self.offsets[-1] + len(ids))
        self.pieces.append((piece.record, piece.start, len(piece.bases), piece.reverse))

    def write(self, directory: Path) -> dict[str, Any]:
        """Write the shard's files; return what the manifest says of it."""
        name = f"{self.split}-{self.number:05d}"
        files = {}
        for part, dtype in _DTYPES.items():
            values = getattr(self, part)
            array = np.frombuffer(values, dtype) if part == "tokens" else np.array(values, dtype)
            path = directory / f"{name}.{part}.npy"
            # Not np.save: its error of a full disk has no errno.
            with path.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
                file.write(array.data)
            files[path.name] = sha256_file(path)
        bases = sum(length for _, _, length, _ in self.pieces)
        counts = {"sequences": len(self.pieces), "tokens": self.offsets[-1], "bases": bases}
        return {"split": self.split, "name": name, **counts, "files": files}


def _open_shard(directory: Path, shard: dict[str, Any], verify: bool) -> dict[str, np.ndarray]:
    items = {"tokens": shard["tokens"], "offsets": shard["sequences"] + 1, "pieces": shard["sequences"]}
    arrays = {}
    for part, dtype in _DTYPES.items():
        file = directory / f"{shard['name']}.{part}.npy"
        try:
            arrays[part] = array = np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{file}: this file of the corpus is missing, cut short or altered: {error}") from error
        expected, found = f"{dtype} [{items[part]}]", f"{array.dtype} {list(array.shape)}"
        if found != expected:
            raise InputError(f"{file}: altered; expected {expected}, found {found}")
        if verify and sha256_file(file) != shard["files"][file.name]:
            raise InputError(f"{file}: altered; its checksum is not the one in the corpus's manifest")
    return arrays
