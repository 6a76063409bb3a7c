"""`dnazen variants`: what a model makes of each variant of a VCF file: a likelihood ratio and an embedding distance."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import pysam
import torch
from tqdm import tqdm

from dnazen import __version__
from dnazen.batches.streaming import run_batches
from dnazen.defaults import FLANK_BASES, MAX_VARIANT_TOKENS, PRECISION
from dnazen.dna import BASES, IUPAC_BASES, is_clean, reverse_complement
from dnazen.files import InputError, atomic_file
from dnazen.inference.genome import Reference
from dnazen.inference.loading import InferenceModel, load_for_inference
from dnazen.inference.vcf import VcfFile, add_info, create_vcf, name_record
from dnazen.models import DNAZenForMaskedLM

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
    max_batch_tokens: int = MAX_VARIANT_TOKENS,
    precision: str = PRECISION,
    attn_implementation: str | None = None,
) -> dict[str, int]:
    """Write the VCF again with four more INFO fields, a value for each ALT allele; the rest of each line as it is.

    Each allele is scored in a window: the allele with `flank` bases of the reference on either side (fewer at a
    contig's end, or next to a letter other than A, C, G, T), the same for REF and ALT. Bases that REF and ALT share at
    their ends belong to the flanks. Both strands of both windows are tokenized.

    The tokens that the two windows share at either end are the context (`AllelePair` has an example); BPE may cut the
    windows differently far beyond the allele, so the tokens themselves are compared. The tokens between spell the same
    part of the window with one allele or the other. They are all masked together, and the allele's score is the sum of
    their log probabilities given the context alone; no G-gram touches a masked token. REF and ALT may differ in the
    number of these tokens, and then so do the questions asked of the model; the numbers are written beside the ratio.
    At an insertion or deletion, where one allele is empty, the neighbouring bases are scored with it, so that there is
    always a token to score.

    Alleles that are not spelled in A, C, G, T (symbolic, `*`, breakends, N), or not a change, or longer than `2 *
    flank`, are not scored: their value is missing (`.`). A record without a scored allele is written as it is.

    Args:
        model: a folder or a name on the Hugging Face hub, with a masked-language head.
        vcf: VCF, plain or compressed; read twice, and all of it is checked first.
        fasta: the reference, plain or compressed. A plain copy lies beside `output` while this runs, without a name.
        output: .vcf, or .vcf.gz for BGZF.
        flank: in bases.
        max_batch_tokens: changes the scores by rounding alone.
        precision, attn_implementation: as in `load_for_inference`.

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
        file = stack.enter_context(VcfFile(vcf))
        header = file.extend_header(_FIELDS, f"dnazen={__version__}; model={model}; flank={flank}")
        reference = stack.enter_context(Reference(fasta, target.parent))
        for record, _ in file.records():
            counts["ambiguous"] += _check(record, vcf, reference)
            counts["records"] += 1
        loaded = load_for_inference(model, DNAZenForMaskedLM, precision, attn_implementation)
        progress = stack.enter_context(tqdm(desc="scoring", unit=" records", total=counts["records"], disable=None))
        written = stack.enter_context(create_vcf(target, output))
        written.write(header.encode())
        groups = ((plan, plan.sequences) for plan in _plan(file.records(), reference, flank, loaded, counts))
        compute = _Scores(loaded)
        for plan, results in run_batches(groups, loaded.collator, compute, loaded.model.device, max_batch_tokens):
            written.write(plan.finish(results))
            progress.update()
    return counts


def _check(record: pysam.VariantRecord, vcf: str | PathLike, reference: Reference) -> bool:
    """Raise InputError for a record off the reference; return whether its REF has a base for an IUPAC code in it.

    VCF allows no such code but N; it has REF take the first of the bases (VCFv4.3, on REF). Here any of them will do.
    """
    place = f"{vcf}: record {name_record(record)}"
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


class AllelePair(NamedTuple):
    """The tokens of the windows with REF and with ALT on one strand, and how many at either end are the context.

    For A>C in ACGT[A]CGGT, if BPE cuts the two windows so:

        ref  ACG TAC  GG T      left = 1 (ACG), right = 2 (GG, T)
        alt  ACG T CC GG T

    of REF the one token TAC is scored, given ACG [MASK] GG T; of ALT the two tokens T and CC, given ACG [MASK] [MASK]
    GG T.
    """

    ref: list[int]
    alt: list[int]
    left: int
    right: int

    def spelled(self, tokens: list[int]) -> list[int]:
        """Of an allele's tokens (`ref` or `alt`), those that are scored."""
        return tokens[self.left : len(tokens) - self.right]

    def masked(self, count: int, mask_token_id: int) -> list[int]:
        """The context around `count` masked tokens."""
        return [*self.ref[: self.left], *[mask_token_id] * count, *self.ref[len(self.ref) - self.right :]]


def align_tokens(
    ref: list[int], alt: list[int], lengths: np.ndarray, left_bases: int, right_bases: int
) -> tuple[int, int]:
    """How many tokens at the left and right ends are equal, within so many bases of either end.

    Args:
        lengths: bases of each token, by its id.
    """
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
        self.line = line
        self.alleles: list[list[AllelePair] | None] = []  # both strands of each ALT; None: not scored
        self.sequences: list[list[int]] = []  # different ones
        self._numbers: dict[tuple[int, ...], int] = {}  # in `sequences`
        self._mask_token_id = mask_token_id

    def add(self, strands: list[AllelePair] | None) -> None:
        """The next ALT allele."""
        self.alleles.append(strands)
        for pair in strands or ():
            alleles = pair.ref, pair.alt
            for tokens in (*alleles, *(self._masked(pair, tokens) for tokens in alleles)):
                if tuple(tokens) not in self._numbers:
                    self._numbers[tuple(tokens)] = len(self.sequences)
                    self.sequences.append(tokens)

    def _masked(self, pair: AllelePair, tokens: list[int]) -> list[int]:
        return pair.masked(len(pair.spelled(tokens)), self._mask_token_id)

    def finish(self, results: list[tuple[np.ndarray, np.ndarray]]) -> bytes:
        """The record's line, from what `_Scores` says of each sequence."""

        def of(tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
            return results[self._numbers[tuple(tokens)]]

        def score(pair: AllelePair, tokens: list[int]) -> float:
            spelled = pair.spelled(tokens)
            return float(of(self._masked(pair, tokens))[1][np.arange(len(spelled)), spelled].sum(dtype=np.float64))

        line = self.line
        if any(self.alleles):
            rows = []
            for strands in self.alleles:
                if strands is None:
                    rows.append(["."] * len(_FIELDS))
                    continue
                ratio = np.mean([score(pair, pair.alt) - score(pair, pair.ref) for pair in strands])
                distance = np.mean([np.linalg.norm(of(pair.alt)[0] - of(pair.ref)[0]) for pair in strands])
                sizes = [len(strands[0].spelled(tokens)) for tokens in (strands[0].ref, strands[0].alt)]
                rows.append([f"{ratio:.6g}", f"{distance:.6g}", *map(str, sizes)])
            line = add_info(line, {name: ",".join(column) for name, column in zip(_FIELDS, zip(*rows))})
        return line + b"\n"


def _plan(
    records: Iterator[tuple[pysam.VariantRecord, bytes]], reference: Reference, flank: int, loaded: InferenceModel,
    counts: dict[str, int],
) -> Iterator[_Plan]:  # fmt: skip
    """What to do for each record; `counts` tells its alleles."""
    lengths = np.array([len(token) for token in loaded.id_to_token])
    for record, line in records:
        plan = _Plan(line, loaded.tokenizer.mask_token_id)
        ref = record.ref.upper()
        for alt in map(str.upper, record.alts or ()):
            counts["alleles"] += 1
            problem = None
            if not (is_clean(ref) and is_clean(alt)):
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
            left = re.search(f"[{BASES}]*$", reference.fetch(record.chrom, start - flank, start)).group()
            right = re.match(f"[{BASES}]*", reference.fetch(record.chrom, end, end + flank)).group()
            changed = (allele[before : len(allele) - after] for allele in (ref, alt))
            plan.add(_pair_alleles(left, right, *changed, loaded, lengths))
        yield plan


def _pair_alleles(
    left: str, right: str, ref: str, alt: str, loaded: InferenceModel, lengths: np.ndarray
) -> list[AllelePair]:
    """Both strands of two alleles, one of which may be empty, between their flanks."""
    # where one is, the neighbouring bases are scored with it
    margin = int(not ref or not alt)
    limits = max(len(left) - margin, 0), max(len(right) - margin, 0)
    windows = [left + allele + right for allele in (ref, alt)]
    strands = []
    for texts, (left_bases, right_bases) in (
        (windows, limits), ([reverse_complement(text) for text in windows], limits[::-1])
    ):  # fmt: skip
        tokens = loaded.tokenize(texts)
        strands.append(AllelePair(*tokens, *align_tokens(*tokens, lengths, left_bases, right_bases)))
    return strands


class _Scores:
    """From a packed batch to, of each sequence, the mean token state `[H]` and the log probabilities at its m masked
    tokens `[m, V]`."""

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
