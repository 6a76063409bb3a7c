"""The model that is fine-tuned, with a head for its task, and the files it comes from."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from dnazen.files import InputError, sha256_file
from dnazen.finetuning.damage import refuse_damage
from dnazen.finetuning.preprocessing import PackedPreprocessor, Preprocessor
from dnazen.finetuning.tasks import Task
from dnazen.models import DNAZenForSequenceClassification, DNAZenForTokenClassification
from dnazen.ngram.vocab import NGRAM_FILE

logger = logging.getLogger(__name__)

# parts that start at random and are small: with adapters, they are trained and saved whole
HEADS = ("classifier", "pooler", "score")


def load_model(
    preprocessor: Preprocessor, task: Task, attn_implementation: str | None = None, may_lack_head: bool = True
) -> nn.Module:
    """The preprocessor's model with a head for the task, in fp32; a head that the folder lacks starts at random.

    Raises:
        InputError: weights are missing or do not fit (see `StrictLoading.from_pretrained`), or cannot be read; the
            head is missing and may not be.
    """
    options: dict[str, Any] = {"num_labels": task.num_labels, "problem_type": task.problem_type, "dtype": torch.float32}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if not isinstance(preprocessor, PackedPreprocessor):
        return _load_other_model(preprocessor.folder, options, may_lack_head)
    model_class = DNAZenForTokenClassification if task.is_per_token else DNAZenForSequenceClassification
    options["use_ngrams"] = preprocessor.use_ngrams
    if not preprocessor.vocabulary.ngrams:
        # no G-gram ever reaches their encoder, which cannot be smaller than this
        options |= {"ngram_vocab_size": preprocessor.vocabulary.vocab_size, "num_hidden_ngram_layers": 1}
    return model_class.from_pretrained(preprocessor.folder, **options)


def _load_other_model(folder: Path, options: dict[str, Any], may_lack_head: bool) -> nn.Module:
    with refuse_damage(f"{folder}: expected an encoder that transformers knows, found none"):
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    is_head = [may_lack_head and not set(HEADS).isdisjoint(name.split(".")) for name in missing]
    if not all(is_head):
        lost = [name for name, is_one in zip(missing, is_head) if not is_one]
        shown = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
        raise InputError(f"{folder}: expected all weights, {len(lost)} are missing: {shown}")
    if missing:
        logger.warning("%s: new, with random weights: %s", folder, ", ".join(missing))
    return model


def list_weights(folder: Path) -> list[Path]:
    """The files of a model's weights."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])


def checksum_weights(folder: Path) -> str:
    """SHA-256 of a model's configuration, tokenizer, G-grams and weights."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", NGRAM_FILE)
    files = [*(path for name in names if (path := folder / name).is_file()), *list_weights(folder)]
    return hashlib.sha256("".join(path.name + sha256_file(path) for path in files).encode()).hexdigest()
