"""The corpus on disk: FASTA files cut into clean pieces and tokenized, as memory-mapped shards with a manifest.

A corpus is a folder with `manifest.json`, a copy of its tokenizer in `tokenizer/`, and shards `train-00000`, ...,
`validation-00000`, ... (see `shard.py`). Records are numbered over all files.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dnazen import __version__
from dnazen.data.corpus.journal import FinishedFile, Journal, is_of
from dnazen.data.corpus.leakage import ANCHOR_BASES, find_leaks, load_targets
from dnazen.data.corpus.pieces import (
    BASES_PER_TOKEN,
    STRETCH_PIECES,
    Counts,
    Piece,
    PieceTokenizer,
    Record,
    Tokenized,
    cut_pieces,
)
from dnazen.data.corpus.reader import FORMAT, FORMAT_VERSION, SPLITS
from dnazen.data.corpus.shard import SplitWriter, new_shard, open_shard
from dnazen.data.fasta import STDIN, FastaReader, describe_sources
from dnazen.data.tokenizer import save_tokenizer, tokenizer_checksum, tokens_by_id
from dnazen.defaults import MAX_TOKENS, MIN_LENGTH, VALIDATION_FRACTION
from dnazen.files import InputError, Interrupted, atomic_directory, write_json
from dnazen.processes import map_in_order

logger = logging.getLogger(__name__)

AUTO = "auto"  # in place of a length of pieces: as many bases as fill a sequence's tokens
# of a worker's job
_CHUNK_PIECES, _CHUNK_BASES = 1 << 10, 1 << 21
# A process for less would take longer to start than it saves.
_BYTES_PER_WORKER = 1 << 20


@dataclass
class Parameters:
    """What a corpus is made by; see `build_corpus`."""

    max_tokens: int
    min_length: int
    piece_length: int | str
    reverse_complement: bool
    dedup: bool
    validation_fraction: float | None  # None: `validation_records` are held out
    validation_records: list[str] | None


def build_corpus(
    fasta_paths: Sequence[str | PathLike],
    tokenizer: PreTrainedTokenizerFast,
    output_dir: str | PathLike,
    *,
    max_tokens: int = MAX_TOKENS,
    min_length: int = MIN_LENGTH,
    piece_length: int | str | None = None,
    reverse_complement: bool = False,
    dedup: bool = False,
    validation_fraction: float = VALIDATION_FRACTION,
    validation_records: Sequence[str] | None = None,
    check_against: Sequence[str | PathLike] = (),
    num_workers: int | None = None,
    shard_tokens: int = 2**27,
) -> dict[str, Any]:
    """Clean and tokenize FASTA files (or "-", standard input) into a corpus folder; return its manifest.

    Runs of A, C, G, T are cut into pieces of `piece_length` bases (default: `4 * max_tokens`); those under `min_length`
    bases are dropped. A piece of more than `max_tokens` tokens is halved until none is, each half tokenized by itself.
    With a `piece_length` of "auto" a piece has as many bases as `max_tokens` tokens spell, or somewhat fewer, if those
    of its reverse complement are wanted and would be more. A piece equal to an earlier one, or to its reverse
    complement, is counted, and dropped with `dedup`. Pieces are numbered over all files, and number i is held out for
    validation iff `floor((i + 1) f + 0.5) > floor(i f + 0.5)`, its halves and reverse complement with it; with
    `validation_records`, those of the records so named are, and no others.
    `check_against` are CSV files whose sequences are looked for in the corpus; see `dnazen.data.corpus.leakage`.

    The bytes written do not depend on `num_workers` (processes; default: every core, as far as there is work for
    it). Memory: some MB per worker, 16 bytes a piece (0.3 GB for 35 Gb; twice that for moments), and the manifest,
    about 1 kB a record; neither records nor shards are held. A run that was killed, or stopped by a file or disk at
    fault, goes on behind the last file it finished, if it is started again on the same machine with the same
    arguments and, up to there, the same files; standard input starts anew.

    Raises:
        InputError: a parameter is out of range, `output_dir` has something in it, a file is given twice or is not
            FASTA, the tokenizer does not spell a piece or, for "auto", is not one of plain BPE, a split would be empty,
            no record has a name of `validation_records`, or a file of `check_against` is no CSV with sequences. Nothing
            is left behind, but for what can be taken up.
    """
    if piece_length is None:
        piece_length = BASES_PER_TOKEN * max_tokens
    is_auto, stretch = piece_length == AUTO, STRETCH_PIECES * BASES_PER_TOKEN * max_tokens
    # a token has at least one base, so that either half of a piece can be kept
    longest = max(1, max_tokens // 2) if is_auto else piece_length
    of_what = "half of max_tokens" if is_auto else "piece_length"
    for name, value, is_valid, expected in (
        ("max_tokens", max_tokens, max_tokens >= 1, "1 or more"),
        ("piece_length", piece_length, is_auto or 1 <= piece_length <= stretch, f"{AUTO}, or 1 to {stretch} bases"),
        ("min_length", min_length, 1 <= min_length <= longest, f"1 to {longest} bases ({of_what})"),
        ("validation_fraction", validation_fraction, 0 < validation_fraction < 1, "more than 0 and less than 1"),
        ("num_workers", num_workers, num_workers is None or num_workers >= 1, "1 or more"),
        ("tokenizer", len(tokenizer), len(tokenizer) <= 2**16, f"at most {2**16} tokens, to fit uint16"),
        ("fasta_paths", len(fasta_paths), len(fasta_paths) >= 1, "1 file or more"),
    ):
        if not is_valid:
            raise InputError(f"{name}: expected {expected}, found {value}")
    targets = [load_targets(path) for path in check_against]
    sources = _describe_inputs(fasta_paths)
    parameters = Parameters(
        max_tokens=max_tokens,
        min_length=min_length,
        piece_length=piece_length,
        reverse_complement=reverse_complement,
        dedup=dedup,
        validation_fraction=None if validation_records else validation_fraction,
        validation_records=sorted(validation_records) if validation_records else None,
    )
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dnazen_version": __version__,
        "tokenizer": {"checksum": tokenizer_checksum(tokenizer), "vocab_size": len(tokenizer)},
        "parameters": vars(parameters),
        "totals": _sum_up(0, Counts(), 0),
        "sources": None,
        "shards": [],
        "validation": [],
        "leakage": [],
    }
    task = json.dumps([manifest, shard_tokens])
    sizes = [source["bytes"] for source in sources]
    num_workers = num_workers or os.cpu_count() or 1
    if None not in sizes:
        num_workers = min(num_workers, 1 + sum(sizes) // _BYTES_PER_WORKER)
    is_resumable = functools.partial(is_of, task=task, sources=sources)
    with atomic_directory(output_dir, is_resumable) as directory:
        with contextlib.closing(Journal(directory, task)) as journal:
            if journal.files:
                logger.warning(
                    "going on behind %s of %s files, done by a run that was stopped",
                    f"{len(journal.files):,}", f"{len(sources):,}",
                )  # fmt: skip
            tokenize = PieceTokenizer(tokenizer, max_tokens, reverse_complement, min_length if is_auto else None)
            with contextlib.closing(_Builder(directory, journal, parameters, shard_tokens)) as builder:
                size = stretch if is_auto else piece_length
                files = _Files(fasta_paths, sources, journal, size, min_length)
                _tokenize_files(files, tokenize, builder, num_workers)
                manifest |= builder.finish()
        if targets:
            shards = [(shard["split"], open_shard(directory, shard, verify=False)) for shard in manifest["shards"]]
            manifest["leakage"] = find_leaks(targets, shards, tokens_by_id(tokenizer), num_workers)
        save_tokenizer(tokenizer, directory / "tokenizer")
        write_json(directory / "manifest.json", manifest)
        journal.remove()
    return manifest


def summarize(manifest: dict[str, Any]) -> str:
    """What a person wants to know of a corpus, in lines of text."""
    totals, parameters = manifest["totals"], manifest["parameters"]
    train, validation = totals["train"], totals["validation"]
    tokens, bases = train["tokens"] + validation["tokens"], train["bases"] + validation["bases"]
    mean, max_tokens = tokens / (train["sequences"] + validation["sequences"]), parameters["max_tokens"]
    is_auto = parameters["piece_length"] == AUTO
    length = f"up to {max_tokens} tokens" if is_auto else f"at most {parameters['piece_length']}"
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
kept        {totals["bases"]:,} bases, in {totals["pieces"]:,} pieces of {length}; {strands}
halved      {totals["pieces_split"]:,} times, a piece of more than {max_tokens} tokens
tokens      {tokens:,}, {bases / tokens:.2f} bases a token
filled      tokens a sequence: {mean:.1f}, {mean / max_tokens:.1%} of {max_tokens} at most
train       {train["sequences"]:,} sequences, {train["tokens"]:,} tokens
validation  {validation["sequences"]:,} sequences, {validation["tokens"]:,} tokens{"".join(leaks)}"""


class _Batch(NamedTuple):
    """Pieces (or stretches) of one file, in order, on their way to a worker."""

    file: int
    first_record: int  # number of the file's first record
    position: int  # bytes of the file read so far
    pieces: list[Piece]
    is_last: bool


class _Files:
    """Cuts the files that are not finished yet into batches of pieces, in order.

    `records[i]` says what became of the records of file i, as far as it is cut, until it is finished.
    """

    def __init__(
        self,
        paths: Sequence[str | PathLike],
        sources: list[dict[str, Any]],
        journal: Journal,
        size: int,
        min_length: int,
    ):
        self.paths, self.sources = paths, sources
        self._size, self._min_length = size, min_length
        self.first_file = len(journal.files)
        self.first_record = journal.files[-1].totals["records"] if journal.files else 0
        self.records: dict[int, list[Record]] = {}

    def __iter__(self) -> Iterator[_Batch]:
        first_record = self.first_record
        for number in range(self.first_file, len(self.paths)):
            reader, source = FastaReader(self.paths[number]), self.sources[number]
            records = self.records[number] = []
            pieces = cut_pieces(reader, first_record, records, self._size, self._min_length)
            is_last = False
            while not is_last:
                try:
                    chunk, is_last = _take_chunk(pieces)
                except InputError as error:  # the files before can be kept
                    raise Interrupted(str(error)) from error
                if is_last and source["bytes"] is None:
                    source |= {"sha256": reader.text_sha256(), "bytes": reader.text_bytes}
                yield _Batch(number, first_record, reader.position, chunk, is_last)
            first_record += len(records)


def _take_chunk(pieces: Iterator[Piece]) -> tuple[list[Piece], bool]:
    """The pieces of a worker's next job, and whether those were the last."""
    chunk, bases = [], 0
    for piece in pieces:
        chunk.append(piece)
        bases += len(piece.bases)
        if len(chunk) == _CHUNK_PIECES or bases >= _CHUNK_BASES:
            return chunk, False
    return chunk, True


def _tokenize_files(files: _Files, tokenize: PieceTokenizer, builder: "_Builder", num_workers: int) -> None:
    """Hand the tokenized pieces of all files that are not finished yet to the builder, in order."""
    sizes = [source["bytes"] for source in files.sources]
    ends = [0, *itertools.accumulate(sizes)] if None not in sizes else None
    one_thread = _no_threads_of_tokenizers() if num_workers == 1 else contextlib.nullcontext()
    with (
        one_thread,
        tqdm(desc="tokenizing", disable=None, unit=" bases", unit_scale=True, initial=builder.counts.bases) as progress,
    ):
        for batch, tokenized in map_in_order(lambda batch: tokenize(batch.pieces), files, num_workers):
            builder.take(batch, tokenized, files.records[batch.file])
            progress.update(sum(len(piece.bases) for piece in batch.pieces))
            if ends:
                progress.total = round(progress.n * ends[-1] / (ends[batch.file] + batch.position))
            if batch.is_last:
                builder.finish_file(files.sources[batch.file], files.records.pop(batch.file))


@contextlib.contextmanager
def _no_threads_of_tokenizers() -> Iterator[None]:
    """Keep the tokenizers library, which reads this variable at each call, from starting threads in the block."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Builder:
    """Drops duplicates and chooses what to hold out; gives the splits their sequences, and the journal each file."""

    def __init__(self, directory: Path, journal: Journal, parameters: Parameters, shard_tokens: int):
        self._journal, self._parameters = journal, parameters
        last = journal.files[-1] if journal.files else None
        totals = last.totals if last else _sum_up(0, Counts(), 0)
        self._num_records, self._pieces_split = totals["records"], totals["pieces_split"]
        self.counts = Counts(**{name: totals[name] for name in vars(Counts())})  # of the finished files
        unfinished = last.unfinished if last else {split: new_shard(0) for split in SPLITS}
        self._splits = {
            split: SplitWriter(directory, split, shard_tokens, counts) for split, counts in unfinished.items()
        }
        self._start_file()

    def _start_file(self) -> None:
        self._num_pieces = self.counts.pieces  # kept so far
        self._held_out: list[list[int]] = []  # pieces of the file
        self._full: list[dict[str, Any]] = []  # shards that became full in the file

    def take(self, batch: _Batch, tokenized: Tokenized, records: list[Record]) -> None:
        """Write the sequences of some pieces; count those that are duplicates in their records."""
        parameters, pieces = self._parameters, tokenized.pieces
        of_pieces = [records[number - batch.first_record] for number in pieces["record"].tolist()]
        seen = self._journal.seen.add(tokenized.digests)
        for record in of_pieces:
            record.counts.pieces += 1
        for i in np.flatnonzero(seen):
            counts, size = of_pieces[i].counts, int(pieces["length"][i])
            counts.duplicates += 1
            counts.duplicate_bases += size
            if parameters.dedup:
                counts.pieces -= 1
                counts.bases -= size
        kept = ~seen if parameters.dedup else np.ones(len(seen), bool)
        held_out = self._hold_out(kept, of_pieces)
        self._num_pieces += int(kept.sum())
        for record, start, length, _ in pieces[held_out].tolist():
            self._held_out.append([record, start, start + length])
        strands = 1 + parameters.reverse_complement
        self._pieces_split += int(kept[tokenized.numbers].sum()) - strands * int(kept.sum())
        for split, chosen in (("train", kept & ~held_out), ("validation", held_out)):
            rows = chosen[tokenized.numbers]
            tokens = tokenized.tokens[np.repeat(rows, tokenized.lengths)]
            self._full += self._splits[split].append(tokens, tokenized.lengths[rows], tokenized.rows[rows])

    def _hold_out(self, kept: np.ndarray, records: list[Record]) -> np.ndarray:
        """Which pieces are held out for validation, bool `[n]`: by their record, or every so many that are kept."""
        if names := self._parameters.validation_records:
            return kept & np.array([record.name in names for record in records], bool)
        ordinals = self._num_pieces + np.cumsum(kept) - 1
        before, after = (np.floor((ordinals + i) * self._parameters.validation_fraction + 0.5) for i in (0, 1))
        return kept & (after > before)

    def finish_file(self, source: dict[str, Any], records: list[Record]) -> None:
        """Wait until all that a file gave is on disk, and add it to the journal."""
        self._num_records += len(records)
        for record in records:
            self.counts.add(record.counts)
        for split in self._splits.values():
            split.sync()
        self._journal.append(
            FinishedFile(
                source={**source, "records": [{"name": record.name, **vars(record.counts)} for record in records]},
                totals=_sum_up(self._num_records, self.counts, self._pieces_split),
                validation=self._held_out,
                shards=self._full,
                unfinished={split: {**writer.counts} for split, writer in self._splits.items()},
                digests=len(self._journal.seen),
            )
        )
        self._start_file()

    def finish(self) -> dict[str, Any]:
        """End the shards; return what the manifest says of files, sequences and shards.

        Raises:
            InputError: a split is empty, or no record has a name that was to be held out.
        """
        files = self._journal.files
        validation = list(itertools.chain.from_iterable(file.validation for file in files))
        self._check_splits(len(validation))
        shards = list(itertools.chain.from_iterable(file.shards for file in files))
        shards += [split.finish() for split in self._splits.values()]
        totals: dict[str, Any] = files[-1].totals
        for split in SPLITS:
            of_split = [shard for shard in shards if shard["split"] == split]
            totals[split] = {key: sum(shard[key] for shard in of_split) for key in ("sequences", "tokens", "bases")}
        return {
            "totals": totals,
            "sources": [file.source for file in files],
            "shards": sorted(shards, key=lambda shard: shard["name"]),
            "validation": validation,
        }

    def close(self) -> None:
        """Close the files, whatever is in them."""
        for split in self._splits.values():
            split.close()

    def _check_splits(self, held_out: int) -> None:
        parameters = self._parameters
        if parameters.validation_records:
            names = {record["name"] for file in self._journal.files for record in file.source["records"]}
            if absent := set(parameters.validation_records) - names:
                raise InputError(
                    f"validation_records: expected names of records, found {', '.join(sorted(absent))}, which no file "
                    f"has; the first of {len(names):,} names are {', '.join(sorted(names)[:5])}"
                )
        training = self.counts.pieces - held_out
        if not held_out or not training:
            option = "validation_records" if parameters.validation_records else "validation_fraction"
            raise InputError(
                f"{option} {getattr(parameters, option)} and min_length {parameters.min_length} left {training} pieces "
                f"to train on and {held_out} to validate on; expected 1 or more of each: change "
                f"--{option.replace('_', '-')} or --min-length of `dnazen corpus`, or add sequence"
            )


def _sum_up(num_records: int, counts: Counts, pieces_split: int) -> dict[str, int]:
    """The totals, as in the manifest."""
    return {"records": num_records, **vars(counts), "pieces_split": pieces_split}


def _describe_inputs(paths: Sequence[str | PathLike]) -> list[dict[str, Any]]:
    """`describe_sources`, where checksum and size of standard input are None until it has been read."""
    files = [path for path in paths if str(path) != STDIN]
    if len(paths) - len(files) > 1:
        raise InputError(f"{STDIN} (standard input): given twice")
    sources = iter(describe_sources(files))
    return [{"path": STDIN, "sha256": None, "bytes": None} if str(p) == STDIN else next(sources) for p in paths]
