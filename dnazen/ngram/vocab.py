"""The G-gram vocabulary: which runs of tokens have which id, and the file that says so."""

import hashlib
import json
import logging
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dnazen.data.corpus import Corpus
from dnazen.data.tokenizer import TOKENIZER_FILE, load_tokenizer, tokenizer_checksum
from dnazen.files import InputError, read_json, sha256_file, write_json
from dnazen_kernels.ngram_matching import NgramTable

logger = logging.getLogger(__name__)

NGRAM_FILE, MANIFEST_FILE = "ngram.json", "manifest.json"
PAD_NGRAM_ID = 0


@dataclass(frozen=True)
class NgramVocabulary:
    """G-grams and their ids; id 0 is padding and belongs to none."""

    ngrams: list[tuple[int, ...]]  # token ids
    ids: list[int]
    max_ngrams: int | None = None  # G-grams per sequence; None: no limit

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding of these ids needs."""
        return max(self.ids, default=PAD_NGRAM_ID) + 1

    @property
    def checksum(self) -> str:
        """SHA-256 of ids, tokens and limit: the same however the file was written."""
        content = [self.max_ngrams, sorted(zip(self.ids, self.ngrams, strict=True))]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def table(self, num_tokens: int) -> NgramTable:
        """The table that matching uses, for a tokenizer of `num_tokens` tokens.

        Raises:
            InputError: the G-grams do not fit a 63-bit key, or a token is not below `num_tokens`.
        """
        try:
            return NgramTable.build(self.ngrams, self.ids, num_tokens)
        except ValueError as error:
            raise InputError(f"G-gram vocabulary: {error}") from error

    @classmethod
    def from_pretrained(cls, path: str | PathLike, tokenizer: PreTrainedTokenizerBase) -> "NgramVocabulary":
        """Read `ngram.json` (the file, or a folder with it) in the published form or the older one.

        Published: BPE tokens joined by spaces, `max_ngram_count` for the limit, `pad_ngram_id` 0. Older: token ids
        joined by colons, `max_ngrams`, no padding id. Where an older file gives id 0 to a G-gram, all its ids are
        raised by one, with a warning; the embedding of a model trained on it then has a row too few, so the two
        cannot be joined by mistake.

        Raises:
            InputError: the file is no such vocabulary, or not one of this tokenizer's.
        """
        path = Path(path) / NGRAM_FILE if Path(path).is_dir() else Path(path)
        data = read_json(path, "a G-gram vocabulary")
        entries, is_older = data.get("vocab"), "max_ngrams" in data
        if not isinstance(entries, dict) or not entries:
            raise InputError(f'{path}: expected G-grams under "vocab", found {str(entries)[:50]}')
        if data.get("pad_ngram_id", PAD_NGRAM_ID) != PAD_NGRAM_ID:
            raise InputError(f"{path}: expected pad_ngram_id {PAD_NGRAM_ID}, found {data['pad_ngram_id']!r}")
        max_ngrams = data["max_ngrams"] if is_older else data.get("max_ngram_count")
        if max_ngrams is not None and (type(max_ngrams) is not int or max_ngrams < 1):
            raise InputError(f"{path}: expected a positive limit of G-grams per sequence or null, found {max_ngrams!r}")

        token_ids = tokenizer.get_vocab()
        if is_older:
            token_ids = {str(token_id): token_id for token_id in token_ids.values()}
        special_ids = set(tokenizer.all_special_ids)
        shift = int(is_older and PAD_NGRAM_ID in entries.values())
        ngrams: list[tuple[int, ...]] = []
        owners: dict[int, str] = {}
        for entry, ngram_id in entries.items():
            ngram = tuple(token_ids.get(token) for token in entry.split(":" if is_older else " "))
            problem = None
            if None in ngram:
                problem = "expected tokens of the tokenizer, found another"
            elif special_ids.intersection(ngram):
                problem = "expected ordinary tokens, found a special one"
            elif not 2 <= len(ngram) <= 5:
                problem = f"expected 2 to 5 tokens, found {len(ngram)}"
            elif type(ngram_id) is not int or ngram_id + shift <= PAD_NGRAM_ID:
                problem = f"expected an id above {PAD_NGRAM_ID}, which is padding, found {ngram_id!r}"
            elif ngram_id in owners:
                problem = f"expected an id of its own, found {ngram_id}, that of {owners[ngram_id]!r}"
            if problem:
                raise InputError(f"{path}: G-gram {entry!r}: {problem}")
            ngrams.append(ngram)
            owners[ngram_id] = entry
        if shift:
            logger.warning("%s: id 0 is padding here, so every id of this older file is raised by one", path)
        return cls(ngrams, [ngram_id + shift for ngram_id in owners], max_ngrams)

    def to_dict(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The content of `ngram.json` in the published form."""
        lengths = [len(ngram) for ngram in self.ngrams]
        ordered = sorted(zip(self.ids, self.ngrams, strict=True))
        return {
            "min_ngram_len": min(lengths),
            "max_ngram_len": max(lengths),
            "max_ngram_count": self.max_ngrams,
            "pad_ngram_id": PAD_NGRAM_ID,
            "vocab": {" ".join(tokenizer.convert_ids_to_tokens(ngram)): ngram_id for ngram_id, ngram in ordered},
        }

    def save_pretrained(self, directory: str | PathLike, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write `ngram.json` in the published form."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_json(Path(directory) / NGRAM_FILE, self.to_dict(tokenizer))


def load_ngrams(path: str | PathLike, corpus: Corpus) -> NgramVocabulary:
    """Read the G-grams that `dnazen ngrams` wrote, for use with a corpus.

    They may come from another corpus with the same tokenizer. A folder without `manifest.json`, or the bare
    `ngram.json`, is taken too; then only the tokens themselves are checked.

    Raises:
        InputError: there is no `ngram.json`, or it was altered, or it belongs to another tokenizer; see
            `NgramVocabulary.from_pretrained`.
    """
    return _load(Path(path), corpus.tokenizer, "a corpus with tokenizer", corpus.path)


def open_ngrams(
    path: str | PathLike, tokenizer_path: str | PathLike | None = None
) -> tuple[NgramVocabulary, PreTrainedTokenizerFast]:
    """Read G-grams together with their tokenizer, which lies beside them unless another place is named.

    Raises:
        InputError: there is no tokenizer; see `load_ngrams`.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    _check_is_there(path)
    if tokenizer_path is None and not (folder / TOKENIZER_FILE).is_file():
        expected = f"{TOKENIZER_FILE} beside the G-grams, or its folder named with --tokenizer"
        raise InputError(f"{path}: expected {expected}, found neither")
    tokenizer = load_tokenizer(tokenizer_path or folder)
    return _load(path, tokenizer, "the tokenizer", tokenizer_path or folder), tokenizer


def _check_is_there(path: Path) -> None:
    if not (path / NGRAM_FILE if path.is_dir() else path).is_file():
        expected = f"G-grams (a folder made by `dnazen ngrams`, or its {NGRAM_FILE})"
        found = f"no {NGRAM_FILE} in it" if path.is_dir() else "no such file"
        raise InputError(f"{path}: expected {expected}, found {found}")


def _load(path: Path, tokenizer: PreTrainedTokenizerBase, expected: str, place: str | PathLike) -> NgramVocabulary:
    _check_is_there(path)
    if (path / MANIFEST_FILE).is_file():
        recorded = read_json(path / MANIFEST_FILE, "the record of a G-gram extraction")
        found = tokenizer_checksum(tokenizer)
        if recorded.get("tokenizer_checksum") != found:
            recorded_checksum = recorded.get("tokenizer_checksum")
            raise InputError(f"{path}: expected {expected} {recorded_checksum}, found {place} with {found}")
        if recorded.get("ngram_json_sha256") != sha256_file(path / NGRAM_FILE):
            raise InputError(f"{path / NGRAM_FILE}: altered; its SHA-256 is not the one in {MANIFEST_FILE}")
    return NgramVocabulary.from_pretrained(path, tokenizer)
