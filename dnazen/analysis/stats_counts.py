"""Counting of the G-grams in data sets.

How the columns are read. An instance is a row of a CSV file or a sequence of a corpus, whole: nothing is truncated and
no limit of G-grams per sequence is applied (the paper's 127 G-grams in a SARS-CoV-2 instance exceed the published
limit of 30). "Total" adds up, over the instances, the G-grams that occur in each; one that occurs twice in an
instance is one G-gram there, as it is for the model. "Distinct" is how many different ones occur in the split, and
"average" is total / instances, which the paper's own figures obey. A frequency is a G-gram's share of the total.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dnazen.data.corpus import SPLITS, Corpus
from dnazen.data.tables import read_sequences
from dnazen.data.tokenizer import tokenizer_checksum
from dnazen.files import InputError
from dnazen.ngram.count import PairCounts, add_pairs, encode_pairs, token_size
from dnazen.ngram.links import measure_pmis
from dnazen.ngram.vocab import MANIFEST_FILE, NgramVocabulary
from dnazen.processes import cut_blocks
from dnazen_kernels.ngram_matching import ngram_matching
from dnazen_kernels.ngram_matching.table import token_bits

_BATCH_SEQUENCES = 2048  # at most; and
_BATCH_TOKENS = 1 << 18  # about so many tokens, whose matches take some 30 MB
_CSV = re.compile(r".+\.csv(\.(gz|bz2|xz|zst))?")
_SPLIT_ORDER = ("train", "dev", "validation", "test")


class Source(NamedTuple):
    """One split of one data set."""

    group: str  # the folder of related data sets that it lies in, such as GUE's `tf`
    dataset: str
    split: str
    path: Path  # of a CSV file, or of a corpus


@dataclass
class SplitStatistics:
    """What one split of one data set holds; a row of the paper's Appendix A, and more."""

    group: str
    dataset: str
    split: str
    instances: int = 0
    tokens: int = 0
    unknown_tokens: int = 0  # letters other than A, C, G, T
    covered_tokens: int = 0  # in one G-gram or more
    total: int = 0
    distinct: int = 0

    @property
    def average(self) -> float:
        """G-grams of an instance."""
        return self.total / self.instances


@dataclass
class NgramStatistics:
    """Counts over all data; the G-grams are in the order of the vocabulary."""

    splits: list[SplitStatistics]
    counts: dict[str, np.ndarray] = field(default_factory=dict)  # by data set: instances with each G-gram, int64 [G]
    pmis: np.ndarray | None = None  # bits [G]: of the weakest pair of neighbours in all data; nan where not seen


def find_sources(paths: Sequence[str | PathLike]) -> list[Source]:
    """The splits that lie under `paths`: CSV files, folders of them (such as GUE's) at any depth, corpora.

    A data set is called by its path in the folder that was given; a file given by itself, by the two folders it is in.

    Raises:
        InputError: nothing there; a folder without a CSV file; two splits of one name.
    """
    sources: list[Source] = []
    for path in (Path(path).absolute() for path in paths):
        if (path / MANIFEST_FILE).is_file():
            sources += [Source(path.name, path.name, split, path) for split in SPLITS]
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*.csv*") if _CSV.fullmatch(file.name))
            if not files:
                raise InputError(f"{path}: expected CSV files in this folder (.csv, .csv.gz), or a corpus, found none")
            for file in files:
                parts = file.parent.relative_to(path).parts
                group = parts[0] if len(parts) > 1 else path.name
                sources.append(Source(group, "/".join(parts) or path.name, file.name.split(".")[0], file))
        elif path.is_file():
            folders = path.parts[-3:-1]
            sources.append(Source(folders[0], "/".join(folders), path.name.split(".")[0], path))
        else:
            raise InputError(f"{path}: expected a CSV file, a folder of them, or a corpus, found nothing")
    names = [(source.dataset, source.split) for source in sources]
    for name in names:
        if names.count(name) > 1:
            same = " and ".join(str(other.path) for other in sources if (other.dataset, other.split) == name)
            raise InputError(f"{same}: expected data sets of different names, found {' '.join(name)} twice; give the "
                             "folder that both are in")  # fmt: skip
    order = {split: i for i, split in enumerate(_SPLIT_ORDER)}
    return sorted(sources, key=lambda s: (s.group, s.dataset, order.get(s.split, len(order)), s.split))


def collect_statistics(
    sources: Sequence[Source], vocabulary: NgramVocabulary, tokenizer: PreTrainedTokenizerBase
) -> NgramStatistics:
    """Match the G-grams in all sources, in batches; the memory needed does not grow with the data.

    PMI is that of the extraction (`measure_pmis`), with the counts of tokens and pairs in all sources together. Their
    table takes 128 MiB for 4,096 tokens.

    Raises:
        InputError: a file cannot be read, has no sequence, or is a corpus of another tokenizer.
    """
    table = vocabulary.table(len(tokenizer))
    rows = np.full(vocabulary.vocab_size, -1)
    rows[vocabulary.ids] = np.arange(len(vocabulary.ids))
    bits = token_bits(len(tokenizer), 2)
    token_counts, pair_counts = (torch.zeros(1 << n * bits, dtype=torch.int64) for n in (1, 2))
    statistics = NgramStatistics([])
    with tqdm(desc="matching", unit=" tokens", unit_scale=True, disable=None) as progress:
        for source in sources:
            split = SplitStatistics(source.group, source.dataset, source.split)
            counts = np.zeros(len(vocabulary.ngrams), np.int64)
            for tokens, cu_seqlens in _iterate_batches(source, tokenizer):
                tokens = torch.from_numpy(tokens)
                matches = ngram_matching(tokens, torch.from_numpy(cu_seqlens), table)
                counts += np.bincount(rows[matches.ngram_input_ids.numpy()], minlength=len(counts))
                split.instances += len(cu_seqlens) - 1
                split.tokens += len(tokens)
                split.unknown_tokens += int((tokens == tokenizer.unk_token_id).sum())
                split.covered_tokens += int(matches.edges.token_offsets.diff().count_nonzero())
                add_pairs(token_counts, pair_counts, tokens, *encode_pairs(tokens, cu_seqlens, bits))
                progress.update(len(tokens))
            split.total, split.distinct = int(counts.sum()), int(np.count_nonzero(counts))
            statistics.splits.append(split)
            statistics.counts[source.dataset] = statistics.counts.get(source.dataset, 0) + counts
    statistics.pmis = _ngram_pmis(PairCounts(token_counts.numpy(), pair_counts.numpy()), vocabulary.ngrams)
    return statistics


def _iterate_batches(source: Source, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens without special ones, int64, and `cu_seqlens`, of a source's instances in order."""
    if (source.path / MANIFEST_FILE).is_file():
        corpus = Corpus.open(source.path, verify=source.split == SPLITS[0])  # once is enough
        if (found := tokenizer_checksum(corpus.tokenizer)) != (expected := tokenizer_checksum(tokenizer)):
            raise InputError(f"{source.path}: expected a corpus with tokenizer {expected}, found {found}")
        for tokens, offsets in getattr(corpus, source.split).shards:
            for first, end in cut_blocks(offsets, _BATCH_TOKENS):
                block = np.asarray(tokens[offsets[first] : offsets[end]], np.int64)
                yield block, (offsets[first : end + 1] - offsets[first]).astype(np.int32)
        return
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    sequences = read_sequences(source.path)
    while batch := list(itertools.islice(sequences, _BATCH_SEQUENCES)):
        ids = [encoding.ids for encoding in encode(batch, add_special_tokens=False)]
        cu_seqlens = np.cumsum([0, *map(len, ids)]).astype(np.int32)
        yield np.fromiter(itertools.chain.from_iterable(ids), np.int64, cu_seqlens[-1]), cu_seqlens


def _ngram_pmis(table: PairCounts, ngrams: Sequence[tuple[int, ...]]) -> np.ndarray:
    """PMI in bits of each G-gram's weakest pair, fp64 `[G]`; nan where a pair was not seen."""
    bits = token_size(table.tokens)
    codes = np.array([a << bits | b for ngram in ngrams for a, b in itertools.pairwise(ngram)], np.int64)
    with np.errstate(divide="ignore", invalid="ignore"):
        pmis = measure_pmis(table.tokens, table.pairs.sum(), codes, table.pairs[codes])
    pmis[table.pairs[codes] == 0] = np.nan
    starts = np.cumsum([0, *(len(ngram) - 1 for ngram in ngrams)])[:-1]
    return np.minimum.reduceat(pmis, starts)
