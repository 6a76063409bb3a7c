"""The model a run starts from (`--init-from`): where it lies, what it must share with the data, and its weights."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from dnazen.data.corpus import Corpus
from dnazen.data.tokenizer import tokenizer_checksum
from dnazen.files import InputError, sha256_file
from dnazen.models import DNAZenForMaskedLM
from dnazen.models.hub import WEIGHTS, fetch_model, load_vocabularies
from dnazen.ngram.vocab import NGRAM_FILE, PAD_NGRAM_ID, NgramVocabulary

_EMBEDDINGS = "bert.ngram_embeddings.word_embeddings.weight"


class InitialModel(NamedTuple):
    """A model with a masked-language head: DNABERT-2, DNAZEN-1.0, or one that was trained here."""

    name: str  # as given
    folder: Path
    vocabulary: NgramVocabulary | None  # None: it has no G-grams
    checksum: str  # of its configuration, weights and G-grams

    @classmethod
    def open(cls, name: str, corpus: Corpus) -> "InitialModel":
        """Find a model, a folder or a name on the Hugging Face hub, to go on training on a corpus.

        Raises:
            InputError: there is no such model; a file is missing or does not fit the others; its tokenizer is not the
                corpus's.
        """
        folder = fetch_model(name)
        tokenizer, vocabulary = load_vocabularies(folder)
        expected, found = tokenizer_checksum(tokenizer), tokenizer_checksum(corpus.tokenizer)
        if found != expected:
            raise InputError(
                f"{corpus.path}: expected a corpus made with the tokenizer of {name} ({len(tokenizer):,} tokens, "
                f"SHA-256 {expected}), found another ({len(corpus.tokenizer):,} tokens, SHA-256 {found})"
            )
        files = next((found for pattern in WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
        if not files:
            raise InputError(f"{folder}: expected weights ({' or '.join(WEIGHTS)}), found none")
        files += [folder / "config.json", *[folder / NGRAM_FILE] * (vocabulary is not None)]
        content = json.dumps([[file.name, sha256_file(file)] for file in files])
        return cls(name, folder, vocabulary, hashlib.sha256(content.encode()).hexdigest())

    def load_weights(self, model: DNAZenForMaskedLM, vocabulary: NgramVocabulary, deepspeed_config: Any = None) -> str:
        """Copy this model's weights into `model`; G-gram embeddings go by the tokens of the G-grams.

        G-grams that this model does not have keep their random start; if it has none, so does the whole G-gram part.

        Args:
            model: of the same sizes, with an embedding for each id of `vocabulary`; not yet partitioned.
            deepspeed_config: Hugging Face's, if the run has one.

        Returns:
            What became of the G-grams, in a line.

        Raises:
            InputError: see `StrictLoading.from_pretrained`.
        """
        if deepspeed_config is not None:  # it stays whole under ZeRO-3: `model` is partitioned by the engine
            unset_hf_deepspeed_config()
        try:
            options = {} if self.vocabulary else {"ngram_vocab_size": vocabulary.vocab_size}
            initial = DNAZenForMaskedLM.from_pretrained(self.folder, dtype=torch.float32, **options)
        finally:
            if deepspeed_config is not None:
                set_hf_deepspeed_config(deepspeed_config)
        weights = initial.state_dict()
        count = len(vocabulary.ngrams)
        if self.vocabulary is None:
            model.load_state_dict(weights)
            return f"started from {self.name}, which has no G-grams: {count:,} start at random, and their encoder"
        ids = dict(zip(self.vocabulary.ngrams, self.vocabulary.ids))
        shared = [(ngram_id, ids[ngram]) for ngram, ngram_id in zip(vocabulary.ngrams, vocabulary.ids) if ngram in ids]
        targets, origins = map(list, zip((PAD_NGRAM_ID, PAD_NGRAM_ID), *shared))
        embeddings = model.state_dict()[_EMBEDDINGS].clone()
        embeddings[targets] = weights[_EMBEDDINGS][origins]
        model.load_state_dict({**weights, _EMBEDDINGS: embeddings})
        return (
            f"started from {self.name}; of {count:,} G-grams {len(shared):,} keep their embedding, "
            f"{count - len(shared):,} start at random; {len(ids) - len(shared):,} of its G-grams are not used"
        )
