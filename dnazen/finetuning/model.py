"""A model to fine-tune, or a fine-tuned one: what turns sequences into its input, and its weights."""

import hashlib
import logging
import pickle
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from dnazen.batches.collator import PackedCollator
from dnazen.batches.sampler import SPECIAL_TOKENS_PER_SEQUENCE
from dnazen.batches.streaming import run_batches
from dnazen.data.tokenizer import save_tokenizer
from dnazen.files import InputError, read_json, sha256_file, write_json
from dnazen.finetuning.data import Table
from dnazen.finetuning.tasks import PER_BASE, Task
from dnazen.models import DNAZenForSequenceClassification, DNAZenForTokenClassification
from dnazen.models.hub import fetch_model, load_vocabularies
from dnazen.models.modeling_dnazen import DNAZenPreTrainedModel
from dnazen.ngram.vocab import NGRAM_FILE, NgramVocabulary

logger = logging.getLogger(__name__)

RECORD_FILE = "finetune.json"
FORMAT = 1
MAX_LENGTH = 512  # tokens; DNAZEN's and DNABERT-2's in pretraining
# the projections of both attentions; in other models every linear layer but the head
LORA_TARGETS = ("Wqkv", "query", "key", "value")
# parts that start at random and are small: trained and saved whole beside the adapters
_HEADS = ("classifier", "pooler", "score")
# what counts its positions from the one after the padding's id
_POSITIONS_AFTER_PADDING = {
    "camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
# what transformers, safetensors, torch and peft raise for files that are damaged or do not fit each other
_DAMAGE = (ValueError, KeyError, TypeError, RuntimeError, OSError, ImportError, SafetensorError, pickle.UnpicklingError)


class Encoded(NamedTuple):
    """The rows of a table as a model takes them."""

    input_ids: list[np.ndarray]  # without the first and last special token for our models, whole for others
    bases: list[np.ndarray] | None  # of each token, special ones included (0); for labels per base alone
    num_truncated: int

    def labels(self, task: Task, labels: list[np.ndarray]) -> list[np.ndarray]:
        """Labels row by row; those per base become counts of the classes of each token's bases."""
        if task.kind != PER_BASE:
            return labels
        return [_count_by_token(label, bases, task.num_labels) for label, bases in zip(labels, self.bases)]


class Encoder(NamedTuple):
    """What stands between sequences and a model: tokenizer, G-grams, batches."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    vocabulary: NgramVocabulary | None  # None: another model than ours, with padded batches
    use_ngrams: bool
    max_length: int  # tokens, special ones included

    @classmethod
    def open(cls, name: str | PathLike, max_length: int | None = None, use_ngrams: bool = True) -> "Encoder":
        """Find a model: DNAZEN, DNABERT-2 or an encoder that transformers knows, a folder or a name on the hub.

        Raises:
            InputError: there is no such model; a file is missing or does not fit the others; `max_length` leaves no
                room for a token or is more than the model takes.
        """
        folder = fetch_model(str(name))
        config = read_json(folder / "config.json", "a model's configuration")
        if config.get("model_type") == "dnazen" or "alibi_starting_size" in config:
            tokenizer, vocabulary = load_vocabularies(folder)
            vocabulary, longest = vocabulary or NgramVocabulary([], []), None
            use_ngrams = use_ngrams and config.get("use_ngrams", True)  # as it was pretrained
        else:
            tokenizer, vocabulary = _load_other_tokenizer(folder), None
            longest = config.get("max_position_embeddings", MAX_LENGTH)
            if config.get("model_type") in _POSITIONS_AFTER_PADDING:
                longest -= config.get("pad_token_id", 1) + 1
            longest = min(tokenizer.model_max_length, longest)
        max_length = min(MAX_LENGTH, longest or MAX_LENGTH) if max_length is None else max_length
        smallest = SPECIAL_TOKENS_PER_SEQUENCE + 1
        if max_length < smallest or (longest and max_length > longest):
            expected = f"{smallest} to {longest}" if longest else f"at least {smallest}"
            raise InputError(f"max_length: expected {expected} tokens for {name}, found {max_length}")
        return cls(folder, tokenizer, vocabulary, use_ngrams, max_length)

    @property
    def is_packed(self) -> bool:
        return self.vocabulary is not None

    def encode(self, table: Table, task: Task) -> Encoded:
        """Tokenize a table's rows; what is beyond `max_length` is cut off, counted and logged.

        A pair is one sequence with a [SEP] in its middle; what is cut comes off the longer of the two.

        Raises:
            InputError: pairs, or labels per base, for a model that is not ours, or one whose tokenizer does not know
                most of what it reads.
        """
        if not self.is_packed:
            if table.is_pair or task.kind == PER_BASE:
                what = "pairs" if table.is_pair else "labels per base"
                raise InputError(f"{table.path}: {what} need DNAZEN or DNABERT-2 as the model, found {self.folder}")
            texts = [text for (text,) in table.sequences]
            num_truncated = sum(len(row) > self.max_length for row in self.tokenizer(texts, verbose=False)["input_ids"])
            rows = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
            encoded = Encoded([np.array(row, np.int64) for row in rows], None, num_truncated)
            self._check_unknown(table, encoded)
        else:
            encoded = self._encode_packed(table, task)
        if encoded.num_truncated:
            logger.warning(
                "%s: %s of %s sequences are longer than %d tokens; what is beyond was cut off",
                table.path, f"{encoded.num_truncated:,}", f"{len(table.sequences):,}", self.max_length,
            )  # fmt: skip
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

    def _encode_packed(self, table: Table, task: Task) -> Encoded:
        backend = self.tokenizer.backend_tokenizer
        parts = [
            backend.encode_batch([row[column] for row in table.sequences], add_special_tokens=False)
            for column in range(len(table.sequences[0]))
        ]
        ids, bases, num_truncated = [], [] if task.kind == PER_BASE else None, 0
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

    def make_collator(self) -> Callable[[list[np.ndarray]], dict[str, Any]]:
        """What makes a batch of rows: packed, with their G-grams, for our models; padded for others."""
        if not self.is_packed:
            return self._pad
        return PackedCollator(self.tokenizer, self.vocabulary, use_ngrams=self.use_ngrams)

    def _pad(self, input_ids: list[np.ndarray]) -> dict[str, Any]:
        return dict(self.tokenizer.pad({"input_ids": [row.tolist() for row in input_ids]}, return_tensors="pt"))

    def count_ngrams(self, input_ids: list[np.ndarray]) -> list[int]:
        """How many G-grams match in each row, whether or not the model sees them."""
        collator = PackedCollator(self.tokenizer, self.vocabulary)
        return collator(input_ids)["ngram_cu_seqlens"].diff().tolist()

    def save(self, directory: str | PathLike) -> None:
        """Write tokenizer and G-grams beside a model."""
        save_tokenizer(self.tokenizer, directory)
        if self.is_packed and self.vocabulary.ngrams:
            self.vocabulary.save_pretrained(directory, self.tokenizer)


def _load_other_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except _DAMAGE as error:
        raise InputError(f"{folder}: expected a tokenizer, found none that can be read: {_say(error)}") from error


def _say(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line), type(error).__name__)


def _count_by_token(label: np.ndarray, bases: np.ndarray, num_labels: int) -> np.ndarray:
    """`[bases]` classes to `[tokens, num_labels]` counts; bases of tokens that were cut off are not counted."""
    counts = np.zeros((len(bases), num_labels), np.float32)
    token = np.repeat(np.arange(len(bases)), bases)
    np.add.at(counts, (token, label[: len(token)]), 1)
    return counts


def load_model(
    encoder: Encoder, task: Task, attn_implementation: str | None = None, may_lack_head: bool = True
) -> nn.Module:
    """The model with a head for the task, in fp32; a head that the folder does not have starts at random.

    Raises:
        InputError: weights are missing or do not fit (see `StrictLoading.from_pretrained`), or cannot be read; the
            head is missing and may not be.
    """
    options: dict[str, Any] = {"num_labels": task.num_labels, "problem_type": task.problem_type, "dtype": torch.float32}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if not encoder.is_packed:
        return _load_other_model(encoder.folder, options, may_lack_head)
    model_class = DNAZenForTokenClassification if task.kind == PER_BASE else DNAZenForSequenceClassification
    options["use_ngrams"] = encoder.use_ngrams
    if not encoder.vocabulary.ngrams:
        # no G-gram ever reaches their encoder, which cannot be smaller than this
        options |= {"ngram_vocab_size": encoder.vocabulary.vocab_size, "num_hidden_ngram_layers": 1}
    return model_class.from_pretrained(encoder.folder, **options)


def _load_other_model(folder: Path, options: dict[str, Any], may_lack_head: bool) -> nn.Module:
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True, **options)
    except _DAMAGE as error:
        raise InputError(f"{folder}: expected an encoder that transformers knows, found none: {_say(error)}") from error
    missing = sorted(info["missing_keys"])
    is_head = [may_lack_head and not set(_HEADS).isdisjoint(name.split(".")) for name in missing]
    if not all(is_head):
        lost = [name for name, is_one in zip(missing, is_head) if not is_one]
        raise InputError(f"{folder}: expected all weights, {len(lost)} are missing: {_shorten(lost)}")
    if missing:
        logger.warning("%s: new, with random weights: %s", folder, ", ".join(missing))
    return model


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def add_adapters(model: nn.Module, rank: int, alpha: int, dropout: float, targets: Sequence[str] | None) -> PeftModel:
    """`model` with LoRA adapters (Hu et al. 2021) of `rank`, alone trainable beside the head.

    Args:
        targets: names of the linear layers to adapt; None: the projections of DNAZEN's attentions, and in other models
            every linear layer but the head.

    Raises:
        InputError: the model has no layer of such a name.
    """
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if targets is None:
        targets = list(LORA_TARGETS) if isinstance(model, DNAZenPreTrainedModel) else "all-linear"
    elif unknown := sorted(set(targets) - names):
        raise InputError(f"lora_target_modules: expected names of layers, found {', '.join(unknown)}")
    heads = [name for name in _HEADS if name in names]
    options = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, modules_to_save=heads)
    return get_peft_model(model, options)


def write_record(
    directory: str | PathLike, encoder: Encoder, task: Task, has_adapters: bool, is_pair: bool, autocast: dict[str, str]
) -> None:
    """Write `finetune.json`: what `open_finetuned` needs to know beside model and tokenizer.

    Args:
        autocast: the `dtype` in which it was evaluated on dev, by type of device.
    """
    record = {"format": FORMAT, **task._asdict(), "is_pair": is_pair, "max_length": encoder.max_length}
    record["autocast"] = autocast
    record |= {"use_ngrams": encoder.use_ngrams, "base": None}
    if has_adapters:
        record["base"] = {"folder": str(encoder.folder.resolve()), "sha256": checksum_weights(encoder.folder)}
    write_json(Path(directory) / RECORD_FILE, record)


class Finetuned(NamedTuple):
    """A fine-tuned model, in evaluation mode, on the GPU if there is one."""

    encoder: Encoder
    task: Task
    is_pair: bool
    model: nn.Module
    autocast: dict[str, str]  # see `write_record`

    def predict(self, encoded: Encoded) -> list[np.ndarray]:
        """Logits of each row in fp32: `[num_labels]`, or per base `[tokens, num_labels]`; see `Task.restore`."""
        device = next(self.model.parameters()).device.type
        dtype = self.autocast.get(device)
        with torch.autocast(device, getattr(torch, dtype or "bfloat16"), enabled=dtype is not None):
            return predict_logits(self.model, self.encoder, self.task, encoded.input_ids)


def open_finetuned(folder: str | PathLike, attn_implementation: str | None = None) -> Finetuned:
    """Load what `dnazen/finetune.py` wrote (its `final/`), adapters onto the model that they were trained for.

    Raises:
        InputError: it is no such folder; a file is damaged; the adapters' model is not where it was, or another.
    """
    folder = Path(folder)
    record = read_json(folder / RECORD_FILE, "a fine-tuned model's record (a folder final/ of dnazen/finetune.py)")
    if record.get("format") != FORMAT:
        raise InputError(f"{folder / RECORD_FILE}: format: expected {FORMAT}, found {record.get('format')!r}")
    task, base = Task(*(record.get(name) for name in Task._fields)), record["base"]
    if base and not Path(base["folder"]).is_dir():
        raise InputError(f"{folder}: expected the model that its adapters belong to in {base['folder']}, found nothing")
    if base and (found := checksum_weights(Path(base["folder"]))) != base["sha256"]:
        raise InputError(f"{base['folder']}: expected weights with SHA-256 {base['sha256']}, found {found}")
    encoder = Encoder.open(base["folder"] if base else folder, record["max_length"], record["use_ngrams"])
    model = load_model(encoder, task, attn_implementation, may_lack_head=base is not None)
    if base:
        try:
            model = PeftModel.from_pretrained(model, folder)
        except _DAMAGE as error:
            raise InputError(f"{folder}: expected LoRA adapters, found none that can be read: {_say(error)}") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Finetuned(encoder, task, record["is_pair"], model, record.get("autocast", {}))


def predict_logits(model: nn.Module, encoder: Encoder, task: Task, input_ids: list[np.ndarray]) -> list[np.ndarray]:
    """Logits of each row, in fp32, by `model` as it is; see `Finetuned.predict`."""

    def compute(batch: dict[str, Any]) -> Sequence[Tensor]:
        logits = model(**batch).logits.float().cpu()
        return logits.split(batch["cu_seqlens"].diff().tolist()) if task.kind == PER_BASE else logits.unbind()

    rows = enumerate([row] for row in input_ids)
    device = next(model.parameters()).device
    return [result.numpy() for _, (result,) in run_batches(rows, encoder.make_collator(), compute, device)]


def list_weights(folder: Path) -> list[Path]:
    """The files of a model's weights."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])


def checksum_weights(folder: Path) -> str:
    """SHA-256 of a model's configuration, tokenizer, G-grams and weights."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", NGRAM_FILE)
    files = [*(path for name in names if (path := folder / name).is_file()), *list_weights(folder)]
    return hashlib.sha256("".join(path.name + sha256_file(path) for path in files).encode()).hexdigest()
