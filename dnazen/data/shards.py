"""The corpus on disk: FASTA files cut into clean pieces and tokenized, as memory-mapped shards with a manifest.

A corpus is a folder with `manifest.json`, a copy of its tokenizer in `tokenizer/`, and shards `train-00000`,
`train-00001`, ..., `validation-00000`, ... of three .npy files each: `.tokens` (uint16, no special tokens), `.offsets`
(int64, one more than sequences) and `.pieces` (where each sequence comes from). Records are numbered over all files.
"""

import contextlib
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
from dnazen.data.fasta import FastaRecord, find_clean_runs, read_fasta, reverse_complement
from dnazen.data.tokenizer import load_tokenizer, tokenizer_checksum
from dnazen.files import InputError, atomic_directory, read_json, sha256_file, write_json

FORMAT = "dnazen-corpus"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")
# Provenance of a sequence: bases [start, start + length) of the record, from the other strand if `reverse`.
PIECE_DTYPE = np.dtype([("record", "<i4"), ("start", "<i8"), ("length", "<i4"), ("reverse", "i1")])
_PART_DTYPES = {"tokens": np.dtype("<u2"), "offsets": np.dtype("<i8"), "pieces": PIECE_DTYPE}
# DNABERT-2's protocol: a sequence of n bases becomes about n / 4 tokens.
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
        """Cut between the bases; on the reverse strand the first half lies further along the record."""
        middle = len(self.bases) // 2
        first, second = self.bases[:middle], self.bases[middle:]
        first_start = self.start + len(second) if self.reverse else self.start
        second_start = self.start if self.reverse else self.start + middle
        return self._replace(start=first_start, bases=first), self._replace(start=second_start, bases=second)


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

    Runs of A, C, G, T are cut into pieces of `4 * max_tokens` bases; those under `min_length` bases are dropped. A piece
    of more than `max_tokens` tokens is halved until none is, each half tokenized by itself. Forward pieces are numbered
    over all files, and number i is for validation iff `floor((i + 1) f + 0.5) > floor(i f + 0.5)`, its halves and reverse
    complement with it. The bytes written depend on neither `num_workers` (threads; default: every core) nor chance, and
    memory on one record, not on the corpus.

    Raises:
        InputError: a parameter is out of range, `output_dir` has something in it, a file is given twice or is not
            FASTA, the tokenizer does not spell a piece, or a split would be empty. Nothing is left behind.
    """
    piece_length = _BASES_PER_TOKEN * max_tokens
    _check_parameters(max_tokens, min_length, piece_length, validation_fraction, num_workers, shard_tokens)
    # len() counts added tokens, whose ids may lie beyond the model's.
    if len(tokenizer) > 2**16:
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens; expected at most {2**16}, to fit uint16")
    if num_workers is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_workers > 1 else "false"
        os.environ["RAYON_NUM_THREADS"] = str(num_workers)
    with _naming_directory(output_dir), atomic_directory(output_dir) as directory, contextlib.ExitStack() as stack:
        sources = _describe_sources(fasta_paths)
        totals: dict[str, Any] = {"files": len(sources), "records": 0, **dict.fromkeys(_COUNTS, 0), "pieces_split": 0}
        validation: list[list[int]] = []
        writers = {split: stack.enter_context(_SplitWriter(directory, split, shard_tokens)) for split in SPLITS}
        pieces = _cut_files(
            fasta_paths, sources, totals, validation, piece_length, min_length, validation_fraction, reverse_complement
        )
        spelled = _spelled_bases(tokenizer)
        with tqdm(desc="tokenizing", unit=" bases", unit_scale=True) as progress:
            while chunk := list(itertools.islice(pieces, _CHUNK_PIECES)):
                sequences = 0
                for piece, ids in _tokenize(chunk, tokenizer, max_tokens, spelled):
                    writers[piece.split].append(piece, ids)
                    sequences += 1
                totals["pieces_split"] += sequences - len(chunk)
                progress.update(sum(len(piece.bases) for piece in chunk))
        _check_splits(totals, validation, validation_fraction, min_length)
        shards = [shard for writer in writers.values() for shard in writer.finish()]
        for split, writer in writers.items():
            totals[split] = {"sequences": writer.sequences, "tokens": writer.tokens, "bases": writer.bases}
        tokenizer.save_pretrained(directory / "tokenizer")
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dnazen_version": __version__,
            "tokenizer": {"checksum": tokenizer_checksum(tokenizer), "vocab_size": len(tokenizer)},
            "parameters": {
                "max_tokens": max_tokens,
                "min_length": min_length,
                "piece_length": piece_length,
                "reverse_complement": reverse_complement,
                "validation_fraction": validation_fraction,
            },
            "totals": totals,
            "sources": sources,
            "shards": shards,
            "validation": validation,
        }
        write_json(directory / "manifest.json", manifest)
    return manifest


def summarize(manifest: dict[str, Any]) -> str:
    """What a person wants to know of a corpus, in lines of text."""
    totals, parameters = manifest["totals"], manifest["parameters"]
    train, validation = totals["train"], totals["validation"]
    tokens, bases = train["tokens"] + validation["tokens"], train["bases"] + validation["bases"]
    strands = "both strands" if parameters["reverse_complement"] else "one strand"
    return "\n".join(
        [
            f"files       {totals['files']:,} with {totals['records']:,} records, {totals['length']:,} bases",
            f"cut out     {totals['cut_bases']:,} bases other than A, C, G, T, in {totals['cut_runs']:,} runs",
            f"dropped     {totals['dropped_short']:,} pieces under {parameters['min_length']:,} bases, "
            f"{totals['dropped_bases']:,} bases in all",
            f"kept        {totals['pieces']:,} pieces of at most {parameters['piece_length']:,} bases, "
            f"{totals['bases']:,} bases in all, {strands}",
            f"halved      {totals['pieces_split']:,} times, for more than {parameters['max_tokens']:,} tokens in a piece",
            f"tokens      {tokens:,}, {bases / tokens:.2f} bases a token",
            f"train       {train['sequences']:,} sequences, {train['tokens']:,} tokens",
            f"validation  {validation['sequences']:,} sequences, {validation['tokens']:,} tokens, "
            f"of {len(manifest['validation']):,} held-out pieces",
        ]
    )


class TokenSplit:
    """The sequences of one split, memory-mapped: `split[i]` is a read-only uint16 view of sequence i's tokens.

    `lengths` is int64 `[n]` in tokens; `shards` lists (tokens, offsets) and `pieces` the `PIECE_DTYPE` array of each shard.
    """

    def __init__(self, shards: list[tuple[np.ndarray, np.ndarray]], pieces: list[np.ndarray]):
        self.shards = shards
        self.pieces = pieces
        self.lengths = np.concatenate([np.diff(offsets) for _, offsets in shards])
        self.num_tokens = int(self.lengths.sum())
        self._first = np.cumsum([0] + [len(offsets) - 1 for _, offsets in shards])

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

    def __init__(self, path: Path, manifest: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **splits: TokenSplit):
        self.path = path
        self.manifest = manifest
        self.checksum = sha256_file(path / "manifest.json")
        self.tokenizer = tokenizer
        self.train = splits["train"]
        self.validation = splits["validation"]

    @classmethod
    def open(cls, path: str | PathLike, verify: bool = True) -> "Corpus":
        """Memory-map a corpus, checking every file's type and shape and, with `verify`, its SHA-256.

        Raises:
            InputError: the folder is no corpus, is of another format version, or a file of it is missing, cut short
                or altered.
        """
        path = Path(path)
        manifest = read_json(path / "manifest.json", "the manifest of a corpus (made by `dnazen corpus`)")
        if manifest.get("format") != FORMAT:
            raise InputError(f"{path}: not a corpus; expected 'format': '{FORMAT}' in its manifest.json")
        if manifest.get("format_version") != FORMAT_VERSION:
            found = manifest.get("format_version")
            raise InputError(f"{path}: expected a corpus of format version {FORMAT_VERSION}, found {found}; build it anew")
        try:
            expected_tokenizer = manifest["tokenizer"]["checksum"]
            shards = [(s["split"], s["name"], s["sequences"], s["tokens"], s["files"]) for s in manifest["shards"]]
        except (KeyError, TypeError) as error:
            raise InputError(f"{path / 'manifest.json'}: altered; {error} is missing or of another type") from error
        tokenizer = load_tokenizer(path / "tokenizer")
        if tokenizer_checksum(tokenizer) != expected_tokenizer:
            raise InputError(f"{path / 'tokenizer'}: altered; it is not the tokenizer that the corpus was made with")
        parts: dict[str, list[dict[str, np.ndarray]]] = {split: [] for split in SPLITS}
        for split, name, sequences, tokens, checksums in shards:
            parts[split].append(_open_shard(path, name, sequences, tokens, checksums, verify))
        splits = {
            split: TokenSplit([(s["tokens"], s["offsets"]) for s in opened], [s["pieces"] for s in opened])
            for split, opened in parts.items()
        }
        return cls(path, manifest, tokenizer, **splits)


def _check_parameters(
    max_tokens: int,
    min_length: int,
    piece_length: int,
    validation_fraction: float,
    num_workers: int | None,
    shard_tokens: int,
) -> None:
    if max_tokens < 1:
        raise InputError(f"max_tokens: expected 1 or more, found {max_tokens}")
    if not 1 <= min_length <= piece_length:
        raise InputError(f"min_length: expected 1 to {piece_length} bases (4 * max_tokens), found {min_length}")
    if not 0 < validation_fraction < 1:
        raise InputError(f"validation_fraction: expected more than 0 and less than 1, found {validation_fraction}")
    if num_workers is not None and num_workers < 1:
        raise InputError(f"num_workers: expected 1 or more, found {num_workers}")
    if shard_tokens < 1:
        raise InputError(f"shard_tokens: expected 1 or more, found {shard_tokens}")


@contextlib.contextmanager
def _naming_directory(directory: str | PathLike) -> Iterator[None]:
    """Add the directory to errors of the system that name no file: a full disk, above all."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(directory)) from error


def _describe_sources(fasta_paths: Sequence[str | PathLike]) -> list[dict[str, Any]]:
    if not fasta_paths:
        raise InputError("no FASTA file given")
    sources: list[dict[str, Any]] = []
    seen: dict[str, Path] = {}
    for path in map(Path, fasta_paths):
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected FASTA")
        checksum = sha256_file(path)
        if checksum in seen:
            raise InputError(f"{path}: the same file as {seen[checksum]}; held-out sequences would be trained on")
        seen[checksum] = path
        sources.append({"path": path.name, "sha256": checksum, "bytes": path.stat().st_size, "records": []})
    return sources


def _cut_record(record: FastaRecord, piece_length: int, min_length: int) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """Cut a record into pieces `[start, end)`; with the counts of what was kept, dropped and cut out."""
    runs = find_clean_runs(record.sequence)
    spans = [
        (start, min(start + piece_length, run_end))
        for run_start, run_end in runs
        for start in range(run_start, run_end, piece_length)
    ]
    kept = [(start, end) for start, end in spans if end - start >= min_length]
    length = len(record.sequence)
    clean_bases = sum(end - start for start, end in runs)
    kept_bases = sum(end - start for start, end in kept)
    # Between two clean runs there is one other; the ends of the record may add one each.
    cut_runs = len(runs) - 1 + (runs[0][0] > 0) + (runs[-1][1] < length) if runs else 1
    counts = (length, len(kept), kept_bases, len(spans) - len(kept), clean_bases - kept_bases, cut_runs)
    return kept, {"name": record.name, **dict(zip(_COUNTS, (*counts, length - clean_bases)))}


def _cut_files(
    fasta_paths: Sequence[str | PathLike],
    sources: list[dict[str, Any]],
    totals: dict[str, Any],
    validation: list[list[int]],
    piece_length: int,
    min_length: int,
    validation_fraction: float,
    both_strands: bool,
) -> Iterator[_Piece]:
    """Yield every kept piece, and fill in what the manifest says of sources, totals and held-out pieces."""
    ordinals = itertools.count()
    for path, source in zip(fasta_paths, sources):
        for record in read_fasta(path):
            spans, entry = _cut_record(record, piece_length, min_length)
            number = totals["records"]
            totals["records"] += 1
            source["records"].append(entry)
            for count in _COUNTS:
                totals[count] += entry[count]
            for start, end in spans:
                ordinal = next(ordinals)
                rounded = (math.floor(i * validation_fraction + 0.5) for i in (ordinal, ordinal + 1))
                is_held_out = next(rounded) < next(rounded)
                if is_held_out:
                    validation.append([number, start, end])
                piece = _Piece(number, start, record.sequence[start:end], False, SPLITS[is_held_out])
                yield piece
                if both_strands:
                    yield piece._replace(bases=reverse_complement(piece.bases), reverse=True)


def _spelled_bases(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Bases that each token id spells; 0 for tokens of anything but A, C, G, T."""
    bases = np.zeros(2**16, dtype=np.int64)
    for token, token_id in tokenizer.get_vocab().items():
        if not token.strip("ACGT"):
            bases[token_id] = len(token)
    return bases


def _tokenize(
    pieces: Sequence[_Piece], tokenizer: PreTrainedTokenizerFast, max_tokens: int, spelled: np.ndarray
) -> Iterator[tuple[_Piece, np.ndarray]]:
    """Yield each piece, or the halves of one that is too long, with its token ids."""
    texts = [piece.bases for piece in pieces]
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for piece, encoding in zip(pieces, encodings):
        ids = np.array(encoding.ids, dtype=np.int64)
        bases = spelled[ids]
        if not bases.all() or bases.sum() != len(piece.bases):
            found = [token for token, count in zip(encoding.tokens, bases) if count == 0] or encoding.tokens[:5]
            raise InputError(
                f"the tokenizer does not spell {piece.bases[:20]}... (record {piece.record}, base {piece.start}) in "
                f"tokens of A, C, G, T; found {found[0] if found else 'no tokens'}"
            )
        if len(ids) <= max_tokens:
            yield piece, ids
        else:
            yield from _tokenize(piece.halve(), tokenizer, max_tokens, spelled)


def _check_splits(
    totals: dict[str, Any], validation: list[list[int]], validation_fraction: float, min_length: int
) -> None:
    pieces = totals["pieces"]
    if pieces == 0:
        raise InputError(
            f"no piece of at least {min_length} bases of A, C, G, T in {totals['records']} records of "
            f"{totals['length']} bases ({totals['cut_bases']} of them other codes); lower min_length or add sequence"
        )
    if pieces == 1:
        raise InputError("only 1 piece was kept, and training and validation need one each; add sequence or lower max_tokens")
    if not validation:
        needed = math.ceil(50000 / pieces) / 100000
        raise InputError(
            f"validation_fraction {validation_fraction} of {pieces} pieces is no piece; expected at least {needed}, "
            "or more sequence"
        )
    if len(validation) == pieces:
        raise InputError(f"validation_fraction {validation_fraction} of {pieces} pieces leaves none to train on; lower it")


class _NpyStream:
    """A one-dimensional .npy file written as it grows; the header gets its length at the end."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.path = path
        self._dtype = dtype
        self._items = 0
        self._file = path.open("wb")
        self._write_header()

    def append(self, array: np.ndarray) -> None:
        self._items += len(array)
        self._file.write(array.astype(self._dtype).tobytes())

    def finish(self) -> str:
        """Close the file and return its SHA-256."""
        self._file.seek(0)
        self._write_header()
        self._file.close()
        return sha256_file(self.path)

    def close(self) -> None:
        # After an error the file is thrown away, and flushing it could fail once more.
        with contextlib.suppress(OSError):
            self._file.close()

    def _write_header(self) -> None:
        # numpy pads this header so that it keeps its size when the first axis grows.
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._items,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class _SplitWriter:
    """Writes the sequences of one split into shards of at most `shard_tokens` tokens (one sequence at least)."""

    def __init__(self, directory: Path, split: str, shard_tokens: int):
        self.sequences = self.tokens = self.bases = 0
        self._directory = directory
        self._split = split
        self._shard_tokens = shard_tokens
        self._streams: dict[str, _NpyStream] = {}
        self._shards: list[dict[str, Any]] = []

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        for stream in self._streams.values():
            stream.close()

    def append(self, piece: _Piece, ids: np.ndarray) -> None:
        if self._streams and self._shards[-1]["tokens"] + len(ids) > self._shard_tokens:
            self._finish_shard()
        if not self._streams:
            self._start_shard()
        shard = self._shards[-1]
        shard["sequences"] += 1
        shard["tokens"] += len(ids)
        self._streams["tokens"].append(ids)
        self._streams["offsets"].append(np.array([shard["tokens"]]))
        row = (piece.record, piece.start, len(piece.bases), piece.reverse)
        self._streams["pieces"].append(np.array([row], dtype=PIECE_DTYPE))
        self.sequences += 1
        self.tokens += len(ids)
        self.bases += len(piece.bases)

    def finish(self) -> list[dict[str, Any]]:
        """Close the last shard and describe all of them."""
        if self._streams:
            self._finish_shard()
        return self._shards

    def _start_shard(self) -> None:
        name = f"{self._split}-{len(self._shards):05d}"
        self._shards.append({"split": self._split, "name": name, "sequences": 0, "tokens": 0, "files": {}})
        for part, dtype in _PART_DTYPES.items():
            self._streams[part] = _NpyStream(self._directory / f"{name}.{part}.npy", dtype)
        self._streams["offsets"].append(np.array([0]))

    def _finish_shard(self) -> None:
        for stream in self._streams.values():
            self._shards[-1]["files"][stream.path.name] = stream.finish()
        self._streams = {}


def _open_shard(
    directory: Path, name: str, sequences: int, tokens: int, checksums: dict[str, str], verify: bool
) -> dict[str, np.ndarray]:
    expected_items = {"tokens": tokens, "offsets": sequences + 1, "pieces": sequences}
    arrays = {}
    for part, items in expected_items.items():
        file = directory / f"{name}.{part}.npy"
        if not file.is_file():
            raise InputError(f"{file}: this shard of the corpus is missing")
        try:
            array = np.load(file, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise InputError(f"{file}: this shard of the corpus is cut short or altered: {error}") from error
        if array.shape != (items,) or array.dtype != _PART_DTYPES[part]:
            found = f"{array.dtype} {list(array.shape)}"
            raise InputError(f"{file}: altered; expected {_PART_DTYPES[part]} [{items}], found {found}")
        if verify and sha256_file(file) != checksums.get(file.name):
            raise InputError(f"{file}: altered; its checksum is not the one in the corpus's manifest")
        arrays[part] = array
    offsets = arrays["offsets"]
    if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 1).any():
        raise InputError(f"{directory / name}.offsets.npy: altered; offsets must rise from 0 to {tokens}")
    return arrays
