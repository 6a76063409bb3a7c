"""From sequences to a model's input: tokens, G-grams and batches."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dnazen.batches.collator import PackedCollator
from dnazen.batches.sampler import SPECIAL_TOKENS_PER_SEQUENCE
from dnazen.data.tokenizer import save_tokenizer
from dnazen.files import InputError, read_json
from dnazen.finetuning.damage import refuse_damage
from dnazen.finetuning.data import Table
from dnazen.finetuning.tasks import Task
from dnazen.models.hub import fetch_model, load_vocabularies
from dnazen.ngram.vocab import NgramVocabulary

logger = logging.getLogger(__name__)

MAX_LENGTH = 512  # tokens; DNAZEN's and DNABERT-2's in pretraining
# what counts its positions from the one after the padding's id
_POSITIONS_AFTER_PADDING = {
    "camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


class Encoded(NamedTuple):
    """The rows of a table as a model takes them."""

    input_ids: list[np.ndarray]  # without the first and last special token for our models, whole for others
    bases: list[np.ndarray] | None  # of each token, special ones included (0); for labels per base alone
    num_truncated: int  # rows


@dataclass(frozen=True)
class Preprocessor(ABC):
    """What makes a model's batches of sequences."""

    folder: Path  # the model's
    tokenizer: PreTrainedTokenizerBase
    max_length: int  # tokens, special ones included

    def encode(self, table: Table, task: Task) -> Encoded:
        """Tokenize a table's rows; what is beyond `max_length` is cut off, counted and logged.

        A pair is one sequence with a [SEP] in its middle; what is cut comes off the longer of the two.

        Raises:
            InputError: pairs, or labels per base, for a model that is not ours, or one whose tokenizer does not know
                most of what it reads.
        """
        encoded = self._encode(table, task)
        if encoded.num_truncated:
            logger.warning(
                "%s: %s of %s sequences are longer than %d tokens; what is beyond was cut off",
                table.path, f"{encoded.num_truncated:,}", f"{len(table.sequences):,}", self.max_length,
            )  # fmt: skip
        return encoded

    @abstractmethod
    def _encode(self, table: Table, task: Task) -> Encoded: ...

    @abstractmethod
    def make_collator(self) -> Callable[[list[np.ndarray]], dict[str, Any]]:
        """What makes a batch of rows of `Encoded.input_ids`."""

    def count_ngrams(self, input_ids: list[np.ndarray]) -> list[int] | None:
        """How many G-grams match in each row, whether or not the model sees them; None: there are no G-grams."""
        return None

    def save(self, directory: str | PathLike) -> None:
        """Write tokenizer and G-grams beside a model."""
        save_tokenizer(self.tokenizer, directory)


@dataclass(frozen=True)
class PackedPreprocessor(Preprocessor):
    """For DNAZEN and DNABERT-2: packed batches, with the G-grams that match."""

    vocabulary: NgramVocabulary  # empty for DNABERT-2
    use_ngrams: bool  # whether the model sees the G-grams that match

    def _encode(self, table: Table, task: Task) -> Encoded:
        backend = self.tokenizer.backend_tokenizer
        parts = [
            backend.encode_batch([row[column] for row in table.sequences], add_special_tokens=False)
            for column in range(len(table.sequences[0]))
        ]
        ids, bases, num_truncated = [], [] if task.is_per_token else None, 0
        for row in zip(*parts):
            room = self.max_length - SPECIAL_TOKENS_PER_SEQUENCE - (len(row) - 1)
            lengths = [len(part.ids) for part in row]
            num_truncated += sum(lengths) > room
            if len(lengths) == 1:
                lengths = [min(lengths[0], room)]
            elif sum(lengths) > room:
                shorter = min(min(lengths), room // 2)
                lengths = [shorter, room - shorter] if lengths[0] < lengths[1] else [room - shorter, shorter]
            kept = [np.array(part.ids[:length], np.int64) for part, length in zip(row, lengths)]
            separator = np.array([self.tokenizer.sep_token_id], np.int64)
            ids.append(kept[0] if len(kept) == 1 else np.concatenate([kept[0], separator, kept[1]]))
            if bases is not None:
                sizes = [stop - start for start, stop in row[0].offsets[: lengths[0]]]
                bases.append(np.array([0, *sizes, 0]))
        return Encoded(ids, bases, num_truncated)

    def make_collator(self) -> PackedCollator:
        return PackedCollator(self.tokenizer, self.vocabulary, use_ngrams=self.use_ngrams)

    def count_ngrams(self, input_ids: list[np.ndarray]) -> list[int] | None:
        if not self.vocabulary.ngrams:
            return None
        collator = PackedCollator(self.tokenizer, self.vocabulary)
        return collator(input_ids)["ngram_cu_seqlens"].diff().tolist()

    def save(self, directory: str | PathLike) -> None:
        super().save(directory)
        if self.vocabulary.ngrams:
            self.vocabulary.save_pretrained(directory, self.tokenizer)


@dataclass(frozen=True)
class PaddedPreprocessor(Preprocessor):
    """For any other encoder that transformers knows: padded batches of single sequences."""

    use_ngrams: ClassVar[bool] = False

    def _encode(self, table: Table, task: Task) -> Encoded:
        if table.is_pair or task.is_per_token:
            what = "pairs" if table.is_pair else "labels per base"
            raise InputError(f"{table.path}: {what} need DNAZEN or DNABERT-2 as the model, found {self.folder}")
        texts = [text for (text,) in table.sequences]
        num_truncated = sum(len(row) > self.max_length for row in self.tokenizer(texts, verbose=False)["input_ids"])
        rows = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        encoded = Encoded([np.array(row, np.int64) for row in rows], None, num_truncated)
        self._check_unknown(table, encoded)
        return encoded

    def _check_unknown(self, table: Table, encoded: Encoded) -> None:
        unknown_id = self.tokenizer.unk_token_id
        special = [token_id for token_id in self.tokenizer.all_special_ids if token_id != unknown_id]
        tokens = np.concatenate(encoded.input_ids)
        num_tokens = int((~np.isin(tokens, special)).sum())
        num_unknown = 0 if unknown_id is None else int((tokens == unknown_id).sum())
        if 2 * num_unknown >= num_tokens:  # none at all, too
            raise InputError(
                f"{self.folder}: expected a tokenizer that knows bases, found one to which {num_unknown:,} of the "
                f"{num_tokens:,} tokens of {table.path} are unknown; are its files there, and does it cut into k-mers?"
            )

    def make_collator(self) -> Callable[[list[np.ndarray]], dict[str, Any]]:
        return self._pad

    def _pad(self, input_ids: list[np.ndarray]) -> dict[str, Any]:
        return dict(self.tokenizer.pad({"input_ids": [row.tolist() for row in input_ids]}, return_tensors="pt"))


def open_preprocessor(name: str | PathLike, max_length: int | None = None, use_ngrams: bool = True) -> Preprocessor:
    """The preprocessor of a model, a folder or a name on the hub.

    Args:
        name: of DNAZEN, DNABERT-2 or another encoder that transformers knows.
        max_length: tokens, special ones included; default: 512, or what another encoder takes if that is less.
        use_ngrams: let the model see G-grams, if it did in pretraining.

    Raises:
        InputError: there is no such model; a file is missing or does not fit the others; `max_length` leaves no
            room for a token or is more than the model takes.
    """
    folder = fetch_model(str(name))
    config = read_json(folder / "config.json", "a model's configuration")
    if config.get("model_type") == "dnazen" or "alibi_starting_size" in config:
        tokenizer, vocabulary = load_vocabularies(folder)
        use_ngrams = use_ngrams and config.get("use_ngrams", True)
        max_length = _check_length(name, max_length, None)
        return PackedPreprocessor(folder, tokenizer, max_length, vocabulary or NgramVocabulary([], []), use_ngrams)
    with refuse_damage(f"{folder}: expected a tokenizer, found none that can be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = config.get("max_position_embeddings", MAX_LENGTH)
    if config.get("model_type") in _POSITIONS_AFTER_PADDING:
        longest -= config.get("pad_token_id", 1) + 1
    max_length = _check_length(name, max_length, min(tokenizer.model_max_length, longest))
    return PaddedPreprocessor(folder, tokenizer, max_length)


def _check_length(name: str | PathLike, max_length: int | None, longest: int | None) -> int:
    """`max_length`, or the default, which a model that takes `longest` tokens (None: any number) can read."""
    max_length = min(MAX_LENGTH, longest or MAX_LENGTH) if max_length is None else max_length
    smallest = SPECIAL_TOKENS_PER_SEQUENCE + 1
    if max_length < smallest or (longest and max_length > longest):
        expected = f"{smallest} to {longest}" if longest else f"at least {smallest}"
        raise InputError(f"--max-length: expected {expected} tokens for {name}, found {max_length}")
    return max_length
