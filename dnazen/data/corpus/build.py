"""The corpus on disk: FASTA files cut into clean pieces and tokenized, as memory-mapped shards with a manifest.

A corpus is a folder with `manifest.json`, a copy of its tokenizer in `tokenizer/`, and shards `train-00000`, ...,
`validation-00000`, ... of three .npy files each: `.tokens` (uint16, no special tokens), `.offsets` (int64, one more
than sequences) and `.pieces` (`PIECE_DTYPE`: where each sequence comes from). Records are numbered over all files.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dnazen import __version__
from dnazen.data.corpus.leakage import ANCHOR_BASES, find_leaks, load_targets
from dnazen.data.fasta import STDIN, FastaReader, describe_sources
from dnazen.data.tokenizer import load_tokenizer, save_tokenizer, spell_tokens, tokenizer_checksum
from dnazen.defaults import MAX_TOKENS, MIN_LENGTH, VALIDATION_FRACTION
from dnazen.files import InputError, Interrupted, atomic_directory, read_json, sha256_file, write_json
from dnazen.processes import map_in_order

FORMAT = "dnazen-corpus"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")
# Bases [start, start + length) of the record; their reverse complement if `reverse`.
PIECE_DTYPE = np.dtype([("record", "<i4"), ("start", "<i8"), ("length", "<i4"), ("reverse", "i1")])
_DTYPES = {"tokens": np.dtype("<u2"), "offsets": np.dtype("<i8"), "pieces": PIECE_DTYPE}
# DNABERT-2's protocol counts on n / 4 tokens in a sequence of n bases.
_BASES_PER_TOKEN = 4
_CHUNK_PIECES = 1024
_COUNTS = (
    *("length", "pieces", "bases", "dropped_short", "dropped_bases", "cut_runs", "cut_bases"),
    *("duplicates", "duplicate_bases"),
)
_RUNS = re.compile(rb"[ACGT]+|[^ACGT]+")
_COMPLEMENT = bytes.maketrans(b"ACGT", b"TGCA")
_DIGEST_BYTES = 16
_STATE = ".state"
# A process for less would take longer to start than it saves.
_BYTES_PER_WORKER = 1 << 20


def build_corpus(
    fasta_paths: Sequence[str | PathLike],
    tokenizer: PreTrainedTokenizerFast,
    output_dir: str | PathLike,
    *,
    max_tokens: int = MAX_TOKENS,
    min_length: int = MIN_LENGTH,
    reverse_complement: bool = False,
    dedup: bool = False,
    validation_fraction: float = VALIDATION_FRACTION,
    validation_records: Sequence[str] | None = None,
    check_against: Sequence[str | PathLike] = (),
    num_workers: int | None = None,
    shard_tokens: int = 2**27,
) -> dict[str, Any]:
    """Clean and tokenize FASTA files (or "-", standard input) into a corpus folder; return its manifest.

    Runs of A, C, G, T are cut into pieces of `4 * max_tokens` bases; those under `min_length` bases are dropped. A
    piece of more than `max_tokens` tokens is halved until none is, each half tokenized by itself. A piece equal to an
    earlier one, or to its reverse complement, is counted, and dropped with `dedup`. Pieces are numbered over all
    files, and number i is held out for validation iff `floor((i + 1) f + 0.5) > floor(i f + 0.5)`, its halves and
    reverse complement with it; with `validation_records`, those of the records so named are, and no others.
    `check_against` are CSV files whose sequences are looked for in the corpus; see `dnazen.data.corpus.leakage`.

    The bytes written do not depend on `num_workers` (processes; default: every core, as far as there is work for
    it). Memory: some MB per worker, 16 bytes a piece (0.3 GB for 35 Gb; twice that for moments), and the manifest,
    about 1 kB a record; neither records nor shards are held. A run that was killed, or stopped by a file or disk at
    fault, is taken up behind the last file it finished, if it is started again on the same machine with the same
    arguments and, up to there, the same files; standard input starts anew.

    Raises:
        InputError: a parameter is out of range, `output_dir` has something in it, a file is given twice or is not
            FASTA, the tokenizer does not spell a piece, a split would be empty, no record has a name of
            `validation_records`, or a file of `check_against` is no CSV with sequences. Nothing is left behind, but for
            what can be taken up.
    """
    size = _BASES_PER_TOKEN * max_tokens
    for name, value, is_valid, expected in (
        ("max_tokens", max_tokens, max_tokens >= 1, "1 or more"),
        ("min_length", min_length, 1 <= min_length <= size, f"1 to {size} bases ({_BASES_PER_TOKEN} * max_tokens)"),
        ("validation_fraction", validation_fraction, 0 < validation_fraction < 1, "more than 0 and less than 1"),
        ("num_workers", num_workers, num_workers is None or num_workers >= 1, "1 or more"),
        ("tokenizer", len(tokenizer), len(tokenizer) <= 2**16, f"at most {2**16} tokens, to fit uint16"),
        ("fasta_paths", len(fasta_paths), len(fasta_paths) >= 1, "1 file or more"),
    ):
        if not is_valid:
            raise InputError(f"{name}: expected {expected}, found {value}")
    if num_workers == 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    targets = [load_targets(path) for path in check_against]
    sources = _describe_inputs(fasta_paths)
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
            "dedup": dedup,
            "validation_fraction": None if validation_records else validation_fraction,
            "validation_records": sorted(validation_records) if validation_records else None,
        },
        "totals": {"records": 0, **dict.fromkeys(_COUNTS, 0), "pieces_split": 0},
        "sources": [{**source, "records": []} for source in sources],
        "shards": [],
        "validation": [],
        "leakage": [],
    }
    task = json.dumps([manifest | {"sources": None}, shard_tokens])
    sizes = [source["bytes"] for source in sources]
    num_workers = num_workers or os.cpu_count() or 1
    if None not in sizes:
        num_workers = min(num_workers, 1 + sum(sizes) // _BYTES_PER_WORKER)
    is_resumable = functools.partial(_is_of, task=task, sources=sources)
    with atomic_directory(output_dir, is_resumable) as directory:
        builder = _Builder(directory, manifest, shard_tokens, task)
        with contextlib.closing(builder):
            builder.run(fasta_paths, tokenizer, num_workers)
        if targets:
            shards = [(shard["split"], _open_shard(directory, shard, verify=False)) for shard in manifest["shards"]]
            manifest["leakage"] = find_leaks(targets, shards, spell_tokens(tokenizer), num_workers)
        save_tokenizer(tokenizer, directory / "tokenizer")
        write_json(directory / "manifest.json", manifest)
        builder.remove_state()
    return manifest


def summarize(manifest: dict[str, Any]) -> str:
    """What a person wants to know of a corpus, in lines of text."""
    totals, parameters = manifest["totals"], manifest["parameters"]
    train, validation = totals["train"], totals["validation"]
    tokens, bases = train["tokens"] + validation["tokens"], train["bases"] + validation["bases"]
    strands = "both strands" if parameters["reverse_complement"] else "one strand"
    duplicates = "dropped" if parameters["dedup"] else "kept (--dedup drops them)"
    leaks = [
        f"\nleakage     {target['path']}: of {target['sequences']:,} sequences {target['in_train']:,} occur in train, "
        f"{target['in_validation']:,} in validation; {target['skipped_short']:,} under {ANCHOR_BASES} bases and "
        f"{target['skipped_ambiguous']:,} with other letters than A, C, G, T were not looked for"
        for target in manifest["leakage"]
    ]
    return f"""\
files       {len(manifest["sources"])}, with {totals["records"]:,} records, {totals["length"]:,} bases
cut out     {totals["cut_bases"]:,} bases other than A, C, G, T, in {totals["cut_runs"]:,} runs
dropped     {totals["dropped_bases"]:,} bases, in {totals["dropped_short"]:,} pieces under {parameters["min_length"]}
duplicates  {totals["duplicate_bases"]:,} bases, in {totals["duplicates"]:,} pieces; {duplicates}
kept        {totals["bases"]:,} bases, in {totals["pieces"]:,} pieces of at most {parameters["piece_length"]}; {strands}
halved      {totals["pieces_split"]:,} times, a piece of more than {parameters["max_tokens"]} tokens
tokens      {tokens:,}, {bases / tokens:.2f} bases a token
train       {train["sequences"]:,} sequences, {train["tokens"]:,} tokens
validation  {validation["sequences"]:,} sequences, {validation["tokens"]:,} tokens{"".join(leaks)}"""


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


class _Batch(NamedTuple):
    """Pieces of one file, in order, on their way to a worker."""

    source: int
    first_record: int  # number of the file's first record
    position: int  # bytes of the file read so far
    pieces: list[tuple[int, int, bytes]]  # record, start, bases
    is_last: bool


class _Tokenized(NamedTuple):
    """What a worker makes of n pieces: m sequences, both strands of a piece and its halves one after the other."""

    tokens: np.ndarray  # uint16, of all sequences
    lengths: np.ndarray  # int64 [m], in tokens
    rows: np.ndarray  # PIECE_DTYPE [m]
    pieces: np.ndarray  # int64 [m], which piece each sequence is of
    digests: np.ndarray  # S16 [n], the same for a piece and its reverse complement


class _PieceTokenizer:
    """What the workers do."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, parameters: dict[str, Any]):
        self._encode = tokenizer.backend_tokenizer.encode_batch_fast
        self._spelling = spell_tokens(tokenizer)
        self._max_tokens = parameters["max_tokens"]
        self._both_strands = parameters["reverse_complement"]

    def __call__(self, batch: _Batch) -> _Tokenized:
        strands, digests = [], []
        for number, (record, start, bases) in enumerate(batch.pieces):
            other = bases.translate(_COMPLEMENT)[::-1]
            digests.append(hashlib.blake2b(min(bases, other), digest_size=_DIGEST_BYTES).digest())
            strands.append((number, record, start, False, bases.decode()))
            if self._both_strands:
                strands.append((number, record, start, True, other.decode()))
        all_ids, lengths, rows, pieces = [], [], [], []
        for (number, record, start, reverse, bases), ids in self._tokenize(strands):
            all_ids += ids
            lengths.append(len(ids))
            rows.append((record, start, len(bases), reverse))
            pieces.append(number)
        return _Tokenized(
            np.array(all_ids, _DTYPES["tokens"]),
            np.array(lengths, np.int64),
            np.array(rows, PIECE_DTYPE),
            np.array(pieces, np.int64),
            np.array(digests, f"S{_DIGEST_BYTES}"),
        )

    def _tokenize(self, strands: list[tuple]) -> Iterator[tuple[tuple, list[int]]]:
        """Yield each strand of a piece, or the halves of one that is too long, with its token ids."""
        encodings = self._encode([strand[-1] for strand in strands], add_special_tokens=False)
        for strand, encoding in zip(strands, encodings):
            number, record, start, reverse, bases = strand
            ids = encoding.ids
            tokens = list(map(self._spelling.__getitem__, ids))
            if "".join(tokens) != bases:
                raise InputError(
                    f"the tokenizer does not spell every run of A, C, G, T: {bases[:20]}... (record {record}, base "
                    f"{start}) became {' '.join(tokens[:5]) or 'nothing'}..."
                )
            if len(ids) <= self._max_tokens:
                yield strand, ids
                continue
            # On the reverse strand the first half lies further along the record.
            first, second = bases[: len(bases) // 2], bases[len(bases) // 2 :]
            starts = (start + len(second), start) if reverse else (start, start + len(first))
            halves = [(number, record, at, reverse, half) for at, half in zip(starts, (first, second))]
            yield from self._tokenize(halves)


class _SeenPieces:
    """The digests of all pieces so far, in sorted arrays, each at least twice as long as the next: 16 bytes a piece."""

    def __init__(self, digests: np.ndarray):
        self._runs = [np.sort(digests)] if len(digests) else []

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add digests; return which of them were there before, or come earlier among them."""
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


class _Builder:
    """Fills a temporary folder with shards, and the manifest with what it says of them.

    In `.state/` lies what a later run needs to go on: what is built (`task`); the digests of the pieces; and a
    journal with a line for every file that is finished, written when all that it speaks of is on disk.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], shard_tokens: int, task: str):
        self._directory = directory
        self._manifest = manifest
        self._shard_tokens = shard_tokens
        self._state = directory / _STATE
        self._state.mkdir(exist_ok=True)
        (self._state / "task").write_text(task)
        self._files_done = 0
        self._closed: list[dict[str, Any]] = []  # shards since the last line of the journal
        self._held_out: list[list[int]] = []  # pieces since then
        unfinished = {split: {"number": 0, "sequences": 0, "tokens": 0, "bases": 0} for split in SPLITS}
        size = num_digests = 0
        for line in _read_journal(self._state):
            entry = json.loads(line)
            manifest["sources"][self._files_done] = entry["source"]
            manifest["totals"], unfinished, num_digests = entry["totals"], entry["unfinished"], entry["digests"]
            manifest["shards"] += entry["shards"]
            manifest["validation"] += entry["validation"]
            self._files_done += 1
            size += len(line)
        self._journal = _open_at(self._state / "journal", size)
        self._digests = _open_at(self._state / "digests", num_digests * _DIGEST_BYTES)
        digests = np.fromfile(self._state / "digests", f"S{_DIGEST_BYTES}")
        self._seen = _SeenPieces(digests)
        self._shards = {split: _Shard(directory, split, **counts) for split, counts in unfinished.items()}

    def run(self, fasta_paths: Sequence[str | PathLike], tokenizer: PreTrainedTokenizerFast, num_workers: int) -> None:
        """Write all sequences of the files that are not done yet."""
        totals, sources = self._manifest["totals"], self._manifest["sources"]
        if self._files_done:
            print(f"going on     behind {self._files_done:,} of {len(sources):,} files, done by a run that was stopped")
        sizes = [source["bytes"] for source in sources]
        ends = [0, *itertools.accumulate(sizes)] if None not in sizes else None
        batches = self._cut_files(fasta_paths)
        function = _PieceTokenizer(tokenizer, self._manifest["parameters"])
        with tqdm(desc="tokenizing", disable=None, unit=" bases", unit_scale=True, initial=totals["bases"]) as progress:
            for batch, tokenized in map_in_order(function, batches, num_workers):
                self._take(batch, tokenized)
                progress.update(sum(len(bases) for _, _, bases in batch.pieces))
                if ends:
                    progress.total = round(progress.n * ends[-1] / (ends[batch.source] + batch.position))
                if batch.is_last:
                    self._finish_file(batch.source)
        self._check_splits()
        self._manifest["shards"] += [shard.finish() for shard in self._shards.values()]
        self._manifest["shards"].sort(key=lambda shard: shard["name"])
        for split in SPLITS:
            described = [shard for shard in self._manifest["shards"] if shard["split"] == split]
            self._manifest["totals"][split] = {
                key: sum(shard[key] for shard in described) for key in ("sequences", "tokens", "bases")
            }

    def close(self) -> None:
        """Close the files, whatever is in them."""
        for file in (self._journal, self._digests, *(file for s in self._shards.values() for file in s.files.values())):
            file.close()

    def remove_state(self) -> None:
        """Leave nothing but the corpus."""
        shutil.rmtree(self._state)

    def _cut_files(self, fasta_paths: Sequence[str | PathLike]) -> Iterator[_Batch]:
        """Yield the pieces of all files; fill in what the manifest says of their records."""
        first_record = self._manifest["totals"]["records"]
        for number in range(self._files_done, len(fasta_paths)):
            source, reader = self._manifest["sources"][number], FastaReader(fasta_paths[number])
            pieces = _cut_file(reader, first_record, source["records"], self._manifest["parameters"])
            while True:
                try:
                    chunk = list(itertools.islice(pieces, _CHUNK_PIECES))
                except InputError as error:  # the files before can be kept
                    raise Interrupted(str(error)) from error
                is_last = len(chunk) < _CHUNK_PIECES
                if is_last and source["bytes"] is None:
                    source.update(sha256=reader.text_sha256(), bytes=reader.text_bytes)
                yield _Batch(number, first_record, reader.position, chunk, is_last)
                if is_last:
                    break
            first_record += len(source["records"])

    def _take(self, batch: _Batch, tokenized: _Tokenized) -> None:
        """Number the pieces, choose those to hold out, and write them."""
        totals, parameters = self._manifest["totals"], self._manifest["parameters"]
        records = self._manifest["sources"][batch.source]["records"]
        entries = [records[record - batch.first_record] for record, _, _ in batch.pieces]
        seen = self._seen.add(tokenized.digests)
        self._digests.write(tokenized.digests.tobytes())
        for i in np.flatnonzero(seen):
            size = len(batch.pieces[i][2])
            for count, value in (("duplicates", 1), ("duplicate_bases", size)):
                entries[i][count] += value
            if parameters["dedup"]:
                entries[i]["pieces"] -= 1
                entries[i]["bases"] -= size
        kept = ~seen if parameters["dedup"] else np.ones(len(seen), bool)
        if parameters["validation_records"]:
            held_out = kept & np.array([entry["name"] in parameters["validation_records"] for entry in entries], bool)
        else:
            ordinals = totals["pieces"] + np.cumsum(kept) - 1
            bounds = [np.floor((ordinals + i) * parameters["validation_fraction"] + 0.5) for i in (0, 1)]
            held_out = kept & (bounds[1] > bounds[0])
        totals["pieces"] += int(kept.sum())
        for i in np.flatnonzero(held_out):
            record, start, bases = batch.pieces[i]
            self._held_out.append([record, start, start + len(bases)])
        strands = 1 + parameters["reverse_complement"]
        totals["pieces_split"] += int(kept[tokenized.pieces].sum()) - strands * int(kept.sum())
        for split, chosen in (("train", kept & ~held_out), ("validation", held_out)):
            self._write(split, tokenized, chosen[tokenized.pieces])

    def _write(self, split: str, tokenized: _Tokenized, chosen: np.ndarray) -> None:
        tokens = tokenized.tokens[np.repeat(chosen, tokenized.lengths)]
        lengths, rows = tokenized.lengths[chosen], tokenized.rows[chosen]
        ends = np.cumsum(lengths)
        done = first = 0
        while first < len(rows):
            shard = self._shards[split]
            room = self._shard_tokens - shard.counts["tokens"]
            end = int(np.searchsorted(ends, done + room, side="right"))
            if end <= first and not shard.counts["sequences"]:
                end = first + 1  # a sequence larger than a shard has one of its own
            if end > first:
                shard.append(tokens[done : ends[end - 1]], lengths[first:end], rows[first:end])
                first, done = end, int(ends[end - 1])
            if first < len(rows):
                self._closed.append(shard.finish())
                self._shards[split] = _Shard(self._directory, split, shard.counts["number"] + 1)

    def _finish_file(self, number: int) -> None:
        """Add a file to the journal, and to the manifest's totals."""
        totals, source = self._manifest["totals"], self._manifest["sources"][number]
        totals["records"] += len(source["records"])
        for count in set(_COUNTS) - {"pieces"}:
            totals[count] += sum(entry[count] for entry in source["records"])
        for shard in self._shards.values():
            shard.sync()
        os.fsync(self._digests.fileno())
        entry = {
            "source": source,
            "totals": totals,
            "validation": self._held_out,
            "shards": self._closed,
            "unfinished": {split: shard.counts for split, shard in self._shards.items()},
            "digests": self._digests.tell() // _DIGEST_BYTES,
        }
        _write_all(self._journal, json.dumps(entry).encode() + b"\n")
        os.fsync(self._journal.fileno())
        self._manifest["validation"] += self._held_out
        self._manifest["shards"] += self._closed
        self._held_out, self._closed = [], []

    def _check_splits(self) -> None:
        parameters, sources = self._manifest["parameters"], self._manifest["sources"]
        if parameters["validation_records"]:
            names = {record["name"] for source in sources for record in source["records"]}
            if absent := set(parameters["validation_records"]) - names:
                raise InputError(
                    f"validation_records: expected names of records, found {', '.join(sorted(absent))}, which no file "
                    f"has; the first of {len(names):,} names are {', '.join(sorted(names)[:5])}"
                )
        held_out = len(self._manifest["validation"])
        training = self._manifest["totals"]["pieces"] - held_out
        if not held_out or not training:
            option = "validation_records" if parameters["validation_records"] else "validation_fraction"
            raise InputError(
                f"{option} {parameters[option]} and min_length {parameters['min_length']} left {training} pieces to "
                f"train on and {held_out} to validate on; expected 1 or more of each: change "
                f"--{option.replace('_', '-')} or --min-length of `dnazen corpus`, or add sequence"
            )


def _describe_inputs(paths: Sequence[str | PathLike]) -> list[dict[str, Any]]:
    """`describe_sources`, where checksum and size of standard input are None until it has been read."""
    files = [path for path in paths if str(path) != STDIN]
    if len(paths) - len(files) > 1:
        raise InputError(f"{STDIN} (standard input): given twice")
    sources = iter(describe_sources(files))
    return [{"path": STDIN, "sha256": None, "bytes": None} if str(p) == STDIN else next(sources) for p in paths]


def _is_of(leftover: Path, task: str, sources: list[dict[str, Any]]) -> bool:
    """Whether what a stopped run left is the same corpus as far as it goes, with at least one file done."""
    file = leftover / _STATE / "task"
    if not file.is_file() or file.read_text() != task or any(source["bytes"] is None for source in sources):
        return False  # standard input cannot be read again
    done = [json.loads(line)["source"] | {"records": None} for line in _read_journal(leftover / _STATE)]
    return done != [] and done == [source | {"records": None} for source in sources[: len(done)]]


def _read_journal(state: Path) -> Iterator[bytes]:
    """Yield the lines of a journal, of which the last may have been cut short: then all others."""
    with contextlib.suppress(FileNotFoundError), (state / "journal").open("rb") as file:
        yield from itertools.takewhile(lambda line: line.endswith(b"\n"), file)


def _cut_file(
    reader: FastaReader, first_record: int, entries: list[dict[str, Any]], parameters: dict[str, Any]
) -> Iterator[tuple[int, int, bytes]]:
    """Cut a file's records into pieces (record, start, bases); append an entry for each record to `entries`."""
    size, min_length = parameters["piece_length"], parameters["min_length"]
    record, carry, in_cut = first_record - 1, b"", False
    entry: dict[str, Any] = {}

    def keeps(length: int) -> bool:
        names = ("pieces", "bases") if length >= min_length else ("dropped_short", "dropped_bases")
        for name, value in zip(names, (1, length)):
            entry[name] += value
        return length >= min_length

    end_of_block = 0
    for block in reader:
        if block.start == 0:
            if carry and keeps(len(carry)):
                yield record, end_of_block - len(carry), carry
            record, carry, in_cut = record + 1, b"", False
            entry = {"name": block.name, **dict.fromkeys(_COUNTS, 0)}
            entries.append(entry)
        entry["length"] += len(block.sequence)
        # `carry` is the last piece so far, which may go on here.
        data, first = carry + block.sequence, block.start - len(carry)
        carry, end_of_block = b"", first + len(data)
        for match in _RUNS.finditer(data):
            start, end = match.span()
            if data[start] not in b"ACGT":
                entry["cut_runs"] += not in_cut
                entry["cut_bases"] += end - start
                in_cut = True
                continue
            in_cut = False
            for at in range(start, end, size):
                bases = data[at : min(at + size, end)]
                if end == len(data) and len(bases) < size:
                    carry = bases
                elif keeps(len(bases)):
                    yield record, first + at, bases
    if carry and keeps(len(carry)):
        yield record, end_of_block - len(carry), carry


class _Shard:
    """Sequences of one split as they are written; `counts` says how many there are.

    With counts, a shard that a killed run left is opened, and what lies behind them is cut off.
    """

    def __init__(self, directory: Path, split: str, number: int, sequences: int = 0, tokens: int = 0, bases: int = 0):
        self.split = split
        self.counts = {"number": number, "sequences": sequences, "tokens": tokens, "bases": bases}
        self.name = f"{split}-{number:05d}"
        self.paths = {part: directory / f"{self.name}.{part}.npy" for part in _DTYPES}
        self.files = {}
        for part, items in self._items().items():
            header = npy_header(_DTYPES[part], (items,))
            if sequences:
                self.files[part] = _open_at(self.paths[part], len(header) + items * _DTYPES[part].itemsize)
            else:
                self.files[part] = _open_at(self.paths[part], 0)
                _write_all(self.files[part], header + bytes(items * _DTYPES[part].itemsize))

    def append(self, tokens: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> None:
        offsets = self.counts["tokens"] + np.cumsum(lengths)
        for part, values in (("tokens", tokens), ("offsets", offsets), ("pieces", rows)):
            _write_all(self.files[part], values.astype(_DTYPES[part], copy=False).tobytes())
        for count, value in (("sequences", len(rows)), ("tokens", len(tokens)), ("bases", int(rows["length"].sum()))):
            self.counts[count] += value

    def sync(self) -> None:
        """Wait until all is on disk."""
        for file in self.files.values():
            os.fsync(file.fileno())

    def finish(self) -> dict[str, Any]:
        """Write the final headers; return what the manifest says of the shard."""
        for part, items in self._items().items():
            self.files[part].seek(0)
            _write_all(self.files[part], npy_header(_DTYPES[part], (items,)))
        self.sync()
        for file in self.files.values():
            file.close()
        files = {path.name: sha256_file(path) for path in self.paths.values()}
        counts = {name: self.counts[name] for name in ("sequences", "tokens", "bases")}
        return {"split": self.split, "name": self.name, **counts, "files": files}

    def _items(self) -> dict[str, int]:
        sequences = self.counts["sequences"]
        return {"tokens": self.counts["tokens"], "offsets": sequences + 1, "pieces": sequences}


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The head of a .npy file; numpy pads it to one length, whatever the size of the first axis."""
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def _open_at(path: Path, size: int) -> io.FileIO:
    """Open a file for writing behind its first `size` bytes; what lies there is cut off.

    Unbuffered, so that a full disk is an error where something is written, and nowhere else.
    """
    path.touch()
    file = path.open("r+b", buffering=0)
    file.truncate(size)
    file.seek(size)
    return file


def _write_all(file: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


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
