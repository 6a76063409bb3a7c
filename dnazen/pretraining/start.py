"""Weights that begin as functions of the data, for runs too short to learn from chance what counting knows."""

import numpy as np
import torch

from dnazen.data.corpus import Corpus
from dnazen.evaluation.targets import count_unigrams
from dnazen.models import DNAZenForMaskedLM
from dnazen.ngram.vocab import NgramVocabulary

_END_BASES = 3  # at either end of a token, by which its embedding begins
_RESIDUAL_SHARE = 0.1  # of the usual spread, for the ways out of the sub-layers


def is_residual_output(name: str) -> bool:
    """Whether a parameter belongs to the way out of a sub-layer, whose result is added to the residual."""
    return ".mlp.wo." in name or ".output.dense." in name


@torch.no_grad()
def start_from_data(model: DNAZenForMaskedLM, corpus: Corpus, vocabulary: NgramVocabulary, seed: int) -> None:
    """Set the weights of a new model so that it begins at the unigram, and tokens with like ends have like embeddings.

    - The decoder's bias is the logarithm of the tokens' frequencies.
    - A token's embedding is a sum of random vectors: of its first one, two and three bases, of its last ones, of its
      length, and one of its own. Those of [MASK] and of the token type are zero, so that what a hidden token sees of
      its neighbors is not small beside what all hidden tokens have in common.
    - Of the neighbors that enter a token's embedding, only the nearest on either side do so from the beginning.
    - A G-gram's embedding is the mean of its tokens', times the root of their number.
    - The ways out of the sub-layers are a tenth of their usual size. Hidden tokens have much in common; at full size a
      post-LN layer would drown in it what differs between them, and their states would become the same.
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer, spread = corpus.tokenizer, model.config.initializer_range
    words = model.bert.embeddings.word_embeddings.weight
    special = set(tokenizer.all_special_ids)
    features: dict[tuple[str, object], torch.Tensor] = {}
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        keys: list[tuple[str, object]] = [("token", token_id)]
        if token_id not in special:
            ends = range(1, min(len(token), _END_BASES) + 1)
            keys += [
                ("length", len(token)),
                *(("first", token[:k]) for k in ends),
                *(("last", token[-k:]) for k in ends),
            ]
        for key in keys:
            if key not in features:
                features[key] = torch.randn(words.shape[1], generator=generator)
        words[token_id] = torch.stack([features[key] for key in keys]).sum(0) * spread / len(keys) ** 0.5
    words[model.config.mask_token_id] = 0.0
    model.bert.embeddings.token_type_embeddings.weight.zero_()

    if distances := model.bert.embeddings.distances:
        for distance, layer in zip(distances, model.bert.embeddings.neighbor_layers):
            if abs(distance) > 1:
                layer.weight.zero_()

    counts = count_unigrams(corpus.train, len(tokenizer)) + 1.0
    model.get_output_embeddings().bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))

    ngrams = model.bert.ngram_embeddings.word_embeddings.weight
    for ngram, ngram_id in zip(vocabulary.ngrams, vocabulary.ids):
        ngrams[ngram_id] = words[list(ngram)].sum(0) / len(ngram) ** 0.5
    for name, parameter in model.named_parameters():
        if is_residual_output(name):
            parameter.mul_(_RESIDUAL_SHARE)
