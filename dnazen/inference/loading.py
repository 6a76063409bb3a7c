"""A trained model made ready to be used: weights, tokenizer and G-grams of one folder."""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from dnazen.batches.collator import PackedCollator
from dnazen.data.tokenizer import tokens_by_id
from dnazen.defaults import PRECISION, PRECISIONS
from dnazen.files import InputError
from dnazen.models.hub import fetch_model, load_vocabularies
from dnazen.models.modeling_dnazen import DNAZenPreTrainedModel
from dnazen.ngram.vocab import NgramVocabulary

_DTYPES = dict(zip(PRECISIONS, (torch.float32, torch.bfloat16), strict=True))


class InferenceModel(NamedTuple):
    """A model in evaluation mode, and what turns sequences into its input."""

    model: DNAZenPreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    vocabulary: NgramVocabulary  # empty for a model without G-grams
    collator: PackedCollator  # without masking
    id_to_token: list[str]  # the bases of each token id

    def tokenize(self, sequences: list[str]) -> list[list[int]]:
        """Token ids of each sequence of A, C, G and T, without special tokens.

        Raises:
            InputError: the tokens do not spell a sequence.
        """
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(sequences, add_special_tokens=False)
        for sequence, encoding in zip(sequences, encodings):
            if "".join(map(self.id_to_token.__getitem__, encoding.ids)) != sequence:
                raise InputError(f"the tokenizer does not spell every sequence of A, C, G, T: {sequence[:50]}")
        return [encoding.ids for encoding in encodings]


def load_for_inference(
    name: str,
    model_class: type[DNAZenPreTrainedModel],
    precision: str = PRECISION,
    attn_implementation: str | None = None,
) -> InferenceModel:
    """Load a model, a folder or a name on the Hugging Face hub, on the GPU if there is one.

    A folder without `ngram.json`, as DNABERT-2's, gives a model that sees tokens alone, as one trained without G-grams.

    Args:
        name: of the folder or of the hub's model.
        model_class: which parts of the model are used; one that the folder lacks is an error, or logged if it may be
            new.
        precision: of weights and states: "fp32" or "bf16".
        attn_implementation: as in `from_pretrained`; None: the best that runs. "eager" alone returns attention weights.

    Raises:
        InputError: an argument is unknown; there is no such model; a file is missing or does not fit the others; see
            `StrictLoading.from_pretrained`.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision: expected {' or '.join(PRECISIONS)}, found {precision!r}")
    folder = fetch_model(name)
    tokenizer, vocabulary = load_vocabularies(folder)
    options: dict[str, Any] = {"attn_implementation": attn_implementation}
    if vocabulary is None:
        vocabulary = NgramVocabulary([], [])
        options["ngram_vocab_size"] = vocabulary.vocab_size
    model = model_class.from_pretrained(folder, dtype=_DTYPES[precision], **options)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    collator = PackedCollator(tokenizer, vocabulary, use_ngrams=model.config.use_ngrams)
    return InferenceModel(model, tokenizer, vocabulary, collator, tokens_by_id(tokenizer))
