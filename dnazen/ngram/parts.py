"""Counts of parts of the data, each a folder, from which G-grams are made as if from all the data at once.

A part is a corpus, or one of the even shards of a corpus; each is counted by itself, on any machine, at any time. The
first count of every part is of pairs. The second needs the pairs of all parts, which say what is linked, and is of
runs. Those are merged. With two parts:

    count part 1 -> pairs 1     count part 1 --pairs 1 2 -> runs 1
    count part 2 -> pairs 2     count part 2 --pairs 1 2 -> runs 2     merge runs 1 2 -> G-grams
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnazen import __version__
from dnazen.data.corpus import Corpus
from dnazen.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_checksum
from dnazen.defaults import DEVICE, MIN_COUNT, NUM_WORKERS
from dnazen.files import InputError, atomic_directory, read_json, sha256_file, write_json
from dnazen.ngram.build import write_manifest, write_ngrams
from dnazen.ngram.count import PairCounts, Runs, Shard, count_pairs, count_runs, merge_runs, read_slice
from dnazen.ngram.extract import check_parameters, choose_runs, extract_ngrams, list_ngrams
from dnazen.ngram.links import Links, link_pairs
from dnazen.ngram.vocab import MANIFEST_FILE

FORMAT, FORMAT_VERSION = "dnazen-ngram-counts", 2
MERGED_RUNS = 1 << 23  # merged at a time: some 500 MiB


def build_counts(
    corpus: Corpus,
    output_dir: str | PathLike,
    *,
    shard: tuple[int, int] = (1, 1),
    pairs: Sequence[str | PathLike] = (),
    num_workers: int = NUM_WORKERS,
    device: str = DEVICE,
    **thresholds: int | float | str,
) -> dict[str, Any]:
    """Count the pairs of a corpus' training split, or of a shard of it; with `pairs`, its runs. Returns the manifest.

    Args:
        shard: (i, n): the i-th of n even shards of the sequences.
        pairs: folders with the pairs of all parts, this one's among them.
        thresholds: `min_pmi`, `min_pair_count`, `min_len`, `max_len` and `long_pieces`, as of `extract_ngrams`.

    Raises:
        InputError: `output_dir` is taken; an argument is out of range; thresholds without pairs; `pairs` are cut short,
            altered, incomplete, of another tokenizer or not of this corpus.
    """
    start = time.perf_counter()
    if not 1 <= shard[0] <= shard[1]:
        raise InputError(f"shard: expected I/N with I from 1 to N, found {shard[0]}/{shard[1]}")
    if thresholds and not pairs:
        raise InputError(f"{', '.join(thresholds)}: expected only with pairs, which are what thresholds are applied to")
    others = ("min_count", "num_workers", "device")
    thresholds = {k: v for k, v in extract_ngrams.__kwdefaults__.items() if k not in others} | thresholds
    tokenizer = corpus.tokenizer
    bits = check_parameters(corpus.train.shards, len(tokenizer), num_workers=num_workers, **thresholds)
    options = dict(bits=bits, num_workers=num_workers, device=device)
    own = take_shard(corpus.train.shards, *shard)
    shards = [described for described in corpus.manifest["shards"] if described["split"] == "train"]
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dnazen_version": __version__,
        "kind": "runs" if pairs else "pairs",
        "tokenizer_checksum": tokenizer_checksum(tokenizer),
        "corpus": str(corpus.path),
        "corpus_checksum": corpus.checksum,
        "tokens_sha256": [described["files"][f"{described['name']}.tokens.npy"] for described in shards],
        "sources_sha256": [source["sha256"] for source in corpus.manifest["sources"]],
        "shard": shard,
        "num_tokens": sum(int(offsets[-1] - offsets[0]) for _, offsets in own),
    }
    with atomic_directory(output_dir) as directory:
        if pairs:
            links, corpora = _link_all(pairs, manifest, thresholds)
            runs, num_pieces = count_runs(
                own,
                linked_pairs=links.pairs,
                **{name: thresholds[name] for name in ("min_len", "max_len", "long_pieces")},
                **options,
            )
            manifest |= {"parameters": thresholds, "corpora": corpora, "num_pairs": links.num_pairs}
            manifest["num_pieces"] = num_pieces.tolist()
            arrays = {"token_counts": links.token_counts, "pairs": links.pairs, "pair_counts": links.pair_counts}
            arrays |= {f"run_{name}": array.numpy() for name, array in runs._asdict().items()}
        else:
            arrays = count_pairs(own, vocab_size=len(tokenizer), **options)._asdict()
        manifest |= {"seconds": round(time.perf_counter() - start, 3), "files": {}}
        for name, array in arrays.items():
            np.save(directory / f"{name}.npy", array)
            manifest["files"][name] = sha256_file(directory / f"{name}.npy")
        save_tokenizer(tokenizer, directory / "tokenizer")
        manifest["checksum"] = _digest(manifest)
        write_json(directory / MANIFEST_FILE, manifest)
    return manifest


def take_shard(shards: Sequence[Shard], index: int, number: int) -> list[Shard]:
    """Shard `index`, from 1, of `number` of a corpus' sequences: of each of its files as many as any other, give or
    take one."""
    bounds = [[i * (len(offsets) - 1) // number for i in (index - 1, index)] for _, offsets in shards]
    return [(tokens, offsets[first : end + 1]) for (tokens, offsets), (first, end) in zip(shards, bounds, strict=True)]


def merge_counts(
    paths: Sequence[str | PathLike], output_dir: str | PathLike, *, min_count: int = MIN_COUNT
) -> dict[str, Any]:
    """Write the G-grams of all parts together, as `build_ngrams` does for one corpus; returns the manifest.

    Args:
        paths: folders with the runs of all parts.
        min_count: candidates with fewer occurrences are dropped.

    Raises:
        InputError: `output_dir` is taken; a part is cut short, altered, missing or there twice; parts do not belong
            together; no G-gram passes the thresholds.
    """
    start = time.perf_counter()
    if min_count < 1:
        raise InputError(f"min_count: expected at least 1, found {min_count}")
    with atomic_directory(output_dir) as directory:
        parts = [_Part(path, "runs") for path in paths]
        first, corpora = parts[0], _join(parts)
        for part in parts:
            if any(part.manifest["files"][name] != first.manifest["files"][name] for name in _LINKS):
                raise InputError(f"{part.path}: expected runs of the pairs linked in {first.path}, found others linked")
        if corpora != first.manifest["corpora"]:
            absent = ", ".join(sorted(set(first.manifest["corpora"]) - set(corpora))) or "none"
            raise InputError(
                f"expected counts of the {len(first.manifest['corpora'])} corpora whose pairs were counted, found "
                f"{len(corpora)}; missing are those with checksum {absent}"
            )
        arrays = [np.array(first.arrays[name]) for name in _LINKS]
        links = Links(arrays[0], first.manifest["num_pairs"], *arrays[1:])
        columns = [[part.arrays[f"run_{name}"] for name in Runs._fields] for part in parts]
        chosen = [choose_runs(runs, links, min_count) for runs in merge_by_range(columns)]
        num_pieces = np.sum([part.manifest["num_pieces"] for part in parts], 0)
        extraction = list_ngrams(chosen, links, num_pieces)
        parameters = {**first.manifest["parameters"], "min_count": min_count}
        counted, tokenizer = ", ".join(str(part.path) for part in parts), first.tokenizer
        write_ngrams(directory, extraction, tokenizer, counted, parameters)
        seconds = round(time.perf_counter() - start, 3)
        return write_manifest(directory, extraction, parameters, corpora, tokenizer, seconds)


def merge_by_range(columns: Sequence[Sequence[np.ndarray]]) -> Iterator[Runs]:
    """The runs of all parts, merged, in order of their keys: one range of keys with some `MERGED_RUNS` after the other.

    Args:
        columns: the arrays of each part's `Runs`, keys rising.
    """
    sizes = [len(keys) for keys, *_ in columns]
    number = 1 + sum(sizes) // MERGED_RUNS
    sample = np.sort(np.concatenate([keys[:: max(1, sum(sizes) >> 16)] for keys, *_ in columns]))
    bounds = sample[np.arange(1, number) * len(sample) // number]
    cuts = [[0, *np.searchsorted(keys, bounds), len(keys)] for keys, *_ in columns]
    for i in range(number):
        slices = [[read_slice(array, cut[i], cut[i + 1]) for array in arrays] for arrays, cut in zip(columns, cuts)]
        yield merge_runs([Runs(*(torch.from_numpy(np.array(array)) for array in arrays)) for arrays in slices])


def summarize(manifest: dict[str, Any]) -> str:
    """What a person wants to know of a part's counts, in lines of text."""
    tokens, seconds = manifest["num_tokens"], manifest["seconds"]
    share = "of shard {}/{} ".format(*manifest["shard"]) if manifest["shard"][1] > 1 else ""
    texts = {"pairs": "pairs, for --pairs of the next count", "runs": "runs of linked pairs, to be merged"}
    rate = f"{tokens / max(seconds, 1e-3) / 1e6:.1f} M tokens/s"
    return f"tokens      {tokens:,} {share}in {seconds:.2f} s ({rate})\ncounted     {texts[manifest['kind']]}"


_LINKS = ("token_counts", "pairs", "pair_counts")  # files of a part with runs, in the order of `Links`
_FILES = {"pairs": PairCounts._fields, "runs": (*_LINKS, *(f"run_{name}" for name in Runs._fields))}


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


class _Part:
    """A folder written by `build_counts`, opened and checked; `arrays` are memory-mapped.

    Raises:
        InputError: it is no such folder, of the other `kind` ("pairs" or "runs"), or cut short or altered.
    """

    def __init__(self, path: str | PathLike, kind: str):
        self.path = Path(path)
        self.manifest = read_json(self.path / MANIFEST_FILE, "the manifest of counts (made by `dnazen ngrams count`)")
        found = tuple(self.manifest.get(name) for name in ("format", "format_version", "kind"))
        if found != (FORMAT, FORMAT_VERSION, kind):
            expected = f"{kind} counted by `dnazen ngrams count{' --pairs' if kind == 'runs' else ''}`"
            raise InputError(
                f"{self.path}: expected {expected} ({FORMAT} of version {FORMAT_VERSION}, {kind}), found "
                f"{found[0]} of version {found[1]}, {found[2]}"
            )
        if self.manifest.pop("checksum", None) != _digest(self.manifest):
            raise InputError(f"{self.path / MANIFEST_FILE}: altered; its checksum is not its own")
        self.arrays = {}
        for name in _FILES[kind]:
            file = self.path / f"{name}.npy"
            try:
                if sha256_file(file) != self.manifest["files"][name]:
                    raise InputError(f"{file}: cut short or altered; its SHA-256 is not the one in {MANIFEST_FILE}")
                self.arrays[name] = np.load(file, mmap_mode="r")
            except FileNotFoundError as error:
                raise InputError(f"{file}: no such file; these counts are not whole") from error
        self.tokenizer = load_tokenizer(self.path / "tokenizer")
        if tokenizer_checksum(self.tokenizer) != self.manifest["tokenizer_checksum"]:
            raise InputError(f"{self.path / 'tokenizer'}: altered; it is not the tokenizer that was counted with")


def _join(parts: Sequence[_Part]) -> list[str]:
    """Checksums of the corpora that the parts make up, in order; InputError unless each is whole and there once."""
    first, owners, shards = parts[0].manifest, {}, {}
    for part in parts:
        manifest = part.manifest
        for name in ("tokenizer_checksum", "parameters"):
            if manifest.get(name) != first.get(name):
                expected = f"the same {name} as {parts[0].path}, {first.get(name)}"
                raise InputError(f"{part.path}: expected {expected}, found {manifest.get(name)}")
        for name, what in (("tokens_sha256", "tokens"), ("sources_sha256", "a FASTA file")):
            for digest in manifest[name]:
                checksum, owner = owners.setdefault(digest, (manifest["corpus_checksum"], part.path))
                if checksum != manifest["corpus_checksum"]:
                    raise InputError(f"{part.path}: counts {what} that {owner} counts too, in another corpus or a copy")
        index, number = manifest["shard"]
        others = shards.setdefault(manifest["corpus_checksum"], {})
        for (other, other_number), path in others.items():
            if other_number != number:
                raise InputError(f"{part.path}: expected a shard of {other_number}, as {path}, found one of {number}")
            if other == index:
                raise InputError(f"{part.path}: counts shard {index}/{number} of the corpus that {path} counts too")
        others[index, number] = part.path
    for others in shards.values():
        (_, number), path = next(iter(others.items()))
        if absent := [str(index) for index in range(1, number + 1) if (index, number) not in others]:
            raise InputError(f"expected all {number} shards of the corpus of {path}, found no {', '.join(absent)}")
    return sorted(shards)


def _link_all(
    paths: Sequence[str | PathLike], manifest: dict[str, Any], thresholds: dict[str, Any]
) -> tuple[Links, list[str]]:
    """The pairs linked in all parts together, and the parts' corpora, which that of the manifest must be among."""
    parts = [_Part(path, "pairs") for path in paths]
    corpora = _join(parts)
    if manifest["corpus_checksum"] not in corpora:
        found = f"{manifest['corpus']}, whose pairs are in none of {', '.join(map(str, paths))}"
        raise InputError(f"expected a corpus whose pairs were counted, found {found}")
    table = PairCounts(*(np.zeros(len(parts[0].arrays[name]), np.int64) for name in PairCounts._fields))
    for part in parts:
        for name, total in table._asdict().items():
            total += read_slice(part.arrays[name], 0, len(total))
    return link_pairs(table, thresholds["min_pmi"], thresholds["min_pair_count"]), corpora
