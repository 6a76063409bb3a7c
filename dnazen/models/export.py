"""A trained model as the published ones are laid out, for programs made for those."""

import logging
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from dnazen.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, save_tokenizer
from dnazen.files import InputError, atomic_directory, write_json
from dnazen.models import DNAZenConfig, DNAZenForMaskedLM, DNAZenForSequenceClassification
from dnazen.ngram.vocab import NgramVocabulary

logger = logging.getLogger(__name__)

_CLASSES = {"ForMaskedLM": DNAZenForMaskedLM, "ForSequenceClassification": DNAZenForSequenceClassification}
# What published configurations say beside the fields of ours; programs made for them build on it.
_PUBLISHED = {
    "alibi_starting_size": 512, "gradient_checkpointing": False, "hidden_act": "gelu", "max_position_embeddings": 512,
    "model_type": "bert", "position_embedding_type": "absolute", "torch_dtype": "float32", "use_cache": True,
}  # fmt: skip


def export_model(model_dir: str | PathLike, output_dir: str | PathLike) -> int:
    """Write a model folder in the published form: configuration, weights in fp32, tokenizer, `ngram.json`.

    Our parameter names are the published ones. What differs from a folder of ours: the configuration is BERT's with
    every field written out, the tied decoder has its entry in `model.safetensors`, and a checkpoint's state of training
    stays behind.

    Returns:
        The number of parameters.

    Raises:
        InputError: `model_dir` is no whole model folder, or has what the published models have not; `output_dir` has
            something in it.
    """
    if not Path(model_dir).is_dir():
        raise InputError(f"{model_dir}: no such folder; expected a model")
    config = DNAZenConfig.from_pretrained(model_dir)
    architecture = (config.architectures or ["none"])[0].removeprefix("DNAZen").removeprefix("Bert")
    if architecture not in _CLASSES:
        expected = " or ".join(f"DNAZen{name}" for name in _CLASSES)
        raise InputError(f"{model_dir}: architectures: expected {expected}, found {config.architectures}")
    if config.neighbor_window:
        raise InputError(
            f"{model_dir}: neighbor_window: expected 0, for the published form has no neighbors in its embeddings, "
            f"found {config.neighbor_window}"
        )
    tokenizer = load_tokenizer(model_dir)
    vocabulary = NgramVocabulary.from_pretrained(model_dir, tokenizer)
    if vocabulary.max_ngrams is None:
        logger.warning(
            "%s: no limit of G-grams per sequence (max_ngram_count null); programs for the published models need one",
            model_dir,
        )
    model = _CLASSES[architecture].from_pretrained(model_dir, dtype=torch.float32)
    names = [field.name for field in fields(DNAZenConfig) if field.name in DNAZenConfig.__annotations__]
    values = {name: getattr(config, name) for name in names if name not in ("impl", "neighbor_window")} | _PUBLISHED
    values |= {"architectures": [f"Bert{architecture}"], "id2label": config.id2label, "label2id": config.label2id}
    with atomic_directory(output_dir) as directory:
        # clones, because safetensors writes no two entries of one memory
        weights = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        write_json(directory / "config.json", dict(sorted(values.items())))
        save_tokenizer(tokenizer, directory)
        write_json(directory / "tokenizer_config.json", _tokenizer_config(tokenizer))
        vocabulary.save_pretrained(directory, tokenizer)
    return model.num_parameters()


def _tokenizer_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The tokenizer's configuration as transformers 4 writes it, which transformers 5 reads too.

    Transformers 5 calls the class of every such tokenizer `TokenizersBackend`, a name that 4 does not know.
    """
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokenizer.model_max_length}
    config["clean_up_tokenization_spaces"] = False
    return {**config, **{role: getattr(tokenizer, role) for role in SPECIAL_TOKENS}}
