"""`dnazen variants`: what a model makes of each variant of a VCF file: a likelihood ratio and an embedding distance."""

import errno
import mmap
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import dropwhile
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pysam
import torch
from tqdm import tqdm
from xopen import xopen

from dnazen import __version__
from dnazen.batches.streaming import run_batches
from dnazen.data.fasta import FastaReader, reverse_complement
from dnazen.files import InputError, atomic_file
from dnazen.inference.explain import IUPAC_BASES
from dnazen.inference.loading import InferenceModel, load_for_inference
from dnazen.models import DNAZenForMaskedLM

FLANK_BASES = 256
# The scores of 4,096 tokens at every masked one are kept for some batches.
MAX_BATCH_TOKENS = 4096
_BASES = re.compile("[ACGT]+")
_CODES = {code: bases for code, bases in IUPAC_BASES.items() if code != "N"}
_FIELDS = {
    "DNAZEN_LLR": (
        "Float", "Log-likelihood ratio (nats) of ALT over REF: log probability of the tokens that spell the allele and "
        "differ, masked together, mean of both strands; below 0 where the model prefers REF",
    ),
    "DNAZEN_DIST": (
        "Float", "Euclidean distance between the mean token states (last layer) of the windows with ALT and with REF, "
        "mean of both strands",
    ),
    "DNAZEN_REF_TOKENS": ("Integer", "Tokens of REF that DNAZEN_LLR is over, forward strand"),
    "DNAZEN_ALT_TOKENS": ("Integer", "Tokens of ALT that DNAZEN_LLR is over, forward strand"),
}  # fmt: skip


def variants(
    model: str,
    vcf: str | PathLike,
    fasta: str | PathLike,
    output: str | PathLike,
    flank: int = FLANK_BASES,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> dict[str, int]:
    """Write the VCF again with four more INFO fields, a value for each ALT allele; the rest of each line as it is.

    A window is the allele, without what REF and ALT share at their ends, with `flank` bases of the reference on either
    side (fewer at a contig's end, or next to a letter other than A, C, G, T), the same for both. Both windows are
    tokenized, on both strands. BPE may cut them up differently far beyond the allele, so the tokens are compared: those
    that are equal from the left end up to the allele, and from the right end, are the context, the same for both. What
    lies between spells the same stretch of the window with either allele, and is scored: all its tokens are masked
    together, and its score is the sum of their log probabilities given the context alone. No G-gram touches a masked
    token. REF and ALT may differ in the number of these tokens, and then so do the questions asked of the model; the
    numbers are written beside the ratio. At an insertion or deletion, where one allele is empty, the neighbouring bases
    belong to the stretch, so that it never is.

    Alleles that are not spelled in A, C, G, T (symbolic, `*`, breakends, N), or not a change, or longer than `2 *
    flank`, are not scored: their value is missing (`.`). A record without a scored allele is written as it is.

    Args:
        model: a folder or a name on the Hugging Face hub, with a masked-language head.
        vcf: VCF, plain or compressed; read twice, and all of it is checked first.
        fasta: the reference, plain or compressed. A plain copy lies beside `output` while this runs, without a name.
        output: .vcf, or .vcf.gz for BGZF.
        flank: in bases.
        max_batch_tokens: changes the scores by rounding alone.

    Returns:
        Counts: records, ambiguous (those whose REF has a base for an IUPAC code of the reference), alleles, scored,
        unspelled (not in A, C, G, T), unchanged, long.

    Raises:
        InputError: a file cannot be read as what it should be; a record lies on a contig that the reference does not
            have, outside it, or has another REF; `output` exists; an argument is out of its range.
    """
    if flank < 1:
        raise InputError(f"flank: expected at least 1, found {flank}")
    if not str(output).endswith((".vcf", ".vcf.gz")):
        raise InputError(f"{output}: expected a name that ends in .vcf or .vcf.gz")
    counts = dict.fromkeys(("records", "ambiguous", "alleles", "scored", "unspelled", "unchanged", "long"), 0)
    with ExitStack() as stack:
        target = stack.enter_context(atomic_file(output))
        source = stack.enter_context(_Source(vcf))
        header = _extended_header(source, model, flank)
        reference = stack.enter_context(_Reference(fasta, target.parent))
        for record, _ in source.records():
            counts["ambiguous"] += _check(record, vcf, reference)
            counts["records"] += 1
        loaded = load_for_inference(model, DNAZenForMaskedLM)
        progress = stack.enter_context(tqdm(desc="scoring", unit=" records", total=counts["records"]))
        written = stack.enter_context(_create(target, output))
        written.write(header.encode())
        groups = ((plan, plan.sequences) for plan in _plan(source.records(), reference, flank, loaded, counts))
        compute = _Scores(loaded)
        for plan, results in run_batches(groups, loaded.collator, compute, loaded.model.device, max_batch_tokens):
            written.write(plan.finish(results))
            progress.update()
    return counts


@contextmanager
def _create(target: Path, output: str | PathLike) -> Iterator[Any]:
    """The output under its temporary name, as a binary file."""
    try:
        with (pysam.BGZFile if str(output).endswith(".gz") else open)(str(target), "wb") as file:
            yield file
    except OSError as error:
        if error.errno is not None:
            raise
        # pysam names neither the file nor the reason
        raise OSError(errno.EIO, f"cannot be written; is the disk full? ({error})", str(output)) from error


class _Source:
    """The records of a VCF file, each time anew; faults of the file are InputErrors."""

    def __init__(self, path: str | PathLike):
        self.path = Path(path)
        self._stack = ExitStack()

    def __enter__(self) -> "_Source":
        if not self.path.is_file():
            problem = "not a regular file" if self.path.exists() else "no such file"
            raise InputError(f"{self.path}: {problem}; expected VCF")
        verbosity = pysam.set_verbosity(0)  # htslib's own words come without the file's name
        self._stack.callback(pysam.set_verbosity, verbosity)
        self._readable = self.path
        with open(self.path, "rb") as file:
            head = file.read(18)
        is_block_compressed = head[:4] == b"\x1f\x8b\x08\x04" and head[12:16] == b"BC\x02\x00"
        if head[:2] == b"\x1f\x8b" and not is_block_compressed:  # which pysam cannot read
            copy = self._stack.enter_context(tempfile.NamedTemporaryFile(suffix=".vcf"))
            try:
                with xopen(self.path, "rb", threads=0) as packed:
                    shutil.copyfileobj(packed, copy)
            except (OSError, EOFError) as error:
                raise InputError(f"{self.path}: cannot be read as VCF: {error}") from error
            copy.flush()
            self._readable = Path(copy.name)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def open(self) -> pysam.VariantFile:
        """The file, before its first record."""
        try:
            return pysam.VariantFile(str(self._readable))
        except (OSError, ValueError, NotImplementedError) as error:
            raise InputError(f"{self.path}: cannot be read as VCF: {error}") from error

    def records(self) -> Iterator[tuple[pysam.VariantRecord, bytes]]:
        """Its records, and the line of each as the file has it: pysam's has numbers of some six digits."""
        place = "the first record"
        with self.open() as file, xopen(self._readable, "rb", threads=0) as text:
            lines = dropwhile(lambda line: line.startswith(b"#"), text)
            while True:
                try:
                    record = next(file)
                    line = str(record).encode() if file.is_bcf else next(lines)
                except StopIteration:
                    return
                except (OSError, EOFError, ValueError) as error:
                    raise InputError(f"{self.path}: cannot be read as VCF: {place}: {error}") from error
                place = f"the record after {_name(record)}"
                yield record, line.rstrip(b"\r\n")


class _Reference:
    """A FASTA file's bases by place, in a plain copy on disk that has no name, so that nothing is left of it."""

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

    def __enter__(self) -> "_Reference":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bases.close()
        self._copy.close()

    def fetch(self, contig: str, start: int, end: int) -> str:
        """Upper-case bases `[start, end)`, those that there are."""
        offset, length = self.contigs[contig]
        return self._bases[offset + max(start, 0) : offset + min(end, length)].decode()


def _name(record: pysam.VariantRecord) -> str:
    return f"{record.chrom}:{record.pos}" + (f" ({record.id})" if record.id else "")


def _check(record: pysam.VariantRecord, vcf: str | PathLike, reference: _Reference) -> bool:
    """Raise InputError for a record off the reference; return whether its REF has a base for an IUPAC code in it.

    VCF allows no such code but N; it has REF take the first of the bases (VCFv4.3, on REF). Here any of them will do.
    """
    place = f"{vcf}: record {_name(record)}"
    if record.chrom not in reference.contigs:
        known = ", ".join(list(reference.contigs)[:5]) + (", ..." if len(reference.contigs) > 5 else "")
        raise InputError(f"{place}: expected a contig of {reference.path} ({known}), found {record.chrom!r}")
    length = reference.contigs[record.chrom][1]
    last = record.pos + len(record.ref) - 1
    if record.pos < 1 or last > length:
        raise InputError(
            f"{place}: expected positions 1 to {length:,} of {record.chrom} in {reference.path}, "
            f"found {record.pos:,} to {last:,}"
        )
    expected = reference.fetch(record.chrom, record.pos - 1, last)
    ref = record.ref.upper()
    if ref == expected:
        return False
    pairs = zip(ref, expected)
    if len(ref) != len(expected) or not all(base == code or base in _CODES.get(code, "") for base, code in pairs):
        raise InputError(f"{place}: expected REF {expected}, as in {reference.path}, found {record.ref}")
    return True


def _extended_header(source: _Source, model: str, flank: int) -> str:
    """The file's header with our fields."""
    with source.open() as file:
        if taken := sorted(_FIELDS.keys() & set(file.header.info)):
            raise InputError(
                f"{source.path}: expected no INFO field {taken[0]}, found it in the header: scored before?"
            )
        *lines, columns = str(file.header).splitlines()
    for name, (kind, text) in _FIELDS.items():
        lines.append(f'##INFO=<ID={name},Number=A,Type={kind},Description="{text}">')
    lines.append(f"##dnazen={__version__}; model={model}; flank={flank}")
    return "\n".join([*lines, columns]) + "\n"


class Strand(NamedTuple):
    """One strand of REF's and ALT's window: their tokens, and how many at either end they share as context."""

    ref: list[int]
    alt: list[int]
    left: int
    right: int

    def spelled(self, tokens: list[int]) -> list[int]:
        """Those of an allele's tokens that are scored."""
        return tokens[self.left : len(tokens) - self.right]

    def masked(self, count: int, mask_token_id: int) -> list[int]:
        """The context around `count` masked tokens."""
        return [*self.ref[: self.left], *[mask_token_id] * count, *self.ref[len(self.ref) - self.right :]]


def align_tokens(
    ref: list[int], alt: list[int], lengths: np.ndarray, left_bases: int, right_bases: int
) -> tuple[int, int]:
    """How many tokens at the left and right ends are equal, within so many bases; `lengths` is by token id."""
    counts = []
    for one, other, limit in ((ref, alt, left_bases), (ref[::-1], alt[::-1], right_bases)):
        count = 0
        for token, counterpart in zip(one, other):
            limit -= int(lengths[token])
            if token != counterpart or limit < 0:
                break
            count += 1
        counts.append(count)
    return counts[0], counts[1]


class _Plan:
    """A record's line, the sequences that the model must see for it, and what becomes of it."""

    def __init__(self, line: bytes, mask_token_id: int):
        self.fields = line.split(b"\t")
        self.alleles: list[list[Strand] | None] = []  # both strands of each ALT; None: not scored
        self.sequences: list[list[int]] = []
        self._numbers: dict[tuple[int, ...], int] = {}
        self._mask_token_id = mask_token_id

    def add(self, strands: list[Strand] | None) -> None:
        """The next ALT allele."""
        self.alleles.append(strands)
        for strand in strands or ():
            alleles = strand.ref, strand.alt
            for tokens in (*alleles, *(self._masked(strand, tokens) for tokens in alleles)):
                if tuple(tokens) not in self._numbers:
                    self._numbers[tuple(tokens)] = len(self.sequences)
                    self.sequences.append(tokens)

    def _masked(self, strand: Strand, tokens: list[int]) -> list[int]:
        return strand.masked(len(strand.spelled(tokens)), self._mask_token_id)

    def finish(self, results: list[tuple[np.ndarray, np.ndarray]]) -> bytes:
        """The record's line, from each sequence's mean state and log probabilities at its masks."""

        def of(tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
            return results[self._numbers[tuple(tokens)]]

        def score(strand: Strand, tokens: list[int]) -> float:
            spelled = strand.spelled(tokens)
            return float(of(self._masked(strand, tokens))[1][np.arange(len(spelled)), spelled].sum(dtype=np.float64))

        if any(self.alleles):
            rows = []
            for strands in self.alleles:
                if strands is None:
                    rows.append(["."] * len(_FIELDS))
                    continue
                ratio = np.mean([score(strand, strand.alt) - score(strand, strand.ref) for strand in strands])
                distance = np.mean([np.linalg.norm(of(strand.alt)[0] - of(strand.ref)[0]) for strand in strands])
                sizes = [len(strands[0].spelled(tokens)) for tokens in (strands[0].ref, strands[0].alt)]
                rows.append([f"{ratio:.6g}", f"{distance:.6g}", *map(str, sizes)])
            values = [f"{name}={','.join(column)}".encode() for name, column in zip(_FIELDS, zip(*rows))]
            info = self.fields[7].rstrip(b";")
            self.fields[7] = b";".join([*([info] if info not in (b"", b".") else []), *values])
        return b"\t".join(self.fields) + b"\n"


def _plan(
    records: Iterator[tuple[pysam.VariantRecord, bytes]], reference: _Reference, flank: int, loaded: InferenceModel,
    counts: dict[str, int],
) -> Iterator[_Plan]:  # fmt: skip
    lengths = np.array([len(token) for token in loaded.spelling])
    for record, line in records:
        plan = _Plan(line, loaded.tokenizer.mask_token_id)
        ref = record.ref.upper()
        for alt in map(str.upper, record.alts or ()):
            counts["alleles"] += 1
            problem = None
            if not (_BASES.fullmatch(ref) and _BASES.fullmatch(alt)):
                problem = "unspelled"
            elif ref == alt:
                problem = "unchanged"
            elif max(len(ref), len(alt)) > 2 * flank:
                problem = "long"
            counts[problem or "scored"] += 1
            if problem:
                plan.add(None)
                continue
            # what the two share belongs to the flanks, however the file has it
            shorter = min(len(ref), len(alt))
            before = next((at for at in range(shorter) if ref[at] != alt[at]), shorter)
            after = next((at for at in range(shorter - before) if ref[-1 - at] != alt[-1 - at]), shorter - before)
            start, end = record.pos - 1 + before, record.pos - 1 + len(ref) - after
            left = re.search("[ACGT]*$", reference.fetch(record.chrom, start - flank, start)).group()
            right = re.match("[ACGT]*", reference.fetch(record.chrom, end, end + flank)).group()
            changed = (allele[before : len(allele) - after] for allele in (ref, alt))
            plan.add(_strands(left, right, *changed, loaded, lengths))
        yield plan


def _strands(left: str, right: str, ref: str, alt: str, loaded: InferenceModel, lengths: np.ndarray) -> list[Strand]:
    """Both strands of the windows of two alleles, one of which may be empty."""
    # where one is, the neighbours belong to the stretch that is scored
    margin = int(not ref or not alt)
    limits = max(len(left) - margin, 0), max(len(right) - margin, 0)
    windows = [left + allele + right for allele in (ref, alt)]
    strands = []
    for texts, (left_bases, right_bases) in (
        (windows, limits), ([reverse_complement(text) for text in windows], limits[::-1])
    ):  # fmt: skip
        tokens = loaded.tokenize(texts)
        strands.append(Strand(*tokens, *align_tokens(*tokens, lengths, left_bases, right_bases)))
    return strands


class _Scores:
    """From a packed batch to the mean token state of each sequence, and the log probabilities at its masks."""

    def __init__(self, loaded: InferenceModel):
        self._model, self._mask_token_id = loaded.model, loaded.tokenizer.mask_token_id

    def __call__(self, batch: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        states = self._model.bert(**batch).last_hidden_state
        is_masked = batch["input_ids"] == self._mask_token_id
        scores = self._model.cls["predictions"](states[is_masked]).float().log_softmax(-1).cpu()
        sizes = batch["cu_seqlens"].diff().tolist()
        masks = [int(part.sum()) for part in is_masked.cpu().split(sizes)]
        means = [part[1:-1].mean(0, dtype=torch.float64).numpy() for part in states.cpu().split(sizes)]
        return list(zip(means, (part.numpy() for part in scores.split(masks))))
